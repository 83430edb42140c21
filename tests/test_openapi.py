"""Requests made up from the OpenAPI document: a short run of `scripts/soak openapi`, which notices what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from soak_openapi import Doors

from adapterhub.api.answers import ANSWERS
from adapterhub.api.app import create_app
from adapterhub.config import Config
from tests.serving import PeftFiles, Server

EXAMPLES = 4  # of each operation


@pytest.fixture
def doors(server: Server, adapter: PeftFiles, tmp_path: Path) -> Any:
    """Makes them of the document, as a function changes it."""

    def made(change: Any = lambda document: None) -> Doors:
        document = create_app(Config(data_dir=tmp_path), server.hub.base).openapi()
        change(document)
        return Doors(server, document, adapter, EXAMPLES, 0)

    return made


def test_no_made_up_request_meets_a_servers_error_or_an_answer_that_is_not_documented(doors: Any) -> None:
    made = doors()
    made.run()
    assert made.faults == [], "each has answered well, too"


def only_models(document: dict[str, Any]) -> dict[str, Any]:
    document["paths"] = {"/v1/models": document["paths"]["/v1/models"]}
    return document["paths"]["/v1/models"]["get"]["responses"]


def test_an_answer_out_of_its_schema_does_not_go_unnoticed(doors: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        only_models(document)["200"]["content"]["application/json"]["schema"] = {"type": "array"}

    made = doors(change)
    made.run()
    assert made.faults
    assert all("GET /v1/models" in fault for fault in made.faults)


def test_a_field_that_is_not_documented_does_not_go_unnoticed(doors: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        only_models(document)
        model = document["components"]["schemas"]["ModelObject"]
        del model["properties"]["owned_by"]
        model["required"].remove("owned_by")

    made = doors(change)
    made.run()
    assert any("owned_by" in fault for fault in made.faults)


def test_an_operation_that_does_not_do_what_it_is_for_does_not_go_unnoticed(doors: Any) -> None:
    made = doors(only_models)
    made.things.user.key = "sk-ah-nobody"
    made.run()
    assert any("asked well, it answers 401" in fault for fault in made.faults)


def test_a_status_that_is_not_documented_does_not_go_unnoticed(doors: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        answers = only_models(document)
        answers["201"] = answers.pop("200")
        del answers["default"]

    made = doors(change)
    made.run()
    assert made.faults


def test_every_operation_documents_its_answer_and_its_errors_and_needs_a_key(server: Server, tmp_path: Path) -> None:
    document = create_app(Config(data_dir=tmp_path), server.hub.base).openapi()
    assert document["security"] == [{"key": []}]
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert ANSWERS.keys() <= described
    for methods in document["paths"].values():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            [good] = (answer for status, answer in operation["responses"].items() if status.startswith("2"))
            for kind, content in good["content"].items():
                plain = kind != "application/json" and content["schema"] == {"type": "string"}
                assert plain or content["schema"].keys() & {"$ref", "anyOf"}, "anything at all is no answer"
            assert operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
