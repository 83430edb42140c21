"""What the JSON bodies of requests have in common, and those that make something. Reading one holds everybody up, and
so does telling of each error in it: lists and objects have bounds that are looked at before what is in them is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Header
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import core_schema

_MOST_FIELDS = 64  # known or not


@dataclass(frozen=True)
class AtMost:
    """Of a list, set or dict: how many entries it may have. The first entry of a list that is wrong is told of, and no
    other."""

    most: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        schema: Any = {**handler(source), "max_length": self.most}
        if schema["type"] != "dict":
            schema["fail_fast"] = True
        return core_schema.no_info_before_validator_function(self._check, schema)

    def _check(self, value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > self.most:
            raise ValueError(f"it has {len(value)} entries; up to {self.most} are supported")
        return value


# of a request that makes something: with the same one it makes it once
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]


class Body(BaseModel):
    """A body whose texts can be stored, tokenized and sent back: JSON can write half of a surrogate pair, which is no
    character. Unknown fields are ignored."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        if isinstance(data, bytes):
            raise ValueError("it is not JSON; send it with Content-Type: application/json")
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise ValueError(f"it cannot be read as text ({error})") from error
        return data


class Strict(BaseModel):
    """A body in which a field that nobody knows is an error: it would not do what its author meant."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > _MOST_FIELDS:
            raise ValueError(f"it has {len(data)} fields; there are {', '.join(cls.model_fields)}")
        return data
