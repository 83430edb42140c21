"""Requests made up from the OpenAPI document, good and bad ones: no answer is a server's error or out of its schema,
and every operation does what it is for when it is asked well."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
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
from transformers import AutoModelForCausalLM

from adapterhub.api.app import create_app
from adapterhub.config import Config
from tests.serving import BASE, PeftFiles, Server, chat_lines, running, save_base, small_config

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
_FORM = "multipart/form-data"


class Doors:
    """All operations of a server: a user with things of their own, and an operator, call them with made-up requests."""

    def __init__(self, server: Server, document: dict[str, Any], adapter: PeftFiles, examples: int, seed: int) -> None:
        """`seed` 0: the same requests each time, whatever the machine."""
        self.server, self.examples, self.seed = server, examples, seed
        self.faults: list[str] = []
        self.counts: Counter[int] = Counter()
        self.things = Things(server, adapter)
        self.schema = schemathesis.openapi.from_dict(document)
        self.schema.config.update(base_url=server.url)
        self.schema.config.generation.update(modes=list(GenerationMode))

    def run(self) -> None:
        for operation in sorted((found.ok() for found in self.schema.get_all_operations()), key=_takes_away):
            before = self._budgets()
            for attempt in (self._ask_well, self._make_up):
                try:
                    attempt(operation)
                except (Exception, FailureGroup) as error:
                    self.faults.append(f"{operation.label}: {error}")
            self.server.admin.http.patch("/admin/tiers", json=before).raise_for_status()
            if "/admin/policy" in operation.path:
                self.server.hub.steering.set_rules(lambda _: type(_)())

    def _ask_well(self, operation: Any) -> None:
        """With a request that does what the operation is for."""
        needed = self.things.of(operation.label)
        body = self.things.body(operation.label, needed)
        parameters = {parameter.name for parameter in operation.path_parameters}
        more: dict[str, Any] = {}
        if body is not None:
            form = _FORM in operation.get_request_payload_content_types()
            more = {"body": body, "media_type": _FORM if form else "application/json"}
        named = {name: value for name, value in needed.items() if name in parameters}
        response = self._call(operation, operation.Case(path_parameters=named, **more))
        assert response.status_code // 100 == 2, f"asked well, it answers {response.status_code}: {response.text[:500]}"

    def _make_up(self, operation: Any) -> None:
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
            if real:  # it names what there is
                needed = self.things.of(operation.label)
                if case.path_parameters:
                    case.path_parameters |= {n: v for n, v in needed.items() if n in case.path_parameters}
                if isinstance(case.body, dict):
                    case.body |= {n: v for n, v in needed.items() if n in case.body}
            self._call(operation, case)

        (attempt if self.seed == 0 else hypothesis.seed(self.seed)(attempt))()

    def _call(self, operation: Any, case: Any) -> Any:
        account = self.things.admin if operation.path.startswith("/admin") else self.things.user
        response = case.call(headers={"Authorization": f"Bearer {account.key}"}, timeout=60)
        self.counts[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        return response

    def _budgets(self) -> dict[str, int]:
        tiers = self.server.admin.http.get("/admin/tiers").raise_for_status().json()["tiers"]
        return {f"{name}_bytes": tiers[name]["budget_bytes"] for name in ("device", "ram", "disk")}


def _takes_away(operation: Any) -> bool:
    """Such operations come last."""
    return operation.method.upper() == "DELETE"


class Things:
    """What requests name, by the names that parameters of paths and fields of bodies have: files, jobs, adapters, keys
    and owners that there are. What an operation uses up is made for each of its requests."""

    def __init__(self, server: Server, adapter: PeftFiles) -> None:
        self.admin, self.user = server.admin, server.user()
        self._server, self._adapter, self._number = server, adapter, count(1)
        self._bystander = server.user().owner  # whose quotas change
        job = self.user.job(self.user.train(chat_lines(), suffix="mine", max_steps=2), "succeeded").id
        imported = self._import("mine")  # its second version
        file = self.user.upload(chat_lines())
        self.admin.http.delete(f"/admin/users/{server.user().owner}").raise_for_status()
        [erasure, *_] = self.admin.http.get("/admin/erasures").raise_for_status().json()["data"]
        self._lasting = {
            "file_id": file,
            "training_file": file,
            "job_id": job,
            "adapter_id": imported["id"],
            "version": "1",
            "name": BASE,
            "model": BASE,
            "key_id": server.hub.keys.list(self._bystander)[0].id,
            "owner": self._bystander,
            "erasure_id": erasure["id"],
            "max_tokens": 3,  # so that an answer takes no time
            "max_completion_tokens": 3,
        }

    def of(self, operation: str) -> dict[str, Any]:
        return {**self._lasting, **self._made_for(operation)}

    def body(self, operation: str, needed: dict[str, Any]) -> Any:
        """Of a good request; None for one that needs none."""
        said = {"model": BASE, "max_tokens": 3}
        config, weights = self._adapter.upload["config"][1], self._adapter.upload["weights"][1]
        policy = {"device": {"policy": "lru"}}
        bodies: dict[str, Any] = {
            "POST /v1/files": {"file": b"x", "purpose": "user_data"},
            "POST /v1/uploads": {"bytes": 3, "filename": "a", "mime_type": "text/plain", "purpose": "user_data"},
            "POST /v1/uploads/{upload_id}/parts": {"data": b"abc"},
            "POST /v1/uploads/{upload_id}/complete": {"part_ids": needed.get("part_ids")},
            "POST /v1/fine_tuning/jobs": {"model": BASE, "training_file": needed["training_file"]},
            "POST /v1/chat/completions": {**said, "messages": [{"role": "user", "content": "Hello"}]},
            "POST /v1/completions": {**said, "prompt": "Once", "echo": True, "logprobs": 2},
            "POST /v1/adapters": {"name": "imported", "config": config, "weights": weights},
            "PATCH /admin/tiers": {"disk_bytes": 2**30},
            "PUT /admin/policy": policy,
            "PATCH /admin/policy": policy,
            "POST /admin/keys": {"owner": self._bystander},
            "PATCH /admin/quotas/{owner}": {"jobs": 5},
        }
        if operation.endswith("/split") and operation.startswith("PUT"):
            return {"percent": {"1": 50, "2": 50}}
        return bodies.get(operation)

    def _made_for(self, operation: str) -> dict[str, Any]:
        """What the operation uses up."""
        match operation.split("/v1")[-1]:
            case "/uploads/{upload_id}/parts" | "/uploads/{upload_id}/complete" | "/uploads/{upload_id}/cancel":
                return self._upload()
            case "/fine_tuning/jobs/{job_id}/cancel" | "/fine_tuning/jobs/{job_id}/pause":
                return {"job_id": self._long_job()}
            case "/fine_tuning/jobs/{job_id}/resume":
                job = self._long_job()
                self.user.openai.fine_tuning.jobs.pause(job)
                return {"job_id": job}
        if operation.endswith("/rollback"):
            for version in ("1", "2"):
                path = f"/admin/adapters/{self._lasting['adapter_id']}/versions/{version}/promote"
                self.admin.http.post(path).raise_for_status()
        match operation:
            case "DELETE /v1/files/{file_id}":
                return {"file_id": self.user.upload(b"x")}
            case "DELETE /v1/models/{name}":
                return {"name": self._import("passing")["versions"][0]["model"]}
            case "DELETE /v1/adapters/{adapter_id}" | "DELETE /admin/adapters/{adapter_id}":
                return {"adapter_id": self._import("passing")["id"]}
            case "POST /admin/keys/{key_id}/rotate" | "DELETE /admin/keys/{key_id}":
                body = {"owner": self._bystander}
                return {"key_id": self.admin.http.post("/admin/keys", json=body).raise_for_status().json()["id"]}
            case "DELETE /admin/users/{owner}":
                return {"owner": self._server.user(owner=f"passing-{next(self._number)}").owner}
        return {}

    def _upload(self) -> dict[str, Any]:
        for pending in self._pending():  # an owner may have few
            self.user.openai.uploads.cancel(pending)
        api = self.user.openai.uploads
        upload = api.create(bytes=3, filename="a", mime_type="text/plain", purpose="user_data")
        return {"upload_id": upload.id, "part_ids": [api.parts.create(upload.id, data=b"abc").id]}

    def _pending(self) -> Iterator[str]:
        for upload, _ in self._server.hub.uploads.pending(self.user.owner):
            yield upload.id

    def _long_job(self) -> str:
        """One that does not end by itself while it is spoken of; those before it are over."""
        for job in self.user.openai.fine_tuning.jobs.list(limit=100):
            if job.status not in ("succeeded", "failed", "cancelled"):
                self.user.openai.fine_tuning.jobs.cancel(job.id)
        hyperparameters = {"n_epochs": 50, "max_steps": 100_000}
        return self.user.openai.fine_tuning.jobs.create(
            model=BASE,
            training_file=self._lasting["training_file"],
            suffix=f"long-{next(self._number)}",
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
        ).id

    def _import(self, name: str) -> dict[str, Any]:
        return self.user.import_adapter(self._adapter, name)


def soak_openapi(options: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        base = save_base(Path(directory) / BASE)
        adapter = PeftFiles(AutoModelForCausalLM.from_pretrained(base), Path(directory) / "peft")
        config = small_config(base, Path(directory) / "data", max_waiting=64)
        with running(config) as server:
            document = create_app(Config(data_dir=Path(directory) / "none"), server.hub.base).openapi()
            doors = Doors(server, document, adapter, options.examples, options.seed)
            doors.run()
            counts = ", ".join(f"{n} of {status}" for status, n in sorted(doors.counts.items()))
            print(f"{sum(doors.counts.values())} requests: {counts}")
            return doors.faults
