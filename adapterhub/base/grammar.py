"""Answers that must follow a grammar: compiled in threads of their own, followed token by token by the engine.

llguidance does the work: it parses the answer as it comes, and says of every token of the vocabulary whether some
answer goes on with it. All that it does is bounded by limits on its own work, not by a clock; what is over a limit is
an error, of the schema when it is compiled, and of the one request when it shows later.
"""

from __future__ import annotations

import json
import random
import threading
from collections import OrderedDict
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapterhub.errors import BadRequest, TooManyRequests, Unavailable

if TYPE_CHECKING:  # imported where it is used: an engine that nobody asks for a grammar runs without llguidance
    from llguidance import LLExecutor, LLMatcher

Part = dict[str, Any]  # {"lark_grammar": ...} or {"name": ..., "json_schema": ...}, as llguidance names them
INVALID = "invalid_json_schema"
# a step's mask may take a few milliseconds at worst; states of the lexer, which have about 400 bytes, 20 MB
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 10_000,
    "step_max_items": 50_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_THREADS = 2
_KEPT = 128  # compiled grammars
_OWNERS_SHARE = 4  # of one owner that wait to be compiled
_TRIED_TOKENS = 16
_WORN = 4000  # tokens after which a grammar is compiled anew


class Grammar:
    """A compiled grammar. Answers that follow it share the states of its lexer, which only become more."""

    def __init__(self, compiled: LLMatcher, executor: LLExecutor, mask_bytes: int) -> None:
        self.executor, self.mask_bytes = executor, mask_bytes
        self.followed = 0  # tokens; counted by engines alone, and of two at once one may be lost
        self._compiled = compiled

    @property
    def worn(self) -> bool:
        """So many answers have added states that the next one should have a fresh copy."""
        return self.followed >= _WORN

    def start(self) -> Matcher:
        return Matcher(self, self._compiled.deep_copy())


class Matcher:
    """Where in its grammar one answer is. Only the engine's thread may use it."""

    def __init__(self, grammar: Grammar, at: LLMatcher) -> None:
        self.grammar, self.at = grammar, at

    def accept(self, token: int) -> None:
        self.at.consume_token(token)
        self.grammar.followed += 1

    @property
    def error(self) -> BadRequest | None:
        """Why nothing more can be said of this answer."""
        if not self.at.is_error():
            return None
        why = f"The schema is too complex to follow: {_reason(self.at)}. Simplify its patterns and alternatives."
        return BadRequest(why, code=INVALID)


def masks(matchers: Seq[Matcher]) -> NDArray[np.uint8]:
    """What may come next: [len(matchers), bytes], one bit per token, lowest first; no token where there is an error."""
    executor, width = matchers[0].grammar.executor, matchers[0].grammar.mask_bytes
    bits = np.zeros((len(matchers), width), dtype=np.uint8)
    # all in one call: each would let go of the interpreter, and wait to have it back
    executor.unsafe_compute_mask_ptr(
        [(matcher.at, row) for row, matcher in enumerate(matchers)], bits.ctypes.data, width, len(matchers)
    )
    for row, matcher in enumerate(matchers):
        if matcher.at.is_error():
            bits[row] = 0
    return bits


class Grammars:
    """Compiles grammars, and keeps those that were used last, each for its owner alone. For any thread."""

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int], vocabulary: int) -> None:
        """`tokenizer`: transformers' fast one; `vocabulary`: how many logits the base has."""
        from llguidance import LLExecutor, LLTokenizer

        backend = tokenizer.backend_tokenizer
        self._vocabulary = max(vocabulary, backend.get_vocab_size(with_added_tokens=True))
        self._refusal: str | None = None
        if not end_tokens:
            self._refusal = "it has no token that ends a text"
        else:
            try:  # now, because it keeps the interpreter to itself for a good part of a second
                self._tokenizer = LLTokenizer(backend.to_str(), n_vocab=self._vocabulary, eos_token=sorted(end_tokens))
            except ValueError as error:
                self._refusal = f"its tokenizer is of an unknown kind ({error})"
        self._executor = LLExecutor()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="adapterhub-grammar")
        self._lock = threading.Lock()  # guards what follows
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._under_way: dict[tuple[str, str], Future[Grammar]] = {}

    def compile(self, owner: str, parts: Seq[Part]) -> Future[Grammar]:
        """The first of `parts` is what an answer is; it may name the others. Fails with BadRequest when there is no
        such grammar, or it is over a limit. Who asks for the same meanwhile shares it, and so nobody may cancel it.

        Raises BadRequest when the base can follow none, TooManyRequests when the owner has others compiled.
        """
        if self._refusal is not None:
            raise BadRequest(f"This base cannot follow a schema: {self._refusal}. Ask for text.", code=INVALID)
        text = json.dumps({"grammars": list(parts)}, ensure_ascii=False)
        with self._lock:
            if (known := self._kept.get((owner, text))) is not None and not known.worn:
                self._kept.move_to_end((owner, text))
                done: Future[Grammar] = Future()
                done.set_result(known)
                return done
            if (shared := self._under_way.get((owner, text))) is not None:
                return shared
            if sum(whose == owner for whose, _ in self._under_way) >= _OWNERS_SHARE:
                raise TooManyRequests(f"{_OWNERS_SHARE} of your schemas are being compiled. Try again in a second.")
            try:
                begun = self._threads.submit(self._compile, owner, text)
            except RuntimeError as error:
                raise Unavailable("The server is shutting down.") from error
            self._under_way[owner, text] = begun
        begun.add_done_callback(lambda _: self._ended(owner, text))
        return begun

    def erase(self, owner: str) -> int:
        """Forgets an owner's grammars; returns how many that were."""
        with self._lock:
            gone = [kept for kept in self._kept if kept[0] == owner]
            for kept in gone:
                del self._kept[kept]
        return len(gone)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _ended(self, owner: str, text: str) -> None:
        with self._lock:
            del self._under_way[owner, text]

    def _compile(self, owner: str, text: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        compiled = LLMatcher(self._tokenizer, text, limits=LLParserLimits(**_LIMITS), log_level=0)
        grammar = Grammar(compiled, self._executor, (self._vocabulary + 31) // 32 * 4)
        self._try(grammar)
        with self._lock:
            self._kept[owner, text] = grammar
            self._kept.move_to_end((owner, text))
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _try(self, grammar: Grammar) -> None:
        """Follows a few tokens of an arbitrary answer: what nobody could answer shows here, and what every answer
        begins with is ready when the engine asks for it."""
        matcher, choose = grammar.start(), random.Random(0)
        for _ in range(_TRIED_TOKENS):
            bits = masks([matcher])
            if matcher.at.is_error():
                raise BadRequest(_reason(matcher.at), code=INVALID)
            may = np.unpackbits(bits[0], bitorder="little").nonzero()[0]
            if matcher.at.is_stopped():
                return
            matcher.at.consume_token(int(choose.choice(may)))


def _reason(matcher: LLMatcher) -> str:
    """What llguidance says, on one line, without its inner state."""
    said = " ".join(matcher.get_error().split("<")[0].split())
    return "no answer fits it" if said.startswith("NoExtension") else said[:300].rstrip(" .")
