"""Records to examples: tokens that serving would meet, with a mask on exactly what the assistant says.

A conversation is tokenized in the pieces that serving would meet: a prompt up to where the assistant begins, then what
it said. The texts of many records are encoded in one call, which is faster and lets other threads run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adapterhub.base.text import Message, TextCodec
from adapterhub.errors import BadRequest
from adapterhub.train.dataset import Example
from adapterhub.train.records import Chat, Completion, Pair, Record

_BATCH = 128 * 1024  # characters that are encoded in one call
_LONG = 4  # characters for each token of the context, after which a conversation is looked at whether it fits


class _Piece(NamedTuple):
    text: str
    learned: bool
    begins: bool = False  # with what the base begins a text with
    ends: bool = False  # with the token that ends a text


_Side = list[_Piece]  # of an item: what becomes one example


@dataclass(frozen=True)
class Item:
    """An item of a data set, or what there would be of one."""

    line: int
    examples: tuple[Example, ...]
    cut: bool  # was longer than the context

    @property
    def empty(self) -> bool:
        """Nothing is left to learn."""
        return not all(e.learned[1:].any() for e in self.examples)

    @property
    def same(self) -> bool:
        """There is nothing to prefer."""
        return len(self.examples) > 1 and np.array_equal(self.examples[0].tokens, self.examples[1].tokens)


def tokenize(records: Iterable[Record], codec: TextCodec, context: int) -> Iterator[list[Item]]:
    """The items of the records, in order, some at a time; examples are cut to `context` tokens.

    A conversation of a template that rewrites earlier turns becomes an item for each turn. Raises InvalidTrainingFile
    when the template refuses a conversation.
    """
    drafts: list[tuple[int, list[_Side]]] = []
    size = 0
    for record in records:
        for sides in _sides(record, codec, context):
            drafts.append((record.line.number, sides))
            size += sum(len(piece.text) for side in sides for piece in side)
            if size >= _BATCH:
                yield _encoded(drafts, codec, context)
                drafts, size = [], 0
    yield _encoded(drafts, codec, context)


def _encoded(drafts: list[tuple[int, list[_Side]]], codec: TextCodec, context: int) -> list[Item]:
    pieces = [piece for _, sides in drafts for side in sides for piece in side]
    tokens: dict[tuple[str, bool], list[int]] = {}  # once for each text: the sides of a pair share their prompt
    for begins in (False, True):
        texts = list(dict.fromkeys(p.text for p in pieces if p.begins is begins))
        tokens.update(zip(((t, begins) for t in texts), codec.encode_all(texts, special=begins), strict=True))

    end = codec.end

    def example(side: _Side) -> Example:
        ids: list[int] = []
        learned: list[bool] = []
        for piece in side:
            ids += tokens[piece.text, piece.begins]
            if piece.ends:
                ids += end
            learned += [piece.learned] * (len(ids) - len(learned))
        return Example(np.array(ids, np.int32), np.array(learned, np.bool_))

    return [_cut(line, tuple(map(example, sides)), context) for line, sides in drafts]


def _cut(line: int, examples: tuple[Example, ...], context: int) -> Item:
    cut = any(len(e.tokens) > context for e in examples)
    if cut:
        examples = tuple(Example(e.tokens[:context], e.learned[:context]) for e in examples)
    return Item(line, examples, cut)


def _sides(record: Record, codec: TextCodec, context: int) -> Iterator[list[_Side]]:
    """The sides of each item that the record becomes."""
    try:
        match record:
            case Completion():
                yield [[_Piece(record.prompt, False, begins=True), _Piece(record.completion, True, ends=True)]]
            case Pair():
                replies = (record.preferred, record.non_preferred)
                yield [_reply([*record.messages, r], len(record.messages), codec) for r in replies]
            case Chat():
                yield from ([side] for side in _chat(record, codec, context))
    except BadRequest as error:
        record.line.refuse(error.message)


def _chat(record: Chat, codec: TextCodec, context: int) -> Iterator[_Side]:
    """One side of the whole conversation, if its turns are written alike whatever comes after them."""
    messages = record.messages
    side: _Side = []
    written = ""
    look = _LONG * context
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = codec.render(messages[: at + 1], reply=False)
        before = _before(messages, at, after, codec)
        if not (before.startswith(written) and after.startswith(before)):  # it rewrites earlier turns
            yield from _turn_by_turn(record, codec, context)
            return
        side += _Piece(before[len(written) :], False), _Piece(after[len(before) :], record.learned[at])
        written = after
        if len(written) >= look:  # each turn renders all before it: a thousand turns that are cut would take minutes
            if len(codec.encode(written)) > context:
                break
            look *= 2
    yield side


def _turn_by_turn(record: Chat, codec: TextCodec, context: int) -> Iterator[_Side]:
    """Each turn on its own, as serving would ask for it, up to the first one whose prompt does not fit."""
    for at, learned in enumerate(record.learned):
        if learned:
            side = _reply(record.messages, at, codec)
            yield side
            prompt = side[0].text
            if len(prompt) >= _LONG * context and len(codec.encode(prompt)) > context:
                return


def _reply(messages: list[Message], at: int, codec: TextCodec) -> _Side:
    """The assistant's message `at`, to be learned after what serving would send to ask for it."""
    after = codec.render(messages[: at + 1], reply=False)
    before = _before(messages, at, after, codec)
    if after.startswith(before):
        said = _Piece(after[len(before) :], True)
    else:  # the template writes a reply differently from how it asks for one
        said = _Piece(messages[at]["content"], True, ends=True)
    return [_Piece(before, False), said]


def _before(messages: list[Message], at: int, after: str, codec: TextCodec) -> str:
    """What comes before the words of the assistant's message `at`; `after` ends with them."""
    if at > 0:
        return codec.render(messages[:at], reply=True)
    # serving never asks for a reply to nothing, so there is no prompt to compare with
    return after[: max(after.rfind(messages[0]["content"].strip()), 0)]
