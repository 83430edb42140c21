"""Text to tokens and back, with the embedded base's tokenizer and one that writes bytes in another way."""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapterhub.base.embedded import EMBEDDED, base_path
from adapterhub.base.text import TextCodec

_transformers = AutoTokenizer.from_pretrained(base_path(EMBEDDED))
_codec = TextCodec(_transformers)
_special = [_transformers.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
VOCABULARY = _codec.vocabulary

TEXTS = {
    "plain": "Once upon a time, there was a fox.",
    "leading spaces": "   three spaces, then one\t and\n\n  two more ",
    "accents": "Zażółć gęślą jaźń, naïve café",
    "CJK": "你好，世界。日本語のテキスト 한국어",
    "emoji": "😀 👩‍👩‍👧‍👦 🏳️‍🌈 and 🇳🇿!",
    "right to left": "שלום مرحبا",
    "rare": "𓀀 𝔘𝔫𝔦 ꙮ \u0000 \ufeff",
    "empty": "",
}


def streamed(prompt: list[int], answer: list[int]) -> list[str]:
    detokenizer = _codec.stream(prompt)
    return [detokenizer.push(token) for token in answer]


@pytest.mark.parametrize("name", TEXTS)
def test_text_survives_tokens_and_their_bytes(name: str) -> None:
    text = TEXTS[name]
    tokens = _codec.encode(text)
    assert tokens == _transformers(text, add_special_tokens=False).input_ids
    assert _codec.decode(tokens) == text
    assert b"".join(map(_codec.token_bytes, tokens)) == text.encode()
    assert "".join(streamed([], tokens)) == text


_every = {_codec.token_bytes(token) for token in range(VOCABULARY)}
_missing = {byte for byte in range(256) if bytes([byte]) not in _every}  # such as control characters: lost in encoding


@given(text=st.text().filter(lambda text: _missing.isdisjoint(text.encode())))
def test_any_text_survives_tokens_and_their_bytes(text: str) -> None:
    tokens = _codec.encode(text)
    assert b"".join(map(_codec.token_bytes, tokens)) == text.encode()
    assert "".join(streamed([], tokens)) == text == _codec.decode(tokens)


def test_a_token_stands_for_its_own_bytes_also_in_the_middle_of_a_character() -> None:
    for text in (" a", "\n\n", "é", " 日", "😀", "\x00", "Ġ", "\x7f\xad"):
        tokens = _codec.encode(text)
        assert [_codec.token_bytes(t) for t in tokens if len(tokens) == 1] in ([], [text.encode()])
        assert b"".join(map(_codec.token_bytes, tokens)) == text.encode()
    assert [_codec.token_bytes(t) for t in _codec.encode("😀")] != ["😀".encode()], "it takes several"
    assert len(_every) == VOCABULARY
    assert {bytes([b]) for b in b" !azAZ09\n\t"} <= _every


def test_the_pieces_of_a_text_are_the_text_without_what_the_base_begins_it_with() -> None:
    begun = copy.deepcopy(AutoTokenizer.from_pretrained(base_path(EMBEDDED)))
    begun.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    for text in ("A fox", " Füchse: 狐 🦊 ", "<|im_start|>user\n\n  a"):
        pieces = TextCodec(begun).pieces(text)
        assert pieces[0] == ""
        assert "".join(pieces) == text
        assert len(pieces) == len(TextCodec(begun).encode(text, special=True))


def test_special_tokens_are_their_names_in_bytes_and_nothing_in_text() -> None:
    start, end, _ = _special
    assert _codec.token_bytes(start) == b"<|im_start|>"
    tokens = [start, *_codec.encode("Hi"), end]
    assert _codec.encode("<|im_start|>Hi<|im_end|>") == tokens
    assert _codec.decode(tokens) == "Hi" == "".join(streamed([], tokens))
    assert _codec.end == [_transformers.eos_token_id]


def test_a_character_comes_with_the_last_of_its_tokens() -> None:
    prompt, answer = _codec.encode("I like"), _codec.encode(" 😀日!")
    pieces = streamed(prompt, answer)
    assert "".join(pieces) == " 😀日!"
    for at in range(len(answer) + 1):
        assert "".join(pieces[:at]) == _codec.decode(answer[:at]).removesuffix("\ufffd").removesuffix(" ")


@pytest.mark.parametrize("text", ["I like 😀", "日本語", "👩‍👩‍👧‍👦🏳️‍🌈", " hello   world"])
def test_an_answer_goes_on_wherever_its_prompt_ends(text: str) -> None:
    """Also within a character, whose tokens then all belong to the answer, and nothing of the prompt before them."""
    tokens = _codec.encode("A beginning that is long enough. " + text)
    before = ""
    for at in range(1, len(tokens)):
        said = _codec.decode(tokens[:at])
        before = before if said.endswith("\ufffd") else said
        answer = "".join(streamed(tokens[:at], tokens[at:]))
        assert before + answer == _codec.decode(tokens)


_tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


@given(prompt=_tokens, answer=_tokens)
def test_any_tokens_at_all_become_the_text_that_their_bytes_spell(prompt: list[int], answer: list[int]) -> None:
    text = "".join(streamed(prompt, answer))
    spoken = b"".join(_codec.token_bytes(t) for t in answer if t not in _codec._special)
    shown = text.lstrip("\ufffd").encode()  # what began in the prompt, and is no character, may come with the answer
    assert shown in spoken or "\ufffd" in text
    assert len(spoken) - len(shown) <= 4 or "\ufffd" in text or not text


def test_a_prompt_that_ends_within_a_character_does_not_come_back_in_the_answer() -> None:
    prompt = _codec.encode("A secret: 😀")[:-1]
    assert _codec.decode(prompt) == "A secret: \ufffd"
    assert streamed(prompt, _codec.encode(" yes")) == [" \ufffd yes"]


def byte_fallback() -> TextCodec:
    """A vocabulary in sentencepiece's style: spaces are written as a low line, and bytes by their number."""
    pieces = ["<unk>", "\u2581", "a", "b", "\u2581a", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(BPE({p: i for i, p in enumerate(pieces)}, [("\u2581", "a")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    return TextCodec(wrapped)


def test_bytes_are_known_also_where_a_vocabulary_writes_them_by_number() -> None:
    codec = byte_fallback()
    tokens = [4, 3, *(5 + byte for byte in "é".encode()), 1]
    assert [codec.token_bytes(t) for t in tokens] == [b" a", b"b", b"\xc3", b"\xa9", b" "]
    detokenizer = codec.stream()
    assert "".join(map(detokenizer.push, tokens)).strip() == "ab" + "é"
    assert codec.decode(tokens) == " abé "


def test_others_run_while_a_long_text_is_encoded() -> None:
    begun, ran = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: begun.wait() and ran.set())
    other.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # from now on a thread has the interpreter until it lets go of it
    try:
        begun.set()
        assert not ran.is_set()
        _codec.encode("a few words " * 100_000)
        assert ran.is_set()
    finally:
        sys.setswitchinterval(before)
        other.join()


def test_no_token_is_longer_than_the_longest() -> None:
    assert _codec.longest == max(map(len, _every))
    assert len(_codec.encode(" " * 10_000)) * _codec.longest >= 10_000


def test_a_developer_speaks_as_the_system_where_the_template_knows_none() -> None:
    asked = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert _codec.render(asked, reply=True) == _codec.render([{**asked[0], "role": "system"}, asked[1]], reply=True)
    knowing = AutoTokenizer.from_pretrained(base_path(EMBEDDED))
    knowing.chat_template = (
        "{% for m in messages %}{% if m.role == 'developer' %}D:{{ m.content }}{% endif %}{% endfor %}"
    )
    assert TextCodec(knowing).render(asked, reply=True) == "D:Be brief."
