"""The OpenAPI document, with what FastAPI cannot know: the shape of errors, keys, and answers that are no JSON."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

# path and method -> what a 200 may also be
_OTHERS = {
    ("/v1/chat/completions", "post"): "text/event-stream",
    ("/v1/completions", "post"): "text/event-stream",
    ("/v1/files/{file_id}/content", "get"): "application/octet-stream",
    ("/v1/adapters/{adapter_id}/download", "get"): "application/zip",
    ("/admin/adapters/{adapter_id}/download", "get"): "application/zip",
    ("/v1/export", "get"): "application/zip",
    ("/admin/users/{owner}/export", "get"): "application/zip",
    ("/v1/usage", "get"): "text/csv; charset=utf-8",
    ("/admin/usage", "get"): "text/csv; charset=utf-8",
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
    """For `app.openapi`; made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["Error"] = _ERROR
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
        for path, methods in made["paths"].items():
            for method, operation in methods.items():
                answers = operation["responses"]
                answers.pop("422", None)  # what FastAPI would answer itself
                answers["default"] = {
                    "description": "An error",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
                if (other := _OTHERS.get((path, method))) is not None:
                    answers["200"].setdefault("content", {})[other] = {"schema": {"type": "string"}}
        app.openapi_schema = made
    return app.openapi_schema
