"""Writes the table of endpoints, `docs/endpoints.md`, from the code: `python -m adapterhub.api.reference`.

What there is comes from the application's OpenAPI document, what OpenAI's clients may send besides from the types of
its Python SDK, and what becomes of that from `compatibility.py`, which tests try on a server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

import adapterhub
from adapterhub.api.app import create_app
from adapterhub.api.auth import Needs
from adapterhub.api.compatibility import BESIDES, IGNORED, REFUSED, Endpoint, unsaid
from adapterhub.base.model import Base
from adapterhub.config import Config, default_data_dir

OUT = Path(adapterhub.__file__).parent.parent / "docs" / "endpoints.md"
_ANY = 2.0**53  # a bound as far out as that is none
_INTRODUCTION = """\
# Endpoints

Written from the code by `python -m adapterhub.api.reference`. [api.md](api.md) says what it all means.

Of each field that a client may send: **supported**; **refused** with 400 and the error's `code`, so that nobody waits
for what will not come; or **ignored**: OpenAI's SDK has a field of that name, and that it has no effect here does no
harm, for the reason given. What is said of a field holds for all within it. A field that neither knows is ignored, but
where it says that unknown fields are refused; null is as if a field were left out. A supported field with a wrong
value is refused with 400 `invalid_value`, and the error's `param` names it. The headers `OpenAI-Organization` and
`OpenAI-Project` are ignored: a key belongs to one owner and one project. Whatever is not listed here, such as
`/v1/embeddings`, answers 404 `unknown_url`.
"""


def reference(app: FastAPI) -> str:
    """The whole file."""
    document = app.openapi()
    sections = [_section(endpoint, operation, document) for endpoint, operation in endpoints(app)]
    return "\n".join([_INTRODUCTION, *sections])


def endpoints(app: FastAPI) -> Iterator[tuple[Endpoint, dict[str, Any]]]:
    """Each with its scopes, under `x-scopes`."""
    scopes = _scopes(app)
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            endpoint = (method.upper(), path)
            yield endpoint, {**operation, "x-scopes": scopes.get(endpoint, ())}


def _scopes(app: FastAPI) -> dict[Endpoint, tuple[str, ...]]:
    found: dict[Endpoint, tuple[str, ...]] = {}
    for route in iter_route_contexts(app.routes):
        for need in _needs(getattr(route, "dependant", None)):
            for method in route.methods or ():
                found[method, re.sub(r":path}", "}", str(route.path))] = need.scopes
    return found


def _needs(dependant: Any) -> Iterator[Needs]:
    if dependant is not None:
        if isinstance(dependant.call, Needs):
            yield dependant.call
        for below in dependant.dependencies:
            yield from _needs(below)


def _section(endpoint: Endpoint, operation: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    lines = [f"## `{' '.join(endpoint)}`\n"]
    if said := operation.get("description"):
        lines.append(" ".join(said.split()) + "\n")
    scopes, closed = operation["x-scopes"], False
    needs = (
        f"Needs a key with the scope {' or '.join(f'`{scope}`' for scope in scopes)}." if scopes else "Needs no key."
    )
    found: dict[str, list[str]] = {}
    for field in _fields(operation, document):
        found.setdefault(field.name, []).append(field.about)
        closed = closed or field.closed
    refused, ignored, besides = REFUSED.get(endpoint, {}), IGNORED.get(endpoint, {}), BESIDES.get(endpoint, {})
    if missing := unsaid(endpoint, found):
        raise LookupError(f"say in compatibility.py what becomes of {', '.join(missing)} of {' '.join(endpoint)}")
    if closed:
        needs += " Unknown fields are refused."
    lines.append(needs + "\n")
    rows = []
    for name in [*found, *sorted((refused.keys() | ignored.keys() | besides.keys()) - found.keys())]:
        if (refusal := refused.get(name)) is not None:
            unless = f", unless it is `{refusal.unless}`" if refusal.unless else ""
            rows.append(f"| `{name}` | refused: `{refusal.code}`{unless} | |")
        elif name in ignored:
            rows.append(f"| `{name}` | ignored | {ignored[name]} |")
        else:
            rows.append(f"| `{name}` | supported | {besides.get(name) or _either(found[name])} |")
    if rows:
        lines += ["| Field | | |", "| --- | --- | --- |", *rows]
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True)
class _Field:
    """`closed`: those beside it that nobody knows are refused."""

    name: str
    about: str
    closed: bool = False


def _fields(operation: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[_Field]:
    for parameter in operation.get("parameters", ()):
        required = ", required" if parameter["required"] and parameter["in"] != "path" else ""
        yield _Field(parameter["name"], f"{parameter['in']}{required}: {_type(parameter['schema'], document)}")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        where = "form" if kind.startswith("multipart/") else "body"
        yield from _below("", where, content["schema"], document, ())


def _below(
    prefix: str, where: str, schema: Mapping[str, Any], document: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[_Field]:
    """The fields of an object and, after each, those of objects within it."""
    for option in _options(schema, document):
        closed = option.get("additionalProperties") is False and "properties" in option
        for name, inner in option.get("properties", {}).items():
            required = ", required" if name in option.get("required", ()) else ""
            yield _Field(f"{prefix}{name}", f"{where}{required}: {_type(inner, document)}", closed)
            if option.get("title") not in above:
                title = str(option.get("title"))
                yield from _below(f"{prefix}{name}.", where, inner, document, (*above, title))


def _options(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a value may be, references and lists followed; no null."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield from _options(document["components"]["schemas"][name], document)
    elif "anyOf" in schema or "oneOf" in schema:
        for option in schema.get("anyOf") or schema["oneOf"]:
            yield from _options(option, document)
    elif schema.get("type") == "array":
        yield from _options(schema.get("items", {}), document)
    elif schema.get("type") != "null":
        yield schema


def _type(schema: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _type(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        kinds = [_type(option, document) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return _listed(schema["enum"])
    if "const" in schema:
        return _listed([schema["const"]])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), document)}{_limits(schema)}"
    kind = (
        "file" if "contentMediaType" in schema or schema.get("format") == "binary" else schema.get("type", "anything")
    )
    return f"{kind}{_limits(schema)}"


def _limits(schema: Mapping[str, Any]) -> str:
    for least, most, what in (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " items"),
        ("minProperties", "maxProperties", " fields"),
    ):
        low, high = (_plain(schema.get(name)) for name in (least, most))
        if low and high:
            return f", {low} to {high}{what}"
        if low or high:
            return f", at {'least' if low else 'most'} {low or high}{what}"
    return ""


def _plain(bound: float | None) -> str | None:
    if bound is None or abs(bound) >= _ANY:
        return None
    return str(int(bound)) if bound == int(bound) else str(bound)


def _either(abouts: list[str]) -> str:
    """What is said of a field that objects of several kinds have: where it is, once, and each of what it may be."""
    where, _, kind = abouts[0].partition(": ")
    kinds = dict.fromkeys([kind, *(about.partition(": ")[2] for about in abouts[1:])])
    return f"{where}: {' or '.join(kinds)}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def application() -> FastAPI:
    """Of no base: one is used only once the application starts."""
    return create_app(Config(data_dir=default_data_dir()), cast(Base, None))


if __name__ == "__main__":
    OUT.write_text(reference(application()))
