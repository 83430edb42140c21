"""Training data: JSONL in OpenAI's chat or prompt/completion form, to tokens with a mask of what to learn.

The loss is on what the assistant says (turns with `"weight": 0` excepted), or on the completion. A conversation is
tokenized in the pieces that serving would meet: a prompt up to where the assistant begins, then what it said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from adapterhub.base.text import Message, TextCodec
from adapterhub.errors import BadRequest, InvalidTrainingFile

MIN_EXAMPLES = 10
MAX_LINE_BYTES = 4 * 1024**2
_ROLES = {"system", "developer", "user", "assistant", "tool"}


@dataclass(frozen=True)
class Example:
    """`learned[i]` says whether token i is one that the model should learn to say."""

    tokens: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class DataSet:
    examples: list[Example]
    cut: int  # examples that were longer than the context
    dropped: int  # examples of which the cut left nothing to learn

    @property
    def tokens(self) -> int:
        return sum(len(e.tokens) for e in self.examples)


def read_data_set(path: Path, codec: TextCodec, context: int, on_line: Callable[[], None] = lambda: None) -> DataSet:
    """Reads and tokenizes a training file. Raises InvalidTrainingFile, with the line and the reason.

    That takes about a second for each MB; what `on_line` raises ends it early.
    """
    examples, lines, cut, dropped = [], 0, 0, 0
    for number, line in _lines(path):
        on_line()
        lines += 1
        for example in _examples(_parse(number, line), number, codec):
            if len(example.tokens) > context:
                cut += 1
                example = Example(example.tokens[:context], example.learned[:context])
            if any(example.learned[1:]):
                examples.append(example)
            else:
                dropped += 1
    if lines < MIN_EXAMPLES:
        raise InvalidTrainingFile(
            f"Training file has {lines} example(s), but must have at least {MIN_EXAMPLES} examples",
            param="training_file",
            code="invalid_n_examples",
        )
    if not examples:
        raise InvalidTrainingFile("No example has anything left to learn within the context.", param="training_file")
    return DataSet(examples, cut, dropped)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > MAX_LINE_BYTES:
                _refuse(number, f"it is longer than {MAX_LINE_BYTES} bytes")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def _parse(number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line.decode())
        json.dumps(parsed, ensure_ascii=False).encode()  # JSON can write half of a surrogate pair, which is no text
    except UnicodeDecodeError as error:
        _refuse(number, f"it is not UTF-8 text ({error.reason} at byte {error.start})")
    except UnicodeEncodeError as error:
        _refuse(number, f"a text in it is none ({error.reason})")
    except (ValueError, RecursionError) as error:
        _refuse(number, f"it is not JSON ({error})")
    if not isinstance(parsed, dict):
        _refuse(number, f"it is a JSON {type(parsed).__name__}, not an object")
    return parsed


def _examples(record: dict[str, Any], number: int, codec: TextCodec) -> Iterator[Example]:
    if "messages" in record:
        yield from _chat(_messages(record, number), number, codec)
    elif "prompt" in record and "completion" in record:
        yield _completion(record, number, codec)
    else:
        _refuse(number, "it has neither 'messages' nor 'prompt' and 'completion'")


def _messages(record: dict[str, Any], number: int) -> list[Message]:
    messages = record["messages"]
    _refuse_tools(record, "it", number)
    if not isinstance(messages, list) or not messages:
        _refuse(number, "'messages' must be a list with at least one message")
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, dict):
            _refuse(number, f"{where} is not an object")
        if not isinstance(message.get("role"), str) or message["role"] not in _ROLES:
            role = repr(message.get("role"))[:80]
            _refuse(number, f"{where} has the role {role}; use one of {', '.join(sorted(_ROLES))}")
        _refuse_tools(message, where, number)
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            message["content"] = "".join(part["text"] for part in content)
        elif not isinstance(content, str):
            _refuse(number, f"{where} needs a text as 'content'")
        weight = message.get("weight", 1)
        if weight not in (0, 1) or (weight == 0 and message["role"] != "assistant"):
            _refuse(number, f"{where} has the weight {repr(weight)[:80]}; assistant messages can have 0 or 1")
    if not any(_is_learned(m) for m in messages):
        _refuse(number, "no assistant message is left to learn from")
    return messages


def _refuse_tools(record: dict[str, Any], where: str, number: int) -> None:
    for key in ("tools", "functions", "tool_calls", "function_call"):
        if record.get(key):
            _refuse(number, f"{where} has {key!r}, which cannot be learned yet")


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def _chat(messages: list[Message], number: int, codec: TextCodec) -> Iterator[Example]:
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    tokens: list[int] = []
    learned: list[bool] = []
    written = ""
    try:
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            after = codec.render(plain[: at + 1], reply=False)
            before = _before(plain, at, after, codec)
            if not (before.startswith(written) and after.startswith(before)):
                # the template rewrites earlier turns: teach each turn on its own, as serving would ask for it
                yield from _turn_by_turn(messages, plain, codec)
                return
            for text, learn in ((before[len(written) :], False), (after[len(before) :], _is_learned(message))):
                piece = codec.encode(text)
                tokens += piece
                learned += [learn] * len(piece)
            written = after
    except BadRequest as error:
        _refuse(number, error.message)
    yield Example(tokens, learned)


def _before(plain: list[Message], at: int, after: str, codec: TextCodec) -> str:
    """What comes before the words of the assistant's message `at`; `after` ends with them."""
    if at > 0:
        return codec.render(plain[:at], reply=True)
    # serving never asks for a reply to nothing, so there is no prompt to compare with
    return after[: max(after.rfind(plain[0]["content"].strip()), 0)]


def _turn_by_turn(messages: list[Message], plain: list[Message], codec: TextCodec) -> Iterator[Example]:
    for at, message in enumerate(messages):
        if not _is_learned(message):
            continue
        after = codec.render(plain[: at + 1], reply=False)
        before = _before(plain, at, after, codec)
        prompt = codec.encode(before)
        if after.startswith(before):
            said = codec.encode(after[len(before) :])
        else:  # the template writes a reply differently from how it asks for one
            said = [*codec.encode(message["content"]), *codec.end]
        yield Example(prompt + said, [False] * len(prompt) + [True] * len(said))


def _completion(record: dict[str, Any], number: int, codec: TextCodec) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        _refuse(number, "'prompt' and 'completion' must be texts, and the completion not empty")
    before = codec.encode(prompt, special=True)
    said = [*codec.encode(completion), *codec.end]
    return Example(before + said, [False] * len(before) + [True] * len(said))


def _refuse(number: int, reason: str) -> NoReturn:
    raise InvalidTrainingFile(f"Line {number} of the training file cannot be used: {reason}.", param="training_file")
