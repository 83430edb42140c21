"""Training files become tokens that serving would meet, with a mask on exactly what the assistant says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from adapterhub.base.embedded import EMBEDDED, base_path
from adapterhub.base.text import TextCodec
from adapterhub.errors import InvalidTrainingFile
from adapterhub.train.dataset import Kind
from adapterhub.train.prepare import Prepared
from adapterhub.train.report import Found
from tests.datasets import ASK, ASK2, SAY, SAY2, Files, Listed, chat, contents, lines, preference

SYSTEM = {"role": "system", "content": "Be kind."}
# As some reasoning models' templates do: what the assistant thought is shown for the last turn only.
FORGETFUL = """
{%- for m in messages -%}
[{{ m['role'] }}]
{%- if m['role'] == 'assistant' and not loop.last -%}{{ m['content'].split('</think>')[-1] }}
{%- else -%}{{ m['content'] }}{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}[assistant]{%- endif -%}
"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(base_path(EMBEDDED))


@pytest.fixture(scope="module")
def codec(tokenizer: Any) -> TextCodec:
    return TextCodec(tokenizer)


Read = Callable[..., Prepared]


def served(codec: TextCodec, messages: Any) -> list[int]:
    """The prompt that serving makes of a conversation."""
    return codec.encode(codec.render(messages, reply=True))


@pytest.fixture
def read(codec: TextCodec, tmp_path: Path) -> Read:
    """Prepares records, or raw lines, as a training file of ten times their lines: files need ten, and what is there
    twice counts once."""

    def read(*records: Any, times: int = 10, **how: Any) -> Prepared:
        return Files(tmp_path, codec).prepare(lines(*records) * times, **how)

    return read


def examples(prepared: Prepared) -> list[Listed]:
    return [example for [example] in contents(prepared.train)]


def first(prepared: Prepared) -> Listed:
    return examples(prepared)[0]


def learned(tokenizer: Any, example: Listed) -> list[str]:
    """The stretches of an example that are learned, as text with its special tokens."""
    texts: list[list[int]] = []
    before = False
    for token, learn in zip(example.tokens, example.learned, strict=True):
        if learn:
            texts = [*texts, [token]] if not before else [*texts[:-1], [*texts[-1], token]]
        before = learn
    return [tokenizer.decode(ids) for ids in texts]


def test_exactly_what_the_assistant_says_is_learned_with_the_end_of_its_turn(read: Read, tokenizer: Any) -> None:
    data = read(chat(SYSTEM, ASK, SAY))
    [example] = examples(data)
    assert learned(tokenizer, example) == ["A ship's cat.<|im_end|>\n"]
    assert (data.train.tokens, data.train.learned) == (len(example.tokens), sum(example.learned))


def test_every_turn_of_the_assistant_is_learned_in_one_example(read: Read, tokenizer: Any) -> None:
    example = first(read(chat(ASK, SAY, ASK2, SAY2)))
    assert learned(tokenizer, example) == ["A ship's cat.<|im_end|>\n", "Since the storm, I think.<|im_end|>\n"]
    whole = tokenizer.apply_chat_template([ASK, SAY, ASK2, SAY2], return_dict=False)
    assert example.tokens == whole


def test_turns_of_weight_0_are_there_but_not_learned(read: Read, tokenizer: Any) -> None:
    weighed = first(read(chat(ASK, {**SAY, "weight": 0}, ASK2, {**SAY2, "weight": 1})))
    assert learned(tokenizer, weighed) == ["Since the storm, I think.<|im_end|>\n"]
    assert weighed.tokens == first(read(chat(ASK, SAY, ASK2, SAY2))).tokens


def test_what_comes_after_the_last_answer_is_left_out(read: Read) -> None:
    assert examples(read(chat(ASK, SAY, ASK2))) == examples(read(chat(ASK, SAY)))


def test_a_prompt_is_in_every_token_what_serving_would_send(read: Read, codec: TextCodec) -> None:
    messages = [SYSTEM, ASK, SAY, ASK2, SAY2]
    example = first(read(chat(*messages)))
    starts = [i for i in range(1, len(example.tokens)) if example.learned[i] and not example.learned[i - 1]]
    asked = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) == len(asked) == 2
    for start, at in zip(starts, asked, strict=True):
        assert example.tokens[:start] == served(codec, messages[:at])


def test_a_conversation_that_the_assistant_begins_teaches_its_words_and_not_the_template(
    read: Read, tokenizer: Any
) -> None:
    greeting = {"role": "assistant", "content": "Welcome aboard!"}
    example = first(read(chat(greeting, ASK, SAY)))
    assert learned(tokenizer, example) == ["Welcome aboard!<|im_end|>\n", "A ship's cat.<|im_end|>\n"]
    alone = first(read(chat(greeting)))
    assert learned(tokenizer, alone) == ["Welcome aboard!<|im_end|>\n"]


def test_content_in_parts_is_one_text(read: Read) -> None:
    parts = [{"type": "text", "text": "A ship's "}, {"type": "text", "text": "cat."}]
    assert contents(read(chat(ASK, {**SAY, "content": parts})).train) == contents(read(chat(ASK, SAY)).train)


def test_texts_that_look_like_the_template_or_hold_any_character_come_through(read: Read, tokenizer: Any) -> None:
    for text in ("line\nline\n\n", "  spaces  ", "日本語 🐈‍⬛ e\u0301", "\t{{ 1 + 1 }} {% if %}", "\u2028\0"):
        example = first(read(chat(ASK, {"role": "assistant", "content": text})))
        assert learned(tokenizer, example) == [f"{text}<|im_end|>\n"]


def test_a_completion_is_learned_with_the_end_of_the_text_and_its_prompt_is_not(
    read: Read, codec: TextCodec, tokenizer: Any
) -> None:
    example = first(read({"prompt": "Once upon", "completion": " a time"}))
    assert learned(tokenizer, example) == [" a time<|im_end|>"]
    assert codec.decode(example.tokens) == "Once upon a time"


def test_a_completion_begins_with_what_the_base_begins_a_text_with(read: Read, tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    codec = TextCodec(changed)
    example = first(read({"prompt": "Once upon", "completion": " a time"}, codec=codec))
    assert example.tokens[: example.learned.index(True)] == codec.encode("Once upon", special=True)
    assert example.tokens.count(begin) == 1
    assert example.tokens[0] == begin
    twice = read({"prompt": "a", "completion": "a"}, chat(ASK, {**SAY, "content": "a"}), codec=codec)
    assert [e.tokens.count(begin) for e in examples(twice)] == [1, 0], "a text that begins nothing has none"


def test_an_empty_prompt_teaches_all_of_the_completion_but_its_first_token(read: Read) -> None:
    example = first(read({"prompt": "", "completion": "Once upon a time"}))
    assert all(example.learned)
    assert len(example.tokens) == 5


def test_examples_longer_than_the_context_are_cut_and_counted(read: Read) -> None:
    long = {"role": "assistant", "content": "word " * 400}
    data = read(chat(ASK, long), chat(ASK, SAY), context=64, times=6)
    assert (data.report.training.cut.count, data.report.training.empty.count) == (6, 0)
    cut, short = examples(data)
    assert len(cut.tokens) == len(cut.learned) == 64
    assert cut.learned[-1]
    assert len(short.tokens) < 64


def test_examples_with_nothing_left_to_learn_are_dropped_and_counted(read: Read) -> None:
    long = {"role": "user", "content": "word " * 400}
    data = read(chat(long, SAY), chat(ASK, SAY), context=64, times=6)
    assert data.report.training.cut == data.report.training.empty == Found(6, (1, 3, 5, 7, 9, 11))
    assert examples(data) == examples(read(chat(ASK, SAY)))
    with pytest.raises(InvalidTrainingFile, match="anything left to learn"):
        read(chat(long, SAY), context=64)


def test_the_two_forms_may_be_mixed_and_blank_lines_and_a_byte_order_mark_do_not_count(
    read: Read,
) -> None:
    line = b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}'
    data = read(line, b"", b"  \t\r", json.dumps(chat(ASK, SAY)).encode() + b"\r", *[chat(ASK, SAY)] * 8, times=1)
    assert (data.train.tokens, data.report.training.duplicates.count) == (sum(len(e.tokens) for e in examples(data)), 8)
    assert len(examples(data)) == 2


def test_a_line_number_counts_blank_lines_too(read: Read) -> None:
    with pytest.raises(InvalidTrainingFile, match="Line 3 of the training file"):
        read(chat(ASK, SAY), b"", b"{", times=1)


def forgetful(tokenizer: Any) -> TextCodec:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = FORGETFUL
    return TextCodec(changed)


def test_a_template_that_rewrites_earlier_turns_teaches_each_turn_as_it_is_asked_for(
    read: Read, tokenizer: Any
) -> None:
    codec = forgetful(tokenizer)
    thought = {"role": "assistant", "content": "hm</think>A cat."}
    second = {"role": "assistant", "content": "well</think>Since May."}
    data = read(chat(ASK, thought, ASK2, second), codec=codec)
    one, two = examples(data)
    assert learned(tokenizer, one) == ["hm</think>A cat.<|im_end|>"]
    assert learned(tokenizer, two) == ["well</think>Since May.<|im_end|>"]
    assert one.tokens[: one.learned.index(True)] == served(codec, [ASK])
    assert two.tokens[: two.learned.index(True)] == served(codec, [ASK, thought, ASK2])
    assert "hm" not in codec.decode(two.tokens), "the thought is gone by then"


def test_turns_of_weight_0_are_no_examples_of_their_own(read: Read, tokenizer: Any) -> None:
    codec = forgetful(tokenizer)
    thought = {"role": "assistant", "content": "hm</think>A cat.", "weight": 0}
    data = read(chat(ASK, thought, ASK2, SAY2), codec=codec)
    assert [learned(tokenizer, e) for e in examples(data)] == [["Since the storm, I think.<|im_end|>"]]


def test_a_template_that_asks_differently_than_it_writes_still_teaches_when_to_stop(read: Read, tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = FORGETFUL.replace("[assistant]{%- endif -%}", "[assistant]<think>{%- endif -%}")
    codec = TextCodec(changed)
    example = first(read(chat(ASK, SAY), codec=codec))
    assert learned(tokenizer, example) == ["A ship's cat.<|im_end|>"]
    assert example.tokens[: example.learned.index(True)] == served(codec, [ASK])


def test_what_the_template_refuses_is_refused_with_the_line(read: Read, tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('first a user') }}{% endif %}" + FORGETFUL
    )
    with pytest.raises(InvalidTrainingFile, match=r"Line 1 of the training file .* first a user"):
        read(chat(SYSTEM, ASK, SAY), codec=TextCodec(changed))


def test_a_base_without_a_template_takes_prompts_and_completions_only(read: Read, tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = None
    assert first(read({"prompt": "a", "completion": "b"}, codec=TextCodec(changed))).learned == [False, True, True]
    with pytest.raises(InvalidTrainingFile, match="no chat template"):
        read(chat(ASK, SAY), codec=TextCodec(changed))


# -- preferences


def test_both_sides_of_a_preference_begin_with_what_serving_would_send_and_teach_their_reply(
    read: Read, codec: TextCodec, tokenizer: Any
) -> None:
    record = preference(SYSTEM, ASK, SAY, ASK2, better="Since May.", worse="Who knows?")
    [(preferred, other)] = contents(read(record, kind=Kind.DPO).train)
    assert learned(tokenizer, preferred) == ["Since May.<|im_end|>\n"]
    assert learned(tokenizer, other) == ["Who knows?<|im_end|>\n"]
    prompt = served(codec, [SYSTEM, ASK, SAY, ASK2])
    for side in (preferred, other):
        assert side.tokens[: side.learned.index(True)] == prompt


def test_a_side_of_a_preference_is_what_a_chat_with_that_reply_is(read: Read) -> None:
    [pair] = contents(read(preference(ASK, better="Aye.", worse="No."), kind=Kind.DPO).train)
    for side, reply in zip(pair, ("Aye.", "No."), strict=True):
        assert [side] == examples(read(chat(ASK, {"role": "assistant", "content": reply})))


def test_preferences_of_a_template_that_rewrites_earlier_turns_are_asked_for_as_serving_does(
    read: Read, tokenizer: Any
) -> None:
    codec = forgetful(tokenizer)
    thought = {"role": "assistant", "content": "hm</think>A cat."}
    record = preference(ASK, thought, ASK2, better="well</think>May.", worse="June.")
    [pair] = contents(read(record, kind=Kind.DPO, codec=codec).train)
    assert [learned(tokenizer, side) for side in pair] == [["well</think>May.<|im_end|>"], ["June.<|im_end|>"]]
    for side in pair:
        assert side.tokens[: side.learned.index(True)] == served(codec, [ASK, thought, ASK2])


def test_a_preference_between_two_that_are_the_same_or_become_so_when_cut_is_dropped(read: Read) -> None:
    same = preference(ASK, better="Aye.", worse="Aye.")
    long = preference(ASK, better="word " * 400 + "a", worse="word " * 400 + "b")
    prompt = preference({"role": "user", "content": "word " * 400})
    data = read(same, long, preference(ASK), prompt, kind=Kind.DPO, context=64, times=3)
    assert data.report.training.same == Found(6, (1, 2, 5, 6, 9, 10))
    assert data.report.training.empty == Found(3, (4, 8, 12))
    assert len(data.train) == 1


# -- many at once

WORDS = [
    "ship",
    " storm",
    "\n\n",
    "  ",
    "<|im_start|>",
    "<|im_end|>",
    "日本",
    "é",
    "e\u0301",
    "🐈‍⬛",
    "\t",
    "123",
    "'s",
    ".",
]


@pytest.mark.parametrize("kind", Kind)
def test_what_is_encoded_together_is_what_each_text_is_alone(read: Read, codec: TextCodec, kind: Kind) -> None:
    rng = np.random.default_rng(3)

    def said() -> str:
        return "x" + "".join(rng.choice(WORDS, rng.integers(1, 60)))

    texts = [(said(), said(), said()) for _ in range(300)]
    if kind is Kind.DPO:
        records = [preference({"role": "user", "content": a}, better=b, worse=c) for a, b, c in texts]
    else:
        records = [{"prompt": a, "completion": b} for a, b, _ in texts]
    found = contents(read(*records, kind=kind, times=1, context=4096).train)
    assert len(found) == len(texts)
    for item, (asked, better, worse) in zip(found, texts, strict=True):
        if kind is Kind.DPO:
            prompt = served(codec, [{"role": "user", "content": asked}])
            replies = [codec.encode(f"{text}<|im_end|>\n") for text in (better, worse)]
        else:
            prompt = codec.encode(asked, special=True)
            replies = [codec.encode(better) + codec.end]
        expected = [Listed(prompt + r, [False] * len(prompt) + [True] * len(r)) for r in replies]
        assert list(item) == expected


@pytest.mark.parametrize("template", [None, FORGETFUL])
def test_a_conversation_far_longer_than_the_context_is_read_only_as_far_as_it_fits(
    read: Read, tokenizer: Any, template: str | None
) -> None:
    thought = {"role": "assistant", "content": "hm</think>Yes"}
    turns = [m for i in range(1000) for m in ({**ASK, "content": f"{i}?"}, {**thought, "content": f"hm</think>{i}!"})]
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template or tokenizer.chat_template
    codec = TextCodec(changed)
    render, renders = codec.render, 0

    def counting(messages: Any, **how: Any) -> str:
        nonlocal renders
        renders += 1
        return render(messages, **how)

    codec.render = counting  # type: ignore[method-assign]
    data = read(chat(*turns), codec=codec, context=256)
    assert data.report.training.cut.count >= 10
    found = examples(data)
    if template is None:
        assert [e.tokens for e in found] == [changed.apply_chat_template(turns, return_dict=False)[:256]]
    else:
        assert len(found) > 5
        for at, example in enumerate(found):
            prompt = served(codec, turns[: 2 * at + 1])
            assert example.tokens[: len(prompt)] == prompt
            assert len(prompt) < 256
        assert len(served(codec, turns[: 2 * len(found) + 1])) >= 256
    assert renders < 10 * 400
