"""Reads an answer that may call tools, as it comes: what is said, and which functions are called with what.

The grammar has seen to it that whatever follows `<tool_call>` is a call, so nothing here can fail to understand it.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from adapterhub.base.tools import BEGIN, END, call_head

_HEAD = re.compile(re.escape(call_head("NAME")).replace("NAME", "([a-zA-Z0-9_-]+)"))


class _State(Enum):
    TEXT = auto()
    HEAD = auto()  # after <tool_call>
    ARGUMENTS = auto()
    TAIL = auto()  # after the arguments
    BETWEEN = auto()  # after </tool_call>


@dataclass
class Told:
    """What is new: `calls` as a stream's delta has them, at most one for each call."""

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class CallReader:
    """Takes the text of one answer in pieces. A call is told of when its name is there, its arguments as they come."""

    def __init__(self, json_answer: bool = False) -> None:
        """`json_answer`: what is not a call is JSON, which may quote `<tool_call>` but never begins with it."""
        self._state, self._text = _State.TEXT, ""
        self._json, self._begun = json_answer, False
        self._calls = 0
        self._depth, self._in_string, self._escaped = 0, False, False

    @property
    def called(self) -> bool:
        """It has called, and its last call is whole."""
        return self._calls > 0 and self._state in (_State.TAIL, _State.BETWEEN)

    def push(self, text: str, *, last: bool = False) -> Told:
        self._text += text
        told = Told()
        while self._step(told, last):
            pass
        return told

    def _step(self, told: Told, last: bool) -> bool:
        """Goes on to the next state, if what makes it so is there."""
        match self._state:
            case _State.TEXT:
                return self._read_text(told, last)
            case _State.HEAD:
                if (head := _HEAD.search(self._text)) is None:
                    return False
                self._text = self._text[head.end() :]
                identity = f"call_{secrets.token_hex(12)}"
                function = {"name": head[1], "arguments": ""}
                told.calls.append({"index": self._calls, "id": identity, "type": "function", "function": function})
                self._calls += 1
                self._state = _State.ARGUMENTS
            case _State.ARGUMENTS:
                arguments, ended = self._read_arguments()
                self._tell_arguments(told, arguments)
                if not ended:
                    return False
                self._state = _State.TAIL
            case _State.TAIL | _State.BETWEEN:
                mark, state = (END, _State.BETWEEN) if self._state is _State.TAIL else (BEGIN, _State.HEAD)
                _, found, after = self._text.partition(mark)
                if not found:
                    return False
                self._text, self._state = after, state
        return True

    def _read_text(self, told: Told, last: bool) -> bool:
        if self._json and not BEGIN.startswith(self._text[: len(BEGIN)]):
            self._json, self._begun = False, True
        if not self._begun and BEGIN in self._text:
            before, _, self._text = self._text.partition(BEGIN)
            told.content += before.rstrip()
            self._state = _State.HEAD
            return True
        end = len(self._text) if last or self._begun else self._sure()
        told.content += self._text[:end]
        self._text = self._text[end:]
        return False

    def _sure(self) -> int:
        """How much of the text is no beginning of a call, nor blanks before one."""
        held = next((n for n in range(len(BEGIN), 0, -1) if self._text.endswith(BEGIN[:n])), 0)
        return len(self._text[: len(self._text) - held].rstrip())

    def _read_arguments(self) -> tuple[str, bool]:
        """As much of the arguments as there is, taken off the text, and whether their last brace is in it."""
        for at, letter in enumerate(self._text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    arguments, self._text = self._text[: at + 1], self._text[at + 1 :]
                    return arguments, True
        arguments, self._text = self._text, ""
        return arguments, False

    def _tell_arguments(self, told: Told, arguments: str) -> None:
        if not arguments:
            return
        if told.calls and told.calls[-1]["index"] == self._calls - 1:
            told.calls[-1]["function"]["arguments"] += arguments
        else:
            told.calls.append({"index": self._calls - 1, "function": {"arguments": arguments}})
