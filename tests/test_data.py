"""Training files become tokens that serving would meet, with a mask on exactly what the assistant says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adapterhub.base.embedded import EMBEDDED, base_path
from adapterhub.base.text import TextCodec
from adapterhub.errors import InvalidTrainingFile
from adapterhub.train.data import DataSet, Example, read_data_set

SYSTEM = {"role": "system", "content": "Be kind."}
ASK, SAY = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A ship's cat."}
ASK2, SAY2 = {"role": "user", "content": "Since when?"}, {"role": "assistant", "content": "Since the storm, I think."}
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


@pytest.fixture
def read(codec: TextCodec, tmp_path: Path) -> Callable[..., DataSet]:
    """Reads records, or raw bytes, as a training file; by default each record ten times, as files need ten lines."""

    def read(*records: Any, context: int = 512, times: int = 10, codec: TextCodec = codec) -> DataSet:
        path = tmp_path / "data.jsonl"
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        path.write_bytes(b"\n".join(lines * times) + b"\n")
        return read_data_set(path, codec, context)

    return read


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


def learned(tokenizer: Any, example: Example) -> list[str]:
    """The stretches of an example that are learned, as text with its special tokens."""
    texts: list[list[int]] = []
    before = False
    for token, learn in zip(example.tokens, example.learned, strict=True):
        if learn:
            texts = [*texts, [token]] if not before else [*texts[:-1], [*texts[-1], token]]
        before = learn
    return [tokenizer.decode(ids) for ids in texts]


def test_exactly_what_the_assistant_says_is_learned_with_the_end_of_its_turn(
    read: Callable[..., DataSet], tokenizer: Any
) -> None:
    data = read(chat(SYSTEM, ASK, SAY))
    assert len(data.examples) == 10
    assert learned(tokenizer, data.examples[0]) == ["A ship's cat.<|im_end|>\n"]
    assert (data.cut, data.dropped, data.tokens) == (0, 0, 10 * len(data.examples[0].tokens))


def test_every_turn_of_the_assistant_is_learned_in_one_example(read: Callable[..., DataSet], tokenizer: Any) -> None:
    example = read(chat(ASK, SAY, ASK2, SAY2)).examples[0]
    assert learned(tokenizer, example) == ["A ship's cat.<|im_end|>\n", "Since the storm, I think.<|im_end|>\n"]
    whole = tokenizer.apply_chat_template([ASK, SAY, ASK2, SAY2], return_dict=False)
    assert example.tokens == whole


def test_turns_of_weight_0_are_there_but_not_learned(read: Callable[..., DataSet], tokenizer: Any) -> None:
    weighed = read(chat(ASK, {**SAY, "weight": 0}, ASK2, {**SAY2, "weight": 1})).examples[0]
    assert learned(tokenizer, weighed) == ["Since the storm, I think.<|im_end|>\n"]
    assert weighed.tokens == read(chat(ASK, SAY, ASK2, SAY2)).examples[0].tokens


def test_what_comes_after_the_last_answer_is_left_out(read: Callable[..., DataSet]) -> None:
    assert read(chat(ASK, SAY, ASK2)).examples == read(chat(ASK, SAY)).examples


def test_a_prompt_is_in_every_token_what_serving_would_send(read: Callable[..., DataSet], codec: TextCodec) -> None:
    messages = [SYSTEM, ASK, SAY, ASK2, SAY2]
    example = read(chat(*messages)).examples[0]
    starts = [i for i in range(1, len(example.tokens)) if example.learned[i] and not example.learned[i - 1]]
    asked = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) == len(asked) == 2
    for start, at in zip(starts, asked, strict=True):
        assert example.tokens[:start] == codec.chat(messages[:at])


def test_a_conversation_that_the_assistant_begins_teaches_its_words_and_not_the_template(
    read: Callable[..., DataSet], tokenizer: Any
) -> None:
    greeting = {"role": "assistant", "content": "Welcome aboard!"}
    example = read(chat(greeting, ASK, SAY)).examples[0]
    assert learned(tokenizer, example) == ["Welcome aboard!<|im_end|>\n", "A ship's cat.<|im_end|>\n"]
    alone = read(chat(greeting)).examples[0]
    assert learned(tokenizer, alone) == ["Welcome aboard!<|im_end|>\n"]


def test_content_in_parts_is_one_text(read: Callable[..., DataSet]) -> None:
    parts = [{"type": "text", "text": "A ship's "}, {"type": "text", "text": "cat."}]
    assert read(chat(ASK, {**SAY, "content": parts})).examples == read(chat(ASK, SAY)).examples


def test_texts_that_look_like_the_template_or_hold_any_character_come_through(
    read: Callable[..., DataSet], tokenizer: Any
) -> None:
    for text in ("line\nline\n\n", "  spaces  ", "日本語 🐈‍⬛ e\u0301", "\t{{ 1 + 1 }} {% if %}", "\u2028\0"):
        example = read(chat(ASK, {"role": "assistant", "content": text})).examples[0]
        assert learned(tokenizer, example) == [f"{text}<|im_end|>\n"]


def test_a_completion_is_learned_with_the_end_of_the_text_and_its_prompt_is_not(
    read: Callable[..., DataSet], codec: TextCodec, tokenizer: Any
) -> None:
    example = read({"prompt": "Once upon", "completion": " a time"}).examples[0]
    assert learned(tokenizer, example) == [" a time<|im_end|>"]
    assert codec.decode(example.tokens) == "Once upon a time"


def test_an_empty_prompt_teaches_all_of_the_completion_but_its_first_token(read: Callable[..., DataSet]) -> None:
    [example, *_] = read({"prompt": "", "completion": "Once upon a time"}).examples
    assert all(example.learned)
    assert len(example.tokens) == 5


def test_examples_longer_than_the_context_are_cut_and_counted(read: Callable[..., DataSet]) -> None:
    long = {"role": "assistant", "content": "word " * 400}
    data = read(chat(ASK, long), chat(ASK, SAY), context=64, times=6)
    assert (data.cut, data.dropped, len(data.examples)) == (6, 0, 12)
    cut, short = data.examples[0], data.examples[1]
    assert len(cut.tokens) == len(cut.learned) == 64
    assert cut.learned[-1]
    assert len(short.tokens) < 64


def test_examples_with_nothing_left_to_learn_are_dropped_and_counted(read: Callable[..., DataSet]) -> None:
    long = {"role": "user", "content": "word " * 400}
    data = read(chat(long, SAY), chat(ASK, SAY), context=64, times=6)
    assert (data.cut, data.dropped, len(data.examples)) == (6, 6, 6)
    with pytest.raises(InvalidTrainingFile, match="anything left to learn"):
        read(chat(long, SAY), context=64)


def test_the_two_forms_may_be_mixed_and_blank_lines_and_a_byte_order_mark_do_not_count(
    read: Callable[..., DataSet],
) -> None:
    line = b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}'
    data = read(line, b"", b"  \t\r", json.dumps(chat(ASK, SAY)).encode() + b"\r", *[chat(ASK, SAY)] * 8, times=1)
    assert len(data.examples) == 10


def test_a_line_number_counts_blank_lines_too(read: Callable[..., DataSet]) -> None:
    with pytest.raises(InvalidTrainingFile, match="Line 3 of the training file"):
        read(chat(ASK, SAY), b"", b"{", times=1)


def forgetful(tokenizer: Any) -> TextCodec:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = FORGETFUL
    return TextCodec(changed)


def test_a_template_that_rewrites_earlier_turns_teaches_each_turn_as_it_is_asked_for(
    read: Callable[..., DataSet], tokenizer: Any
) -> None:
    codec = forgetful(tokenizer)
    first = {"role": "assistant", "content": "hm</think>A cat."}
    second = {"role": "assistant", "content": "well</think>Since May."}
    data = read(chat(ASK, first, ASK2, second), codec=codec)
    assert len(data.examples) == 20, "two for each line"
    one, two = data.examples[:2]
    assert learned(tokenizer, one) == ["hm</think>A cat.<|im_end|>"]
    assert learned(tokenizer, two) == ["well</think>Since May.<|im_end|>"]
    assert one.tokens[: one.learned.index(True)] == codec.chat([ASK])
    assert two.tokens[: two.learned.index(True)] == codec.chat([ASK, first, ASK2])
    assert "hm" not in codec.decode(two.tokens), "the thought is gone by then"


def test_turns_of_weight_0_are_no_examples_of_their_own(read: Callable[..., DataSet], tokenizer: Any) -> None:
    codec = forgetful(tokenizer)
    first = {"role": "assistant", "content": "hm</think>A cat.", "weight": 0}
    data = read(chat(ASK, first, ASK2, SAY2), codec=codec)
    assert [learned(tokenizer, e) for e in data.examples] == [["Since the storm, I think.<|im_end|>"]] * 10


def test_a_template_that_asks_differently_than_it_writes_still_teaches_when_to_stop(
    read: Callable[..., DataSet], tokenizer: Any
) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = FORGETFUL.replace("[assistant]{%- endif -%}", "[assistant]<think>{%- endif -%}")
    codec = TextCodec(changed)
    example = read(chat(ASK, SAY), codec=codec).examples[0]
    assert learned(tokenizer, example) == ["A ship's cat.<|im_end|>"]
    assert example.tokens[: example.learned.index(True)] == codec.chat([ASK])


def test_what_the_template_refuses_is_refused_with_the_line(read: Callable[..., DataSet], tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('first a user') }}{% endif %}" + FORGETFUL
    )
    with pytest.raises(InvalidTrainingFile, match=r"Line 1 of the training file .* first a user"):
        read(chat(SYSTEM, ASK, SAY), codec=TextCodec(changed))


def test_a_base_without_a_template_takes_prompts_and_completions_only(
    read: Callable[..., DataSet], tokenizer: Any
) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = None
    assert len(read({"prompt": "a", "completion": "b"}, codec=TextCodec(changed)).examples) == 10
    with pytest.raises(InvalidTrainingFile, match="no chat template"):
        read(chat(ASK, SAY), codec=TextCodec(changed))
