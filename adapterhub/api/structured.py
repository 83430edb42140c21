"""`response_format`: what an answer must look like, checked, and compiled to a grammar in bounded time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from adapterhub.api.hub import Hub
from adapterhub.base.grammar import INVALID, Grammar, Part
from adapterhub.errors import BadRequest, TooManyRequests

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$", min_length=1, max_length=64)]
Schema = dict[str, Any]
ANSWER = "answer"  # the grammar's name for it
MAX_SCHEMA_BYTES = 128 * 1024
MAX_DEPTH = 64  # of the JSON that a schema is written in
MAX_PROPERTIES = 1000
MAX_ALTERNATIVES = 5000  # members of enum, anyOf, oneOf and allOf
MAX_TEXT = 2000  # characters of a property's name, a pattern, and a text in const or enum
COMPILE_SECONDS = 10.0
# one line, so that no answer can go on with blanks for ever
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class JsonSchema(BaseModel):
    name: Name
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __str__(self) -> str:
        return "response_format" if self.json_schema is None else f"response_format {self.json_schema.name!r}"

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the type json_schema needs a json_schema")
        return self


def answer_part(form: ResponseFormat | None) -> Part | None:
    """The grammar of an answer in this form; None for any text. Raises BadRequest for a schema over a limit."""
    if form is None or form.type == "text":
        return None
    if form.json_schema is None or form.json_schema.schema_ is None:
        return {"name": ANSWER, "json_schema": {"type": "object", "x-guidance": _LAYOUT}}
    return schema_part(ANSWER, form.json_schema.schema_, bool(form.json_schema.strict), str(form), "response_format")


def schema_part(name: str, schema: Schema, strict: bool, what: str, param: str) -> Part:
    """The grammar of JSON that fits `schema`. Not strict: what of the schema cannot be followed is left out.

    Raises BadRequest, which says `what` has it and names `param`, when the schema is over a limit.
    """
    try:
        _check(schema)
    except ValueError as error:
        raise BadRequest(f"Invalid schema for {what}: {error}", param=param, code=INVALID) from error
    layout = {**_LAYOUT, "lenient": not strict}
    return {"name": name, "json_schema": {**schema, "x-guidance": layout}}


async def compiled(hub: Hub, owner: str, parts: Sequence[Part], what: str, param: str) -> Grammar:
    """The grammar of `parts`, made in another thread. Raises BadRequest when it cannot be made, or not in time."""
    made = hub.grammars.compile(owner, parts)
    try:
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(made)), COMPILE_SECONDS)
    except BadRequest as error:
        raise BadRequest(f"Invalid schema for {what}: {error.message}.", param=param, code=error.code) from error
    except TimeoutError:
        if not made.running() and not made.done():
            raise TooManyRequests("Other schemas are being compiled. Try again in a second.") from None
        late = f"it takes longer than {COMPILE_SECONDS:g} seconds to compile. Make it simpler."
        raise BadRequest(f"Invalid schema for {what}: {late}", param=param, code=INVALID) from None


def _check(schema: Schema) -> None:
    """Raises ValueError, which names the limit, for what would take long to compile or to follow."""
    nbytes = len(json.dumps(schema, ensure_ascii=False).encode())
    if nbytes > MAX_SCHEMA_BYTES:
        raise ValueError(f"it has {nbytes} bytes; up to {MAX_SCHEMA_BYTES} are supported.")
    properties = alternatives = 0
    todo: list[tuple[Any, int]] = [(schema, 1)]
    while todo:
        node, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests deeper than the {MAX_DEPTH} levels that are supported.")
        if isinstance(node, dict):
            for key in ("properties", "patternProperties", "$defs", "definitions"):
                properties += len(node[key]) if isinstance(node.get(key), dict) else 0
            for key in ("enum", "anyOf", "oneOf", "allOf"):
                alternatives += len(node[key]) if isinstance(node.get(key), list) else 0
            texts = [*node, *(v for key, v in node.items() if key in ("const", "pattern") and isinstance(v, str))]
            if isinstance(node.get("enum"), list):
                texts += [v for v in node["enum"] if isinstance(v, str)]
            longest = max(map(len, texts), default=0)
            if longest > MAX_TEXT:
                raise ValueError(f"a text in it has {longest} characters; up to {MAX_TEXT} are supported.")
            todo += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, list):
            todo += [(value, depth + 1) for value in node]
    if properties > MAX_PROPERTIES:
        raise ValueError(f"it has {properties} properties; up to {MAX_PROPERTIES} are supported.")
    if alternatives > MAX_ALTERNATIVES:
        raise ValueError(f"it has {alternatives} alternatives; up to {MAX_ALTERNATIVES} are supported.")
