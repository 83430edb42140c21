"""Lines of a training file to checked records: OpenAI's chat and preference (DPO) forms, and prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from adapterhub.base.text import Message
from adapterhub.errors import InvalidTrainingFile
from adapterhub.train.dataset import Kind

MAX_LINE_BYTES = 4 * 1024**2
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_PAIR = ("input", "preferred_output", "non_preferred_output")


class Source:
    """A file of records: which parameter of the job named it, and how its errors are told."""

    def __init__(self, path: Path, param: str) -> None:
        """`param`: "training_file" or "validation_file"."""
        self.path = path
        self.param = param
        self.noun = param.replace("_", " ")

    def invalid(self, message: str, code: str | None = None) -> InvalidTrainingFile:
        return InvalidTrainingFile(message, param=self.param, code=code or f"invalid_{self.param}")


@dataclass(frozen=True)
class Line:
    source: Source
    number: int  # from 1; blank lines count

    def refuse(self, reason: str) -> NoReturn:
        raise self.source.invalid(f"Line {self.number} of the {self.source.noun} cannot be used: {reason}.")


@dataclass(frozen=True)
class Chat:
    line: Line
    messages: list[Message]  # role and content alone
    learned: list[bool]  # which of them: assistant messages whose weight is not 0


@dataclass(frozen=True)
class Completion:
    line: Line
    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """Two replies of the assistant to the same conversation."""

    line: Line
    messages: list[Message]
    preferred: Message
    non_preferred: Message


Record = Chat | Completion | Pair


def read_records(source: Source, kind: Kind) -> Iterator[Record]:
    """One for each line that is not blank. Raises InvalidTrainingFile, with the line and the reason."""
    for line, text in _lines(source):
        parsed = _parse(line, text)
        if kind is Kind.DPO:
            yield _pair(parsed, line)
        elif "messages" in parsed:
            messages, learned = _messages(parsed["messages"], "messages", line)
            _refuse_tools(parsed, "it", line)
            if not any(learned):
                line.refuse("no assistant message is left to learn from")
            yield Chat(line, messages, learned)
        elif "prompt" in parsed and "completion" in parsed:
            yield _completion(parsed, line)
        elif any(key in parsed for key in _PAIR):
            line.refuse(
                "it is a preference, which a supervised job cannot learn from; create the job with "
                '"method": {"type": "dpo"}'
            )
        else:
            line.refuse("it has neither 'messages' nor 'prompt' and 'completion'")


def _lines(source: Source) -> Iterator[tuple[Line, bytes]]:
    with source.path.open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            line = Line(source, number)
            if len(text) > MAX_LINE_BYTES:
                line.refuse(f"it is longer than {MAX_LINE_BYTES} bytes")
            if number == 1:
                text = text.removeprefix(b"\xef\xbb\xbf")
            if text.strip():
                yield line, text


def _parse(line: Line, text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text.decode())
        if b"\\u" in text:  # with which JSON can write half of a surrogate pair, which is no text
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        line.refuse(f"it is not UTF-8 text ({error.reason} at byte {error.start})")
    except UnicodeEncodeError as error:
        line.refuse(f"a text in it is none ({error.reason})")
    except (ValueError, RecursionError) as error:
        line.refuse(f"it is not JSON ({error})")
    if not isinstance(parsed, dict):
        line.refuse(f"it is a JSON {type(parsed).__name__}, not an object")
    return parsed


def _messages(messages: Any, where: str, line: Line) -> tuple[list[Message], list[bool]]:
    if not isinstance(messages, list) or not messages:
        line.refuse(f"'{where}' must be a list with at least one message")
    checked = [_message(message, f"{where}[{at}]", line) for at, message in enumerate(messages)]
    return [message for message, _ in checked], [learned for _, learned in checked]


def _message(message: Any, where: str, line: Line) -> tuple[Message, bool]:
    """The message as a template takes it, and whether it is learned."""
    if not isinstance(message, dict):
        line.refuse(f"{where} is not an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        line.refuse(f"{where} has the role {repr(role)[:80]}; use one of {', '.join(sorted(_ROLES))}")
    _refuse_tools(message, where, line)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    elif not isinstance(content, str):
        line.refuse(f"{where} needs a text as 'content'")
    weight = 1 if message.get("weight") is None else message["weight"]
    if weight not in (0, 1) or (weight == 0 and role != "assistant"):
        line.refuse(f"{where} has the weight {repr(weight)[:80]}; assistant messages can have 0 or 1")
    return {"role": role, "content": content}, role == "assistant" and weight == 1


def _refuse_tools(record: dict[str, Any], where: str, line: Line) -> None:
    for key in ("tools", "functions", "tool_calls", "function_call"):
        if record.get(key):
            line.refuse(f"{where} has {key!r}, which cannot be learned yet")


def _completion(record: dict[str, Any], line: Line) -> Completion:
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        line.refuse("'prompt' and 'completion' must be texts, and the completion not empty")
    return Completion(line, prompt, completion)


def _pair(record: dict[str, Any], line: Line) -> Pair:
    if missing := [key for key in _PAIR if key not in record]:
        hint = ""
        if "messages" in record or "completion" in record:
            hint = '; to learn from what the assistant says, create the job with "method": {"type": "supervised"}'
        line.refuse(f"a preference needs {', '.join(map(repr, _PAIR))}, and it has no {missing[0]!r}{hint}")
    asked = record["input"]
    if not isinstance(asked, dict):
        line.refuse("'input' must be an object with 'messages'")
    _refuse_tools(record, "it", line)
    _refuse_tools(asked, "'input'", line)
    messages, _ = _messages(asked.get("messages"), "input.messages", line)
    return Pair(line, messages, _reply(record, _PAIR[1], line), _reply(record, _PAIR[2], line))


def _reply(record: dict[str, Any], key: str, line: Line) -> Message:
    messages, learned = _messages(record[key], key, line)
    if len(messages) != 1 or not learned[0]:
        line.refuse(f"'{key}' must be one assistant message, whose weight is not 0")
    return messages[0]
