"""Shared beginnings with a real engine: fewer tokens are computed, and not one answer changes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from adapterhub.base.batch import KV_BLOCK
from adapterhub.base.model import prepare_base
from tests.homes import Home
from tests.tiny import (
    CPU,
    Client,
    greedy,
    kv_bytes,
    prompt_of,
    serving,
    tiny_model,
)


def engine(client: Client) -> dict[str, int]:
    return client.engine.stats().result(timeout=60)["engine"]


def whole_blocks(tokens: int) -> int:
    return tokens // KV_BLOCK * KV_BLOCK


# -- what is shared


def test_each_turn_of_a_chat_computes_only_what_is_new(home: Home, client: Client) -> None:
    said, shared = prompt_of(37), 0
    for turn in range(5):
        answer = client.ask(said, home.refs[0], max_tokens=11)
        assert answer == greedy(home.oracles[0], said, 11)
        assert engine(client)["shared_tokens"] == shared
        said += answer
        shared += whole_blocks(len(said) - 1)  # the last token of an answer is never computed
        said += prompt_of(3 + 9 * turn, seed=turn)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 64])
def test_the_same_prompt_again_computes_at_least_its_last_token(home: Home, client: Client, length: int) -> None:
    prompt = prompt_of(length, seed=length)
    expected = greedy(home.model, prompt, 8)
    for again in range(3):
        assert client.ask(prompt) == expected
        assert engine(client)["shared_tokens"] == again * whole_blocks(length - 1)


def test_four_answers_to_one_prompt_compute_it_once(home: Home, client: Client) -> None:
    prompt = prompt_of(100)
    names = [client.submit(f"choice-{i}", prompt, home.refs[1]) for i in range(4)]
    for name in names:
        assert client.tokens(name) == greedy(home.oracles[1], prompt, 8)
    assert engine(client)["shared_tokens"] == 3 * 96


def test_seeded_answers_are_the_same_with_and_without_a_shared_beginning(home: Home) -> None:
    prompt = prompt_of(50)
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 20, "frequency_penalty": 0.5}
    alone = []
    for seed in range(3):
        with serving(home.base, home.directory) as client:
            alone.append(client.ask(prompt, home.refs[0], seed=seed, **sampling))
    with serving(home.base, home.directory) as client:
        assert [client.ask(prompt, home.refs[0], seed=seed, **sampling) for seed in range(3)] == alone
        assert engine(client)["shared_tokens"] == 2 * 48


def test_sixteen_bits_answer_the_same_with_and_without_a_shared_beginning(home: Home) -> None:
    """Whatever code serves them on this machine computes each token alike, however its prompt was cut."""
    base = prepare_base("tiny", tiny_model("llama").bfloat16(), None, CPU)
    first = prompt_of(75)
    with serving(base, home.directory) as client:
        second = [*first, *client.ask(first, max_tokens=20), *prompt_of(30, seed=5)]
        shared = client.ask(second, max_tokens=40)
        assert engine(client)["shared_tokens"] == whole_blocks(94)
    with serving(base, home.directory) as client:
        assert client.ask(second, max_tokens=40) == shared


def test_a_beginning_is_shared_in_the_middle_of_a_conversation_that_parts(home: Home, client: Client) -> None:
    """An answer that is asked for again, after an edit: what comes before the edit stays."""
    said = prompt_of(64)
    client.ask([*said, *prompt_of(40, seed=1)])
    other = [*said, *prompt_of(40, seed=2)]
    assert client.ask(other) == greedy(home.model, other, 8)
    assert engine(client)["shared_tokens"] == 64


# -- with whom


def test_owners_do_not_share_though_they_say_the_same_at_once(home: Home, client: Client) -> None:
    prompt = prompt_of(70)
    names = [client.submit(owner, prompt, home.refs[0], owner=owner) for owner in ("ada", "bob", "cyd")]
    for name in names:
        assert client.tokens(name) == greedy(home.oracles[0], prompt, 8)
    assert engine(client)["shared_tokens"] == 0


def test_a_new_version_starts_anew_even_with_the_content_of_the_old(home: Home, client: Client) -> None:
    prompt, old = prompt_of(70), home.refs[0]
    new = old._replace(version="another")
    for ref, shared in [(old, 0), (new, 0), (old, 64), (new, 128), (home.refs[1], 128), (None, 128), (None, 192)]:
        client.ask(prompt, ref, owner="ada", max_tokens=1)
        assert engine(client)["shared_tokens"] == shared


# -- when blocks change hands


def test_a_shared_beginning_outlives_whoever_computed_it(home: Home) -> None:
    prompt = prompt_of(60)
    with serving(home.base, home.directory, kv_bytes=kv_bytes(home.base, 24), max_batch=3) as client:
        client.submit("first", prompt, max_tokens=100)
        client.wait_for("first", 2)
        client.submit("second", prompt, max_tokens=100)
        client.wait_for("second", 2)
        assert engine(client)["shared_tokens"] == 48
        client.engine.cancel("first")
        others = [client.submit(f"other-{i}", prompt_of(150, seed=i + 1), max_tokens=8) for i in range(3)]
        for i, name in enumerate(others):  # they take all the room that there is
            assert client.tokens(name) == greedy(home.model, prompt_of(150, seed=i + 1), 8)
        assert client.tokens("second") == greedy(home.model, prompt, 100)


def test_forgotten_beginnings_are_computed_again_and_change_no_answer(home: Home) -> None:
    """Far more conversations than the cache holds, some at once, each coming back from time to time."""
    choose = random.Random(1)
    talks = [(ref, prompt_of(30 + 7 * i, seed=i)) for i, ref in enumerate([None, *home.refs] * 2)]
    oracles = {None: home.model, **dict(zip(home.refs, home.oracles, strict=True))}
    said = [prompt for _, prompt in talks]
    with serving(home.base, home.directory, kv_bytes=kv_bytes(home.base, 20), max_batch=4) as client:
        for turn in range(12):
            chosen = choose.sample(range(len(talks)), k=3)
            names = {i: client.submit(f"{turn}-{i}", said[i], talks[i][0], max_tokens=9) for i in chosen}
            for i, name in names.items():
                answer = client.tokens(name)
                assert answer == greedy(oracles[talks[i][0]], said[i], 9)
                said[i] = [*said[i], *answer] if len(said[i]) < 150 else said[i]
        stats = engine(client)
    assert 0 < stats["shared_tokens"] < 12 * 3 * 100
    assert stats["kv_blocks_free"] == stats["kv_blocks"] == 20
