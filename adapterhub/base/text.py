"""Text to tokens and back: the base's tokenizer and chat template. Safe to use from any thread, unlike the model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream

from adapterhub.base.tools import BEGIN, END, Message, Tool, written_out
from adapterhub.errors import BadRequest

_PROBE_TOOL: Tool = {
    "type": "function",
    "function": {"name": "probe", "description": "Finds it.", "parameters": {"type": "object", "properties": {}}},
}
_PROBE_CALL = {"id": "call_0", "type": "function", "function": {"name": "probe", "arguments": {"what": 1}}}


class TextCodec:
    """Works on the tokenizer underneath transformers', whose own `encode` changes state and so is not thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        self._transformers = tokenizer
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._byte_level = isinstance(self._tokenizer.decoder, ByteLevel)

    @property
    def vocabulary(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token: a text has no fewer tokens than its bytes by this."""
        return max(len(self.token_bytes(token)) for token in range(self.vocabulary))

    @property
    def end(self) -> list[int]:
        """The token that ends a text, if the base has one."""
        token = self._transformers.eos_token_id
        return [] if token is None else [token]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """`special` adds what the base begins a text with, such as a beginning-of-sequence token."""
        return self.encode_all([text], special=special)[0]

    def encode_all(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of each, several at a time, while other threads run: `encode_batch_fast` lets go of the interpreter,
        which the tokenizer's own `encode` holds for as long as a text takes."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def pieces(self, prompt: str | Sequence[int]) -> list[str]:
        """What each token of a text, or of some tokens, adds to the text: a character made of several comes with its
        last, and what the base begins a text with adds nothing."""
        if isinstance(prompt, str):
            [encoding] = self._tokenizer.encode_batch([prompt], add_special_tokens=True)
            marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        else:
            marked = zip(prompt, [0] * len(prompt), strict=True)
        stream = DecodeStream(skip_special_tokens=False)
        return ["" if added else stream.step(self._tokenizer, token) or "" for token, added in marked]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters."""
        written = self._tokenizer.id_to_token(token) or ""
        if token in self._special:
            return written.encode()
        if self._byte_level:
            return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in written)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", written):
            return bytes.fromhex(byte[1])
        return written.replace("\u2581", " ").encode()

    def render(self, messages: list[Message], *, reply: bool, tools: Sequence[Tool] = ()) -> str:
        """The conversation as the base's chat template writes it; with `reply`, up to where the assistant begins.

        Raises BadRequest when the base has no template, or the template refuses the conversation.
        """
        if self._transformers.chat_template is None:
            raise BadRequest("This base has no chat template. Use /v1/completions with a plain prompt.")
        if not self._knows_developers:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        told = tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
        if told and not self.writes_tools:
            messages, tools = written_out(messages, tools, system=self._takes_system), ()
        try:
            return self._apply(messages, tools, reply)
        except (TemplateError, TypeError, KeyError) as error:
            raise BadRequest(f"The base's chat template refuses these messages: {error}", param="messages") from error

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the chat template writes tools and calls as `base.tools` says; a short conversation shows it."""
        calling = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
        found = {"role": "tool", "tool_call_id": "call_0", "content": "It is here."}
        asked = {"role": "user", "content": "Where is it?"}
        try:
            text = self._apply([asked, calling, found], [_PROBE_TOOL], reply=True)
        except (TemplateError, TypeError, KeyError, ValueError):
            return False
        calls = re.findall(f"{BEGIN}\\s*(\\{{.*\\}})\\s*{END}", text)
        as_written = json.dumps(_PROBE_CALL["function"])
        return "Finds it." in text and "It is here." in text and as_written in calls

    @property
    def _knows_developers(self) -> bool:
        """Whether the chat template has a role of that name. To most it is a newer word for the system's, which they
        would write as it is, a turn that the base has never seen."""
        return "developer" in str(self._transformers.chat_template)

    @cached_property
    def _takes_system(self) -> bool:
        try:
            self._apply([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], (), reply=True)
        except (TemplateError, TypeError, KeyError):
            return False
        return True

    def _apply(self, messages: list[Message], tools: Sequence[Tool], reply: bool) -> str:
        more = {"tools": list(tools)} if tools else {}
        return self._transformers.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply, **more)

    def stream(self, prompt: Sequence[int] = ()) -> Detokenizer:
        return Detokenizer(self._tokenizer, list(prompt))


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with: printable ones stand for themselves, the others are
    moved up out of the way, in order (the convention of GPT-2's tokenizer)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()


class Detokenizer:
    """Turns tokens into text one by one; a character made of several tokens comes with its last."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        tail = prompt[-8:]  # enough to know whether a space comes before what follows
        whole = len(tail)
        while whole and tokenizer.decode(tail[:whole]).endswith("\ufffd"):  # the prompt ends within a character
            whole -= 1
        self._stream = DecodeStream(ids=tail[:whole], skip_special_tokens=True)
        for token in tail[whole:]:
            self._stream.step(tokenizer, token)

    def push(self, token: int) -> str:
        return self._stream.step(self._tokenizer, token) or ""
