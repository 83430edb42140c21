"""`tools` and `tool_choice`: which functions may be called, and the grammar of an answer that may or must call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from adapterhub.api.body import AtMost
from adapterhub.api.structured import ANSWER, MAX_PROPERTIES, Name, Schema, schema_part
from adapterhub.base.grammar import INVALID, Part
from adapterhub.base.tools import BEGIN, END, Tool, call_head
from adapterhub.errors import BadRequest

MAX_TOOLS = 128
MAX_CALLS = 32  # in one answer


class Function(BaseModel):
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class FunctionTool(BaseModel):
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    name: Name


class NamedTool(BaseModel):
    type: Literal["function"]
    function: NamedFunction


class Allowed(BaseModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1), AtMost(MAX_TOOLS)]


class AllowedTools(BaseModel):
    type: Literal["allowed_tools"]
    allowed_tools: Allowed


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class Toolbox:
    """The tools that one answer may call. `told`: all of them, as OpenAI writes them, for the chat template."""

    def __init__(self, tools: Sequence[FunctionTool], choice: Choice | None, parallel: bool | None) -> None:
        """Raises BadRequest when the choice names a tool that is not there, or a tool's schema is over a limit."""
        known = {tool.function.name: tool.function for tool in tools}
        if len(known) < len(tools):
            raise BadRequest("tools: two functions have the same name.", param="tools")
        wanted, forced, several = list(known), choice == "required", parallel is not False
        if isinstance(choice, NamedTool):
            wanted, forced, several = [choice.function.name], True, False
        elif isinstance(choice, AllowedTools):
            wanted = [tool.function.name for tool in choice.allowed_tools.tools]
            forced = choice.allowed_tools.mode == "required"
        elif choice == "none":
            wanted = []
        for name in wanted:
            if name not in known:
                raise BadRequest(f"tool_choice names {name!r}, which is not one of the tools.", param="tool_choice")
        if forced and not wanted:
            raise BadRequest("tool_choice asks for a call, and there are no tools.", param="tool_choice")
        self.forced = forced
        self._most = MAX_CALLS if several else 1
        self._callable = list(dict.fromkeys(wanted))
        self._parameters = [_parameters(tools, name, at) for at, name in enumerate(self._callable)]
        if sum(len(part["json_schema"].get("properties", ())) for part in self._parameters) > MAX_PROPERTIES:
            raise BadRequest(f"tools: they have more than {MAX_PROPERTIES} parameters.", param="tools", code=INVALID)
        self.told: list[Tool] = [t.model_dump(exclude_none=True) for t in tools] if self._callable else []

    @property
    def any(self) -> bool:
        return bool(self._callable)

    def grammar(self, answer: Part | None) -> list[Part]:
        """Of an answer in text, or as `answer` has it, or with calls; of calls alone where they are forced."""
        calls = f'call ("\\n"? "{BEGIN}" call){{0,{self._most - 1}}}' if self._most > 1 else "call"
        rules = [f"calls: {calls}"]
        if self.forced:
            rules.append(f'start: "{BEGIN}" calls')
        elif answer is not None:
            rules.append(f'start: @{ANSWER} | "{BEGIN}" calls')
        else:
            rules += ["start: TEXT | head calls", f'head[lazy]: TEXT "{BEGIN}"', "TEXT: /(.|\\n)*/"]
        heads = [f"{_literal(call_head(name))} @parameters{at}" for at, name in enumerate(self._callable)]
        rules.append(f'call: "\\n"? ({" | ".join(heads)}) "}}" "\\n"? "{END}"')
        asked = [answer] if answer is not None and not self.forced else []
        return [{"lark_grammar": "\n".join(rules)}, *asked, *self._parameters]


def _parameters(tools: Sequence[FunctionTool], name: str, at: int) -> Part:
    where, function = next((i, t.function) for i, t in enumerate(tools) if t.function.name == name)
    param = f"tools.{where}.function.parameters"
    schema: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    if function.parameters:
        schema = {"type": "object", **function.parameters}
    if schema["type"] != "object":
        message = f"Invalid schema for function {name!r}: its type must be 'object', not {str(schema['type'])[:40]!r}."
        raise BadRequest(message, param=param, code=INVALID)
    return schema_part(f"parameters{at}", schema, bool(function.strict), f"function {name!r}", param)


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
