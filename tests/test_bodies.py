"""Bodies that are wrong in very many places: what is told of them is bounded, and so is who waits meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.params import Form
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, TypeAdapter, ValidationError

from adapterhub.api.reference import application

WIDE = 2500
ERRORS = (
    2100  # a telling of each takes about 20 microseconds; logit_bias has room for 1024, each with a key and a value
)
Schema = dict[str, Any]


def bodies() -> dict[str, Any]:
    """The types of all JSON bodies, by the route that takes them; where any will do, it is looked at by hand."""
    found = {}
    for route in iter_route_contexts(application().routes):
        for field in getattr(getattr(route, "dependant", None), "body_params", ()):
            if (kind := field.field_info.annotation) is not Any and not isinstance(field.field_info, Form):
                found[f"{route.path} {field.name}"] = kind
    return found


BODIES = bodies()


def wide(schema: Schema, defs: dict[str, Schema], above: tuple[str, ...] = ()) -> Iterator[Any]:
    """Values in which whatever may hold several things, at any depth, holds very many wrong ones."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name not in above:
            yield from wide(defs[name], defs, (*above, name))
        return
    for option in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from wide(option, defs, above)
    if schema.get("type") == "array":
        yield from ([wrong] * WIDE for wrong in (1.5, None, {}, [], [[]]))
    if schema.get("type") == "object":
        yield {f"x{i}": [] for i in range(WIDE)}
    for inner in wide(schema["items"], defs, above) if "items" in schema else ():
        yield [inner] * 3
    for name, below in schema.get("properties", {}).items():
        for inner in wide(below, defs, above):
            yield {name: inner}


def errors(adapter: TypeAdapter[Any], value: Any) -> int:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("name", BODIES)
def test_of_a_body_that_is_wrong_in_many_places_few_errors_are_made(name: str) -> None:
    adapter = TypeAdapter(BODIES[name])
    schema = adapter.json_schema()
    found = [errors(adapter, value) for value in wide(schema, schema.get("$defs", {}))]
    assert 0 < max(found) <= ERRORS


def test_all_bodies_are_looked_at() -> None:
    models = [kind for kind in BODIES.values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    assert {"ChatRequest", "CompletionRequest", "JobRequest", "SplitBody"} <= {model.__name__ for model in models}
