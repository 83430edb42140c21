"""Several answers to a request, log probabilities, biases and penalties, through OpenAI's own SDK."""

from __future__ import annotations

import codecs
import json
import socket
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving import BASE, Server, User, counted, eventually, running, small_config

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
WILD: dict[str, Any] = {"temperature": 2, "max_tokens": 12}


@pytest.fixture(scope="module")
def tokenizer(base_directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_directory)


@pytest.fixture(scope="module")
def unsure(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A user of a base that prefers no token by much, so that biases and penalties decide."""
    directory = tmp_path_factory.mktemp("unsure")
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    model.lm_head.weight.data /= 20
    model.save_pretrained(directory / BASE)
    AutoTokenizer.from_pretrained(base_directory).save_pretrained(directory / BASE)
    with running(small_config(directory / BASE, directory / "data")) as server:
        yield server.user()


def chat(user: User, **options: Any) -> Any:
    return user.openai.chat.completions.create(model=BASE, messages=HELLO, **options)


def complete(user: User, prompt: Any = "Once upon a time", **options: Any) -> Any:
    return user.openai.completions.create(model=BASE, prompt=prompt, **options)


@dataclass
class Told:
    """What a stream said of one choice."""

    text: str = ""
    roles: list[str] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)  # a chat's log probabilities
    offsets: list[int] = field(default_factory=list)  # of a completion's tokens


def by_choice(chunks: Iterable[Any]) -> dict[int, Told]:
    told: dict[int, Told] = defaultdict(Told)
    for chunk in chunks:
        for choice in chunk.choices:
            mine = told[choice.index]
            assert not mine.finishes, "nothing comes after the end"
            if hasattr(choice, "delta"):
                mine.text += choice.delta.content or ""
                mine.roles += [choice.delta.role] if choice.delta.role else []
                mine.tokens += choice.logprobs.content if choice.logprobs else []
            else:
                mine.text += choice.text
                mine.tokens += choice.logprobs.tokens if choice.logprobs else []
                mine.offsets += choice.logprobs.text_offset if choice.logprobs else []
            mine.finishes += [choice.finish_reason] if choice.finish_reason else []
    return told


# -- several answers


def test_choices_differ_and_the_prompt_is_counted_once(user: User) -> None:
    one = chat(user, **WILD)
    answer = chat(user, n=3, **WILD)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) == 3
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens == 36
    assert answer.usage.total_tokens == one.usage.prompt_tokens + 36
    assert len({c.message.content for c in chat(user, n=3, temperature=0, max_tokens=6).choices}) == 1


def test_a_seed_gives_the_same_choices_again_whole_and_streamed(user: User) -> None:
    whole = chat(user, n=3, seed=11, **WILD)
    expected = {c.index: c.message.content for c in whole.choices}
    assert {c.index: c.message.content for c in chat(user, n=3, seed=11, **WILD).choices} == expected
    chunks = list(chat(user, n=3, seed=11, stream=True, stream_options={"include_usage": True}, **WILD))
    told = by_choice(chunks)
    assert {index: mine.text for index, mine in told.items()} == expected
    for mine in told.values():
        assert mine.roles == ["assistant"]
        assert mine.finishes == ["length"]
    assert counted(chunks[-1].usage) == counted(whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(len(chunk.choices) == 1 for chunk in chunks[:-1])


def test_choices_of_a_stream_come_side_by_side(user: User) -> None:
    order = [chunk.choices[0].index for chunk in chat(user, n=3, stream=True, temperature=2, max_tokens=40)]
    ends = [len(order) - 1 - order[::-1].index(i) for i in range(3)]
    assert all(order.count(i) > 10 for i in range(3))
    assert max(order.index(i) for i in range(3)) < min(ends) - 30


def test_each_choice_ends_for_its_own_reason(user: User) -> None:
    texts = [c.message.content for c in chat(user, n=3, seed=3, **WILD).choices]
    stop = texts[1][30:40]
    assert [stop in text for text in texts] == [False, True, False]
    stopped = chat(user, n=3, seed=3, stop=[stop], **WILD)
    assert [c.finish_reason for c in stopped.choices] == ["length", "stop", "length"]
    assert [c.message.content for c in stopped.choices] == [texts[0], texts[1][: texts[1].index(stop)], texts[2]]
    told = by_choice(chat(user, n=3, seed=3, stop=[stop], stream=True, **WILD))
    assert [told[i].text for i in range(3)] == [c.message.content for c in stopped.choices]
    assert [told[i].finishes for i in range(3)] == [["length"], ["stop"], ["length"]]


def test_several_prompts_with_several_choices_are_numbered_prompt_by_prompt(user: User) -> None:
    prompts = ["Once upon a time", "Call me", "It was"]
    alone = [complete(user, p, n=2, seed=1, **WILD) for p in prompts]
    expected = [c.text for answer in alone for c in answer.choices]
    asked: dict[str, Any] = {"n": 2, "seed": 1, **WILD}
    together = complete(user, prompts, **asked)
    assert [(c.index, c.text) for c in together.choices] == list(enumerate(expected))
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert together.usage.completion_tokens == 6 * 12
    chunks = list(complete(user, prompts, stream=True, stream_options={"include_usage": True}, **asked))
    told = by_choice(chunks)
    assert [told[i].text for i in range(6)] == expected
    assert all(told[i].finishes == ["length"] for i in range(6))
    assert counted(chunks[-1].usage) == counted(together.usage)


def test_four_choices_compute_their_prompt_once(server: Server, user: User) -> None:
    long = [{"role": "user", "content": "word " * 200}]
    before = server.engine_stats()["shared_tokens"]
    answer = user.openai.chat.completions.create(model=BASE, messages=long, n=4, max_tokens=2)  # type: ignore[arg-type]
    assert answer.usage is not None
    shared = server.engine_stats()["shared_tokens"] - before
    found = (answer.usage.prompt_tokens - 1) // 16 * 16
    assert shared == 3 * found > 600
    again = user.openai.chat.completions.create(model=BASE, messages=long, n=2, max_tokens=2)  # type: ignore[arg-type]
    told = [a.usage.prompt_tokens_details.cached_tokens for a in (answer, again)]  # type: ignore[union-attr]
    assert told == [0, found], "what was there before the request"


# -- log probabilities


def test_the_bytes_of_log_probabilities_join_to_the_content(user: User) -> None:
    for seed in range(8):
        asked: dict[str, Any] = {"seed": seed, "logprobs": True, "top_logprobs": 5, "temperature": 2, "max_tokens": 30}
        choice = chat(user, **asked).choices[0]
        entries = choice.logprobs.content
        assert len(entries) == 30
        spoken = b"".join(bytes(entry.bytes) for entry in entries)
        known = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(spoken)  # less an unfinished character
        assert choice.message.content.rstrip("\ufffd") == known.rstrip("\ufffd")
        for entry in entries:
            assert entry.token == bytes(entry.bytes).decode(errors="replace")
            best = [other.logprob for other in entry.top_logprobs]
            assert len(best) == 5
            assert best == sorted(best, reverse=True)
            assert entry.logprob <= best[0] <= 0
        told = by_choice(chat(user, stream=True, **asked))[0]
        assert [(t.token, t.bytes) for t in told.tokens] == [(e.token, e.bytes) for e in entries]
        assert told.text == choice.message.content


def test_without_being_asked_for_there_are_no_log_probabilities(user: User) -> None:
    for options in ({}, {"logprobs": False}):
        assert chat(user, max_tokens=2, **options).choices[0].logprobs is None
        assert all(c.choices[0].logprobs is None for c in chat(user, max_tokens=2, stream=True, **options))
    assert complete(user, max_tokens=2).choices[0].logprobs is None


def test_each_choice_has_log_probabilities_of_its_own(user: User) -> None:
    asked: dict[str, Any] = {"n": 3, "seed": 1, "logprobs": True, **WILD}
    whole = chat(user, **asked)
    told = by_choice(chat(user, stream=True, **asked))
    for choice in whole.choices:
        spoken = b"".join(bytes(e.bytes) for e in choice.logprobs.content)
        assert spoken.decode(errors="replace").rstrip("\ufffd") == choice.message.content.rstrip("\ufffd")
        assert [t.token for t in told[choice.index].tokens] == [e.token for e in choice.logprobs.content]


def test_offsets_say_where_each_token_is_in_the_text_also_after_characters_of_several_tokens(
    unsure: User, tokenizer: Any
) -> None:
    """Biases leave a few tokens to choose from: the two halves of an emoji, two words, and a broken character."""
    halves = tokenizer.encode(" 😀", add_special_tokens=False)
    assert len(halves) == 2
    tokens = [*halves, *tokenizer.encode(" fox jumps", add_special_tokens=False)]
    asked: dict[str, Any] = {"max_tokens": 40, "logprobs": 3, "temperature": 2, "logit_bias": dict.fromkeys(tokens, 90)}
    found = 0
    for seed in range(6):
        choice = complete(unsure, seed=seed, **asked).choices[0]
        written, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
        assert len(written) == len(offsets) == 40, "also those at the end of which no character came"
        assert set(written) <= {" fox", " jumps", r"bytes:\x20\xf0\x9f\x98", r"bytes:\x80"}
        assert all(len(best) == 3 for best in choice.logprobs.top_logprobs), "none is written like another"
        assert offsets == sorted(offsets)
        ends = [*offsets[1:], len(choice.text)]
        for token, begin, end in zip(written, offsets, ends, strict=True):
            if not token.startswith("bytes:"):
                assert choice.text[begin:end].lstrip(" \ufffd") == token.lstrip()
        emoji = [i for i, pair in enumerate(pairwise(written)) if "😀" in spelled(*pair)]
        found += len(emoji)
        for i in emoji:
            assert choice.text[offsets[i] :].lstrip(" \ufffd").startswith("😀")
            assert offsets[i + 1] == offsets[i], "it comes with its last token"
        told = by_choice(complete(unsure, seed=seed, stream=True, **asked))[0]
        assert (told.text, told.tokens, told.offsets) == (choice.text, written, offsets)
    assert found


def spelled(*tokens: str) -> str:
    """The text of tokens that are not whole characters, as the API writes them."""
    raw = b"".join(bytes.fromhex(t[6:].replace("\\x", "")) for t in tokens if t.startswith("bytes:"))
    return raw.decode(errors="replace") if all(t.startswith("bytes:") for t in tokens) else ""


@pytest.mark.parametrize("length", [1, 6, 9])
def test_tokens_of_a_stop_string_are_told_no_more_than_its_text(user: User, length: int) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logprobs": True}
    whole = chat(user, **asked).choices[0]
    text = whole.message.content
    starts = [len(b"".join(bytes(e.bytes) for e in whole.logprobs.content[:i]).decode()) for i in range(12)]
    for at in range(3, 40, 5):
        stop = text[at : at + length]
        cut = text.index(stop)
        expected = [e.token for e, start in zip(whole.logprobs.content, starts, strict=True) if start < cut]
        choice = chat(user, stop=stop, **asked).choices[0]
        assert (choice.message.content, choice.finish_reason) == (text[:cut], "stop")
        assert [e.token for e in (choice.logprobs.content if choice.logprobs else [])] == expected
        told = by_choice(chat(user, stop=stop, stream=True, **asked))[0]
        assert (told.text, [t.token for t in told.tokens], told.finishes) == (text[:cut], expected, ["stop"])


def test_tokens_held_back_for_a_stop_string_that_does_not_come_are_told(user: User) -> None:
    asked: dict[str, Any] = {"prompt": "Once", "temperature": 0, "max_tokens": 12, "logprobs": 0}
    whole = complete(user, **asked).choices[0]
    almost = [whole.text[5:30] + "\0", whole.text[-4:] + "\0"]
    choice = complete(user, stop=almost, **asked).choices[0]
    assert (choice.text, choice.logprobs) == (whole.text, whole.logprobs)
    told = by_choice(complete(user, stop=almost, stream=True, **asked))[0]
    assert (told.text, told.tokens, told.offsets) == (whole.text, whole.logprobs.tokens, whole.logprobs.text_offset)


# -- biases and penalties


def test_a_bias_forces_a_token_and_forbids_one(unsure: User, tokenizer: Any) -> None:
    [fox] = tokenizer.encode(" fox", add_special_tokens=False)
    for sampling in ({"temperature": 0}, {"temperature": 2, "top_p": 0.9}):
        answer = chat(unsure, logit_bias={str(fox): 100}, max_tokens=5, **sampling)
        assert answer.choices[0].message.content == " fox" * 5
    plain = complete(unsure, temperature=0, max_tokens=1, logprobs=2).choices[0]
    [best] = tokenizer.encode(plain.text, add_special_tokens=False)
    other = complete(unsure, temperature=0, max_tokens=1, logprobs=2, logit_bias={str(best): -100}).choices[0]
    assert other.text == list(plain.logprobs.top_logprobs[0])[1]
    assert other.logprobs.top_logprobs == plain.logprobs.top_logprobs, "the model's own, whatever the bias"


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_a_penalty_breaks_a_repetition(unsure: User, tokenizer: Any, penalty: str) -> None:
    """Two tokens, of which the base alone would say one again and again."""
    words = tokenizer.encode(" fox jumps", add_special_tokens=False)
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "logit_bias": dict.fromkeys(words, 80)}
    answers = {value: complete(unsure, **{penalty: value}, **asked).choices[0].text for value in (-2, 0, 2)}
    again = complete(unsure, **{penalty: 2}, n=2, **asked)
    assert [c.text for c in again.choices] == [answers[2]] * 2, "what one choice said does not count in another"
    assert all(set(text.split()) <= {"fox", "jumps"} for text in answers.values())
    assert len(set(answers.values())) > 1


# -- when it does not end well


def test_a_client_that_leaves_frees_all_of_its_answers(server: Server, user: User) -> None:
    def idle() -> bool:
        stats = server.engine_stats()
        return stats["running"] == stats["waiting"] == 0 and not server.hub._streams

    eventually(idle)
    endless: dict[str, Any] = {"n": 3, "max_tokens": 480, "extra_body": {"ignore_eos": True}, "temperature": 1}
    for read in (0, 1, 7, 30):
        stream = chat(user, stream=True, **endless)
        for _, _ in zip(range(read), stream, strict=False):
            pass
        stream.close()
        eventually(idle)
    body = {"model": BASE, "messages": HELLO, "n": 3, "max_tokens": 480, "ignore_eos": True}
    with sent(user, body):
        eventually(lambda: server.engine_stats()["running"] == 3)
    eventually(idle)
    assert server.engine_stats()["kv_blocks_free"] == server.engine_stats()["kv_blocks"]


def test_a_client_that_stops_reading_and_leaves_frees_all_of_its_answers(server: Server, user: User) -> None:
    body = {"model": BASE, "messages": HELLO, "n": 16, "max_tokens": 480, "ignore_eos": True, "stream": True}
    with sent(user, {**body, "logprobs": True, "top_logprobs": 20}):
        eventually(lambda: server.engine_stats()["running"] == 16)
    eventually(lambda: server.engine_stats()["running"] == 0 and not server.hub._streams)


def sent(user: User, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent and nothing is read."""
    where, content = urlsplit(user.url), json.dumps(body).encode()
    connection = socket.create_connection((where.hostname, where.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {user.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def test_answers_that_find_no_place_take_those_that_did_with_them(base_directory: Path, tmp_path: Path) -> None:
    """While the engine is busy with something else, so that it is known how many wait."""
    with running(small_config(base_directory, tmp_path, max_batch=1, max_waiting=3)) as server:
        engine, user, busy = server.hub.engine.engines[0], server.user(), threading.Event()
        engine._inbox.ask(busy.wait)
        stream: list[Any] = []
        waiting = threading.Thread(target=lambda: stream.extend(chat(user, n=2, stream=True, max_tokens=3)))
        waiting.start()
        eventually(lambda: engine.occupancy.requests == 2)
        for ask in (chat, complete):
            for streamed in (False, True):
                with pytest.raises(openai.RateLimitError) as refused:
                    ask(user, n=4, stream=streamed)
                assert refused.value.response.headers["retry-after"] == "1"
                assert refused.value.code == "queue_full"
        busy.set()
        waiting.join()
        assert {index: mine.finishes for index, mine in by_choice(stream).items()} == {0: ["length"], 1: ["length"]}
        assert len(chat(user, n=4, max_tokens=2).choices) == 4
