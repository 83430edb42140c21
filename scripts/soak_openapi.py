"""Requests made up from the OpenAPI document, good and bad ones: no answer is a server's error or out of its schema."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from adapterhub.api.app import create_app
from adapterhub.config import Config
from tests.serving import BASE, Server, User, chat_lines, running, save_base, small_config

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


class Doors:
    """All operations of a server: a user with things of their own, and an operator, call them with made-up requests."""

    def __init__(self, server: Server, document: dict[str, Any], examples: int, seed: int) -> None:
        self.server, self.examples, self.seed = server, examples, seed
        self.faults: list[str] = []
        self.counts: Counter[int] = Counter()
        self.user = server.user()
        self.known = things_of(self.user)
        self.schema = schemathesis.openapi.from_dict(document)
        self.schema.config.update(base_url=server.url)
        self.schema.config.generation.update(modes=list(GenerationMode))

    def run(self) -> None:
        for found in self.schema.get_all_operations():
            operation = found.ok()
            before = self._budgets()
            self._try(operation)
            self.server.admin.http.patch("/admin/tiers", json=before).raise_for_status()
            if "/admin/policy" in operation.path:
                self.server.hub.steering.set_rules(lambda _: type(_)())

    def _try(self, operation: Any) -> None:
        account = self.server.admin if operation.path.startswith("/admin") else self.user
        headers = {"Authorization": f"Bearer {account.key}"}

        @given(case=operation.as_strategy(), real=st.booleans())
        @settings(
            max_examples=self.examples,
            deadline=None,
            database=None,
            derandomize=self.seed == 0,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def attempt(case: Any, real: bool) -> None:
            if real and case.path_parameters:
                case.path_parameters |= {n: v for n, v in self.known.items() if n in case.path_parameters}
            response = case.call(headers=headers, timeout=60)
            self.counts[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        try:
            attempt()
        except (Exception, FailureGroup) as error:
            self.faults.append(f"{operation.method.upper()} {operation.path}: {error}")

    def _budgets(self) -> dict[str, int]:
        tiers = self.server.admin.http.get("/admin/tiers").raise_for_status().json()["tiers"]
        return {f"{name}_bytes": tiers[name]["budget_bytes"] for name in ("device", "ram", "disk")}


def things_of(user: User) -> dict[str, str]:
    """A file, a job, an adapter and a version, by the names that parameters of paths have."""
    job = user.job(user.train(chat_lines(), suffix="mine", max_steps=1), "succeeded")
    [adapter] = user.http.get("/v1/adapters").raise_for_status().json()["data"]
    return {
        "file_id": user.upload(chat_lines()),
        "job_id": job.id,
        "adapter_id": adapter["id"],
        "version": "1",
        "name": BASE,
    }


def soak_openapi(options: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        base = save_base(Path(directory) / BASE)
        config = small_config(base, Path(directory) / "data", max_waiting=64)
        with running(config) as server:
            document = create_app(Config(data_dir=Path(directory) / "none"), server.hub.base).openapi()
            doors = Doors(server, document, options.examples, options.seed)
            doors.run()
            counts = ", ".join(f"{n} of {status}" for status, n in sorted(doors.counts.items()))
            print(f"{sum(doors.counts.values())} requests: {counts}")
            return doors.faults
