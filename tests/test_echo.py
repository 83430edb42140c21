"""Prompts that are echoed, with their log probabilities, and the best of several answers, through OpenAI's own SDK."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer, PreTrainedModel

from tests.serving import BASE, CONTEXT, PeftFiles, Server, User, eventually
from tests.tiny import full_logits, greedy

TEXTS = ["Once upon a time", " A fox, <|im_start|>und Füchse: 狐 🦊\n\n  jump ", "x"]


@pytest.fixture(scope="module")
def tokenizer(base_directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_directory)


def complete(user: User, prompt: Any, **options: Any) -> Any:
    return user.openai.completions.create(**{"model": BASE, "prompt": prompt, "temperature": 0, **options})


def check(choice: Any, tokens: list[int], model: Any, best: int, prompt: int) -> None:
    """All that is said of `tokens`, of which so many are the prompt's, is what `model` itself says."""
    said = choice.logprobs
    rows = full_logits(model, tokens).log_softmax(-1)
    expected = [rows[i, token].item() for i, token in enumerate(tokens[1:])]
    assert (said.token_logprobs[0], said.top_logprobs[0]) == (None, None)
    assert said.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    for told, row in zip(said.top_logprobs[1:], rows, strict=False):
        assert sorted(told.values(), reverse=True) == pytest.approx(row.topk(best).values.tolist(), abs=1e-3)
    ends = [*said.text_offset[1:], len(choice.text)]
    for token, begin, end in list(zip(said.tokens, said.text_offset, ends, strict=True))[:prompt]:
        if not token.startswith("bytes:"):
            assert choice.text[begin:end].endswith(token), (token, choice.text[begin:end])


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_text_is_echoed_as_it_was_given_with_the_models_own_log_probabilities(
    user: User, base_model: PreTrainedModel, tokenizer: Any, count: int
) -> None:
    """As harnesses for evaluation ask: with no token of an answer, or one."""
    answer = complete(user, TEXTS, echo=True, logprobs=2, max_tokens=count)
    for choice, text in zip(answer.choices, TEXTS, strict=True):
        prompt = tokenizer(text).input_ids
        tokens = prompt + (greedy(base_model, prompt, count) if count else [])
        assert choice.text.startswith(text)
        assert choice.finish_reason == "length"
        check(choice, tokens, base_model, 2, len(prompt))
    assert answer.usage.completion_tokens == 3 * count


def test_an_adapters_prompts_are_its_own(user: User, adapter: PeftFiles, tokenizer: Any) -> None:
    user.import_adapter(adapter, "mine")
    prompt = tokenizer(TEXTS[0] * 40).input_ids
    for _ in range(2):  # from the cache as well
        [choice] = complete(user, prompt, model=f"{user.owner}/mine", echo=True, logprobs=1, max_tokens=0).choices
        check(choice, prompt, adapter.model, 1, len(prompt))


def test_token_ids_are_echoed_as_their_text_up_to_a_character_that_is_not_whole(user: User, tokenizer: Any) -> None:
    fox = tokenizer("Füchse 🦊").input_ids
    whole = complete(user, fox, echo=True, max_tokens=0)
    assert whole.choices[0].text == "Füchse 🦊"
    assert whole.choices[0].logprobs is None
    cut = complete(user, fox[:-1], echo=True, logprobs=0, max_tokens=0).choices[0]
    assert cut.text == "Füchse"
    assert cut.logprobs.text_offset[-2:] == [6, 6]
    answer = complete(user, fox[:-1], max_tokens=4).choices[0].text
    assert complete(user, fox[:-1], echo=True, max_tokens=4).choices[0].text == "Füchse" + answer


def test_what_is_streamed_is_what_is_told_whole(user: User) -> None:
    asked: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 6, "n": 2, "seed": 3, "temperature": 1}
    for changes in ({}, {"max_tokens": 0}, {"logprobs": None}, {"stop": "t"}):
        whole = complete(user, TEXTS, **{**asked, **changes})
        texts: dict[int, str] = dict.fromkeys(range(6), "")
        said: dict[int, list[Any]] = {i: [] for i in range(6)}
        for chunk in complete(user, TEXTS, **{**asked, **changes}, stream=True):
            [choice] = chunk.choices
            texts[choice.index] += choice.text
            if choice.logprobs:
                told = choice.logprobs
                said[choice.index] += zip(told.tokens, told.text_offset, told.token_logprobs, strict=True)
        for choice in whole.choices:
            assert texts[choice.index] == choice.text
            assert choice.text.startswith(TEXTS[choice.index // 2]), "a stop string is looked for in the answer alone"
            told = choice.logprobs
            expected = zip(told.tokens, told.text_offset, told.token_logprobs, strict=True) if told else ()
            assert said[choice.index] == list(expected)


def test_a_request_without_an_answer_is_counted(server: Server) -> None:
    user = server.user()
    answer = complete(user, [5] * CONTEXT, max_tokens=0)
    assert [(c.text, c.finish_reason) for c in answer.choices] == [("", "length")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (CONTEXT, 0)

    def counted() -> Any:
        rows = user.http.get("/v1/usage").raise_for_status().json()["data"]
        return [(r["requests"], r["input_tokens"], r["output_tokens"]) for r in rows]

    assert eventually(counted) == [(1, CONTEXT, 0)]


def test_more_log_probabilities_of_prompts_than_are_kept_are_refused(user: User) -> None:
    prompts = [[5] * 400] * 20
    for refused in ({"logprobs": 20}, {"logprobs": 1, "n": 16}, {"logprobs": 1, "best_of": 20, "max_tokens": 1}):
        with pytest.raises(openai.BadRequestError, match="fewer prompts") as error:
            complete(user, prompts, echo=True, **refused)
        assert error.value.param == "logprobs"


# -- the best of several


def test_the_best_of_several_are_those_with_the_likeliest_tokens(user: User) -> None:
    asked: dict[str, Any] = {"seed": 11, "temperature": 1.5, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
    every = complete(user, TEXTS[:2], n=6, logprobs=0, **asked)
    expected = []
    for first in (0, 6):
        answers = every.choices[first : first + 6]
        ranked = sorted(answers, key=lambda c: -fmean(c.logprobs.token_logprobs))
        expected += [choice.text for choice in ranked[:2]]
    best = complete(user, TEXTS[:2], n=2, best_of=6, **asked)
    assert [choice.text for choice in best.choices] == expected
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices), "none were asked for"
    for count in ("prompt_tokens", "completion_tokens"):  # what was not told was made as well
        assert getattr(best.usage, count) == getattr(every.usage, count)
    told = complete(user, TEXTS[:2], n=2, best_of=6, logprobs=1, **asked)
    assert [choice.text for choice in told.choices] == expected
    assert all(len(choice.logprobs.tokens) == 6 for choice in told.choices)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"best_of": 2, "n": 3}, "n=3"),
        ({"best_of": 2, "stream": True}, "stream=false"),
        ({"best_of": 2, "max_tokens": 0}, "max_tokens"),
        ({"best_of": 21}, "less than or equal to 20"),
        ({"best_of": 0}, "greater than or equal to 1"),
    ],
)
def test_a_best_of_that_cannot_be_told_is_refused(user: User, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as error:
        complete(user, "Once", **fields)
    assert error.value.param == "best_of"


def test_a_best_of_that_leaves_nothing_to_choose_is_an_answer_like_others(user: User) -> None:
    asked: dict[str, Any] = {"n": 2, "seed": 5, "temperature": 1, "max_tokens": 4}
    plain = complete(user, "Once", **asked)
    assert [c.text for c in complete(user, "Once", best_of=2, **asked).choices] == [c.text for c in plain.choices]
    assert list(complete(user, "Once", best_of=2, stream=True, **asked))
