"""The OpenAPI document, with what FastAPI cannot know: the shape of errors, keys, and answers that are no JSON."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from adapterhub.api.answers import ANSWERS

# by method and path, what an answer may also be, or is where `ANSWERS` has none
_OTHERS = {
    ("POST", "/v1/chat/completions"): "text/event-stream",
    ("POST", "/v1/completions"): "text/event-stream",
    ("GET", "/v1/files/{file_id}/content"): "application/octet-stream",
    ("GET", "/v1/adapters/{adapter_id}/download"): "application/zip",
    ("GET", "/admin/adapters/{adapter_id}/download"): "application/zip",
    ("GET", "/v1/export"): "application/zip",
    ("GET", "/admin/users/{owner}/export"): "application/zip",
    ("GET", "/v1/usage"): "text/csv; charset=utf-8",
    ("GET", "/admin/usage"): "text/csv; charset=utf-8",
}
_OPTIONAL_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": _OPTIONAL_TEXT,
                "code": _OPTIONAL_TEXT,
            },
        }
    },
}


def document(app: FastAPI) -> dict[str, Any]:
    """For `app.openapi`; made once. Raises LookupError for what `answers` leaves out, or says under a taken name."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        answers, answered = _answers()
        if clash := [name for name in schemas.keys() & answered.keys() if schemas[name] != answered[name]]:
            raise LookupError(f"give {', '.join(clash)} of answers another name than that of bodies")
        made["components"]["schemas"] = schemas | answered | {"Error": _ERROR}
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
        for path, methods in made["paths"].items():
            for method, operation in methods.items():
                said = _contents((method.upper(), path), answers)
                operation["responses"] = {
                    **{s: {**r, "content": said} for s, r in operation["responses"].items() if s.startswith("2")},
                    "default": {
                        "description": "An error",
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                    },
                }
        app.openapi_schema = made
    return app.openapi_schema


def _contents(operation: tuple[str, str], answers: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """What an operation answers with, by media type."""
    said = {"application/json": {"schema": answers[operation]}} if operation in answers else {}
    if (other := _OTHERS.get(operation)) is not None:
        said[other] = {"schema": {"type": "string"}}
    if not said:
        raise LookupError(f"say in answers.py what {' '.join(operation)} answers with")
    return said


def _answers() -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    """The schemas of `ANSWERS`, and those that they refer to. An object has no fields but those that it is said to."""
    made, shared = TypeAdapter.json_schemas(
        [(operation, "serialization", TypeAdapter(answer)) for operation, answer in ANSWERS.items()],
        ref_template="#/components/schemas/{model}",
    )
    schemas = shared.get("$defs", {})
    for schema in schemas.values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    return {operation: schema for (operation, _), schema in made.items()}, schemas
