"""The engine with its real thread, real blocks and a tiny base; greedy answers are compared with `generate`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, PreTrainedModel

from adapterhub.base.model import Base
from adapterhub.base.request import Finish, Output
from adapterhub.errors import (
    BadRequest,
    BlockDamaged,
    ContextLengthExceeded,
    DeadlineExceeded,
    ServerFault,
    TooManyRequests,
    Unavailable,
)
from adapterhub.swap.allocator import aligned
from adapterhub.swap.block import Block, block_path
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.policies import Policy, Rules, TierRules
from adapterhub.swap.ref import AdapterRef, Tier, Use
from adapterhub.swap.store import Store
from tests.tiny import (
    GROUPED,
    Client,
    encoded,
    full_logits,
    greedy,
    kv_bytes,
    peft_model,
    prompt_of,
    saved,
    serving,
    serving_twin,
    stored,
    tiny_model,
)

USERS = 8


@dataclass
class Town:
    """A base, and users who each have an adapter."""

    model: PreTrainedModel
    base: Base
    refs: list[AdapterRef]
    oracles: list[PeftModel]
    directory: Path


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Town:
    directory = tmp_path_factory.mktemp("town")
    model = tiny_model("llama")
    town = Town(model, serving_twin(model), [], [], directory)
    for seed in range(USERS):
        wrapped = peft_model(model, seed=seed, r=1 + seed % 4, size=0.2)
        block = encoded(saved(wrapped, directory / f"peft-{seed}"), town.base)
        town.oracles.append(wrapped)
        town.refs.append(stored(block, directory / "blobs"))
    return town


@contextmanager
def held_up(blobs: Path, client: Client) -> Iterator[AdapterRef]:
    """An adapter whose file is a pipe, which keeps one reader waiting; it fails at the end of the block."""
    pipe = block_path(blobs, "pipe")
    os.mkfifo(pipe)
    ref = AdapterRef("pipe", "pipe", 4)
    name = client.submit("held up", prompt_of(3), ref)
    try:
        yield ref
        assert client.heard(name) == []
    finally:
        with pipe.open("wb"):
            pipe.unlink()  # the reader looks again whether it is damaged
    assert isinstance(client.error(name), BlockDamaged)


# -- continuous batching


def test_requests_join_and_leave_while_others_run(town: Town) -> None:
    long, short = prompt_of(10, 1), prompt_of(30, 2)
    with serving(town.base, town.directory) as client:
        client.submit("long", long, town.refs[0], max_tokens=60)
        client.wait_for("long", 5)
        client.submit("short", short, town.refs[1], max_tokens=5)
        assert client.tokens("short") == greedy(town.oracles[1], short, 5)
        assert client.tokens("long") == greedy(town.oracles[0], long, 60)
        ends = [o.request for o in client.heard() if o.last]
    assert ends == ["short", "long"]


def test_more_requests_than_a_batch_holds_are_all_answered(town: Town) -> None:
    prompt = prompt_of(6)
    with serving(town.base, town.directory, max_batch=2) as client:
        names = [client.submit(str(i), prompt) for i in range(9)]
        assert {tuple(client.tokens(name)) for name in names} == {tuple(greedy(town.model, prompt, 8))}


def test_the_first_output_says_where_the_adapter_was(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        for name, ref, tier in [
            ("first", town.refs[0], Tier.DISK),
            ("second", town.refs[0], Tier.DEVICE),
            ("base", None, Tier.BASE),
        ]:
            first, *rest = client.wait_for(client.submit(name, prompt_of(4), ref))
            assert first.origin is not None
            assert first.origin.tier is tier
            assert (first.origin.load_ms > 0) is (tier is Tier.DISK)
            assert all(o.origin is None for o in rest)
        assert client.engine.tiers_of([town.refs[0].digest, town.refs[1].digest]).result(5) == [Tier.DEVICE, Tier.DISK]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_an_answer_ends_with_its_last_token(town: Town, count: int) -> None:
    with serving(town.base, town.directory) as client:
        outputs = client.wait_for(client.submit("one", prompt_of(4), max_tokens=count))
    assert [o.finish for o in outputs] == [None] * (count - 1) + [Finish.LENGTH]
    assert all(o.token is not None for o in outputs)


# -- cancelling


def test_a_running_request_can_be_cancelled(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        client.submit("gone", prompt_of(10), town.refs[0], max_tokens=200)
        client.submit("stays", prompt_of(10), town.refs[0], max_tokens=40)
        client.wait_for("gone", 3)
        client.engine.cancel("gone")
        stats = client.engine.stats().result(5)["engine"]
        heard = len(client.heard("gone"))
        assert stats["running"] == 1
        assert client.tokens("stays") == greedy(town.oracles[0], prompt_of(10), 40)
        assert len(client.heard("gone")) == heard < 200
        stats = client.engine.stats().result(5)["engine"]
        assert (stats["running"], stats["kv_blocks_free"]) == (0, stats["kv_blocks"])


def test_a_waiting_request_can_be_cancelled(town: Town) -> None:
    with serving(town.base, town.directory, max_batch=1) as client:
        client.submit("first", prompt_of(10), max_tokens=100)
        client.submit("gone", prompt_of(10), town.refs[0])
        client.submit("next", prompt_of(10))
        client.engine.cancel("gone")
        client.tokens("next")
        assert client.heard("gone") == []


def test_a_request_whose_adapter_is_on_its_way_can_be_cancelled(town: Town, tmp_path: Path) -> None:
    blobs = shutil.copytree(town.directory / "blobs", tmp_path / "blobs")
    with serving(town.base, tmp_path, load_threads=1) as client, held_up(blobs, client):
        client.submit("gone", prompt_of(10), town.refs[0])
        client.ask(prompt_of(5))  # by then its load has begun
        assert client.engine.evict(town.refs[0].digest).result(5) is False
        client.engine.cancel("gone")
        client.ask(prompt_of(5))
    assert client.heard("gone") == []


def test_cancelling_what_is_unknown_or_over_does_nothing(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        client.engine.cancel("never was")
        client.tokens(client.submit("over", prompt_of(3)))
        client.engine.cancel("over")
        assert client.ask(prompt_of(3)) == greedy(town.model, prompt_of(3), 8)


# -- sampling


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(town: Town) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 20}
    with serving(town.base, town.directory) as client:
        alone = [client.ask(prompt_of(9), town.refs[0], seed=seed, **sampling) for seed in range(4)]
        others = [client.submit(f"other-{i}", prompt_of(5 + i, i), town.refs[i], **sampling) for i in range(5)]
        names = [client.submit(str(seed), prompt_of(9), town.refs[0], seed=seed, **sampling) for seed in range(4)]
        together = [client.tokens(name) for name in names]
        for name in others:
            client.tokens(name)
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_without_a_seed_answers_differ(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        answers = {tuple(client.ask(prompt_of(9), temperature=1.0, max_tokens=20)) for _ in range(3)}
    assert len(answers) == 3


@pytest.fixture(scope="module")
def small_vocabulary() -> PreTrainedModel:
    return tiny_model(LlamaConfig(**{**GROUPED, "vocab_size": 12}))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (0.8, 0.5), (1.5, 0.01)])
def test_tokens_are_drawn_with_their_probabilities(
    small_vocabulary: PreTrainedModel, tmp_path: Path, temperature: float, top_p: float
) -> None:
    prompt, draws = [3, 1, 4, 1, 5], 1500
    exact = (full_logits(small_vocabulary, prompt)[-1].double() / temperature).softmax(-1)
    ordered, order = exact.sort(descending=True)
    nucleus = order[: int((ordered.cumsum(-1) < top_p).sum()) + 1]
    expected = torch.zeros_like(exact).scatter(0, nucleus, exact[nucleus])
    expected /= expected.sum()
    with serving(serving_twin(small_vocabulary), tmp_path, max_waiting=draws) as client:
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": 1}
        names = [client.submit(str(seed), prompt, seed=seed, **sampling) for seed in range(draws)]
        drawn = torch.tensor([client.tokens(name)[0] for name in names])
    counts = drawn.bincount(minlength=12).double()
    assert set(drawn.tolist()) <= set(nucleus.tolist())
    likely = expected * draws >= 5
    chi_square = ((counts - expected * draws) ** 2 / (expected * draws))[likely].sum().item()
    freedom = int(likely.sum()) - 1
    assert chi_square <= freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("sampling", [{"top_p": 0.0}, {"temperature": 1e-6}, {"temperature": 1e-40}])
def test_the_narrowest_sampling_is_greedy(town: Town, sampling: dict[str, float]) -> None:
    with serving(town.base, town.directory) as client:
        answer = client.ask(prompt_of(9), **{"temperature": 1.0, "max_tokens": 12, **sampling})
    assert answer == greedy(town.model, prompt_of(9), 12)


# -- the end of a text


@pytest.fixture(scope="module")
def ending(town: Town) -> tuple[Base, int]:
    """A base that would end its text after a few greedy tokens, and the token it ends with."""
    end = greedy(town.model, prompt_of(9), 5)[4]
    return dataclasses.replace(town.base, end_tokens=frozenset({end, 2})), end


def test_an_end_token_ends_the_text_and_is_told(town: Town, ending: tuple[Base, int]) -> None:
    base, end = ending
    plain = greedy(town.model, prompt_of(9), 20)
    with serving(base, town.directory) as client:
        outputs = client.wait_for(client.submit("one", prompt_of(9), max_tokens=20))
    assert [o.token.id for o in outputs if o.token] == plain[: plain.index(end) + 1]
    assert outputs[-1].finish is Finish.STOP


def test_ignore_eos_goes_on_to_the_length(town: Town, ending: tuple[Base, int]) -> None:
    with serving(ending[0], town.directory) as client:
        outputs = client.wait_for(client.submit("one", prompt_of(9), max_tokens=20, ignore_eos=True))
    assert [o.token.id for o in outputs if o.token] == greedy(town.model, prompt_of(9), 20)
    assert outputs[-1].finish is Finish.LENGTH


@pytest.mark.parametrize("least", [1, 8, 20])
def test_min_tokens_forbids_an_earlier_end(town: Town, ending: tuple[Base, int], least: int) -> None:
    base, end = ending
    ids = torch.tensor([prompt_of(9)])
    expected = town.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        min_new_tokens=least,
        eos_token_id=[end, 2],
        do_sample=False,
        pad_token_id=0,
    )[0, 9:].tolist()
    with serving(base, town.directory) as client:
        assert client.ask(prompt_of(9), max_tokens=20, min_tokens=least) == expected


# -- length and the KV cache


def test_what_cannot_fit_into_the_context_is_refused_at_once(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        for length, count in [(250, 7), (257, 1), (1000, 1)]:
            with pytest.raises(ContextLengthExceeded, match=f"256 tokens. You asked for {length + count}"):
                client.submit("long", prompt_of(length), max_tokens=count)
        assert client.ask(prompt_of(249), max_tokens=7) == greedy(town.model, prompt_of(249), 7)


def test_a_kv_cache_smaller_than_the_context_is_the_limit(town: Town) -> None:
    with serving(town.base, town.directory, kv_bytes=kv_bytes(town.base, 3)) as client:
        with pytest.raises(ContextLengthExceeded, match="48 tokens"):
            client.submit("long", prompt_of(30), max_tokens=19)
        assert client.ask(prompt_of(30), max_tokens=18) == greedy(town.model, prompt_of(30), 18)
        assert client.ask(prompt_of(47), max_tokens=1) == greedy(town.model, prompt_of(47), 1)


def test_a_full_kv_cache_makes_the_youngest_start_over_and_changes_no_answer(town: Town) -> None:
    """All four begin (two blocks each), and need four blocks each in the end, of eight."""
    prompts = [prompt_of(20, seed) for seed in range(4)]
    with serving(town.base, town.directory, kv_bytes=kv_bytes(town.base, 8)) as client:
        for ref in town.refs[:4]:  # so that they are admitted in order
            client.ask([5], ref, max_tokens=1)
        names = [client.submit(str(i), p, town.refs[i], max_tokens=40) for i, p in enumerate(prompts)]
        answers = [client.tokens(name) for name in names]
        heard = [o.request for o in client.heard()]
    assert answers == [greedy(town.oracles[i], p, 40) for i, p in enumerate(prompts)]
    ends = [len(heard) - 1 - heard[::-1].index(name) for name in names]
    assert all(heard.index(name) < min(ends) for name in names), "they did not run at once"
    assert max(ends[:2]) < min(ends[2:]), "the youngest give way"


def test_seeded_answers_survive_starting_over(town: Town) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "max_tokens": 40}
    with serving(town.base, town.directory) as client:
        alone = [client.ask(prompt_of(20, i), seed=i, **sampling) for i in range(4)]
    with serving(town.base, town.directory, kv_bytes=kv_bytes(town.base, 8)) as client:
        names = [client.submit(str(i), prompt_of(20, i), seed=i, **sampling) for i in range(4)]
        assert [client.tokens(name) for name in names] == alone


# -- shared beginnings


def test_the_next_turn_of_a_conversation_is_answered_as_from_the_start(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        conversation = prompt_of(40)
        for turn in range(3):
            answer = client.ask(conversation, town.refs[0], owner="ada", max_tokens=10)
            assert answer == greedy(town.oracles[0], conversation, 10)
            conversation += answer + prompt_of(7, turn)
        assert client.engine.stats().result(5)["engine"]["shared_tokens"] == 48 + 64


def test_no_beginning_is_shared_between_owners_adapters_or_with_the_base(town: Town) -> None:
    prompt = prompt_of(70)
    with serving(town.base, town.directory) as client:
        for oracle, ref, owner in [
            (town.oracles[0], town.refs[0], "ada"),
            (town.oracles[0], town.refs[0], "bob"),
            (town.oracles[1], town.refs[1], "ada"),
            (town.oracles[0], town.refs[0]._replace(version="2"), "ada"),
            (town.model, None, "ada"),
        ]:
            assert client.ask(prompt, ref, owner=owner) == greedy(oracle, prompt, 8)
        assert client.engine.stats().result(5)["engine"]["shared_tokens"] == 0


def test_what_a_failed_request_computed_is_shared_with_nobody(town: Town, tmp_path: Path) -> None:
    """The same prompt and owner, once with numbers that overflow and once without."""
    shutil.copytree(town.directory / "blobs", tmp_path / "blobs")
    good = encoded(saved(town.oracles[0], tmp_path / "peft"), town.base)
    huge = stored(Block(good.meta, torch.full_like(good.payload, 1e30)), tmp_path / "blobs")
    with serving(town.base, tmp_path, kv_bytes=kv_bytes(town.base, 6)) as client:
        assert client.error(client.submit("bad", prompt_of(70), huge, owner="ada")).code == "not_finite"
        assert client.ask(prompt_of(70), owner="ada") == greedy(town.model, prompt_of(70), 8)
        assert client.ask(prompt_of(70), town.refs[0], owner="ada") == greedy(town.oracles[0], prompt_of(70), 8)


# -- adapters and the pool


def test_an_adapter_on_its_way_does_not_stop_the_others(town: Town, tmp_path: Path) -> None:
    blobs = shutil.copytree(town.directory / "blobs", tmp_path / "blobs")
    with serving(town.base, tmp_path, load_threads=1) as client:
        client.ask(prompt_of(4), town.refs[0])
        with held_up(blobs, client):
            client.submit("behind", prompt_of(7), town.refs[1])
            assert client.ask(prompt_of(7)) == greedy(town.model, prompt_of(7), 8)
            assert client.ask(prompt_of(7), town.refs[0]) == greedy(town.oracles[0], prompt_of(7), 8)
            assert client.heard("behind") == []
        assert client.tokens("behind") == greedy(town.oracles[1], prompt_of(7), 8)


def test_more_adapters_than_the_pool_holds_are_all_served(town: Town) -> None:
    room = sum(sorted(ref.nbytes for ref in town.refs)[-3:]) + 3 * 256
    prompts = [prompt_of(4 + i, i) for i in range(USERS)]
    with serving(town.base, town.directory, device_bytes=room) as client:
        names = {
            (user, turn): client.submit(f"{user}-{turn}", prompts[user], town.refs[user])
            for turn in range(3)
            for user in range(USERS)
        }
        for (user, _), name in names.items():
            assert client.tokens(name) == greedy(town.oracles[user], prompts[user], 8)
        stats = client.engine.stats().result(5)["tiers"]["device"]
    assert stats["evictions"] >= USERS - 5  # no six of them fit, in whatever order they came
    assert stats["pinned"] == 0


def test_a_pool_for_one_adapter_serves_them_one_after_another(town: Town) -> None:
    with serving(town.base, town.directory, device_bytes=max(r.nbytes for r in town.refs) + 256) as client:
        names = [client.submit(str(user), prompt_of(5), ref) for user, ref in enumerate(town.refs)]
        base = client.submit("base", prompt_of(5))
        for oracle, name in zip(town.oracles, names, strict=True):
            assert client.tokens(name) == greedy(oracle, prompt_of(5), 8)
        client.tokens(base)


def test_an_adapter_larger_than_the_pool_is_an_error_of_its_own_requests(town: Town) -> None:
    small, large = (choose(town.refs, key=lambda ref: ref.nbytes) for choose in (min, max))
    with serving(town.base, town.directory, device_bytes=large.nbytes - 1) as client:
        client.submit("large", prompt_of(5), large)
        client.submit("small", prompt_of(5), small)
        error = client.error("large")
        assert (error.code, error.status) == ("adapter_too_large", 503)
        assert client.tokens("small") == greedy(town.oracles[town.refs.index(small)], prompt_of(5), 8)


def test_a_damaged_or_missing_block_fails_its_own_requests_only(town: Town, tmp_path: Path) -> None:
    blobs = shutil.copytree(town.directory / "blobs", tmp_path / "blobs")
    block_path(blobs, town.refs[0].digest).unlink()
    damaged = block_path(blobs, town.refs[1].digest)
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with serving(town.base, tmp_path) as client:
        names = [client.submit(f"{turn}-{user}", prompt_of(6), town.refs[user]) for turn in "ab" for user in range(4)]
        for name in names:
            user = int(name[-1])
            if user < 2:
                assert isinstance(client.error(name), BlockDamaged)
            else:
                assert client.tokens(name) == greedy(town.oracles[user], prompt_of(6), 8)
        shutil.copy(block_path(town.directory / "blobs", town.refs[0].digest), blobs)
        assert client.ask(prompt_of(6), town.refs[0]) == greedy(town.oracles[0], prompt_of(6), 8)


@pytest.mark.parametrize("length", [5, 60])
def test_an_adapter_whose_numbers_overflow_fails_alone_and_leaves_nothing_in_the_cache(
    town: Town, tmp_path: Path, length: int
) -> None:
    shutil.copytree(town.directory / "blobs", tmp_path / "blobs")
    good = encoded(saved(town.oracles[0], tmp_path / "peft"), town.base)
    huge = stored(Block(good.meta, torch.full_like(good.payload, 1e30)), tmp_path / "blobs")
    with serving(town.base, tmp_path, kv_bytes=kv_bytes(town.base, 6), max_step_tokens=32) as client:
        for turn in range(3):
            bad = client.submit(f"bad-{turn}", prompt_of(length), huge)
            fine = client.submit(f"fine-{turn}", prompt_of(9), town.refs[1])
            error = client.error(bad)
            assert isinstance(error, ServerFault)
            assert error.code == "not_finite"
            assert client.tokens(fine) == greedy(town.oracles[1], prompt_of(9), 8)
            # the whole cache, in which the other has been
            assert client.ask(prompt_of(80), max_tokens=16) == greedy(town.model, prompt_of(80), 16)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox", "gemma2"])
def test_overflow_in_sixteen_bits_leaves_nothing_in_the_cache_either(family: str, tmp_path: Path) -> None:
    """The same by whatever code serves sixteen bits on this machine."""
    base = serving_twin(tiny_model(family).bfloat16())
    good = encoded(saved(peft_model(tiny_model(family)), tmp_path / "peft"), base)
    huge = stored(Block(good.meta, torch.full_like(good.payload, 1e30)), tmp_path / "blobs")
    with serving(base, tmp_path, kv_bytes=kv_bytes(base, 6), max_step_tokens=32) as client:
        before = client.ask(prompt_of(80), max_tokens=16)
        for length in (5, 60, 1):
            assert client.error(client.submit(f"bad-{length}", prompt_of(length), huge)).code == "not_finite"
            assert client.ask(prompt_of(80), max_tokens=16) == before


def test_evicting_an_adapter_in_use_waits_for_its_last_request(town: Town) -> None:
    ref = town.refs[2]
    with serving(town.base, town.directory) as client:
        client.submit("long", prompt_of(8), ref, max_tokens=100)
        client.wait_for("long", 2)
        assert client.engine.evict(ref.digest).result(5) is False
        assert client.tokens("long") == greedy(town.oracles[2], prompt_of(8), 100)
        assert client.engine.tiers_of([ref.digest]).result(5) == [Tier.DISK]
        assert client.engine.evict(ref.digest).result(5) is True
        assert client.ask(prompt_of(8), ref) == greedy(town.oracles[2], prompt_of(8), 8)


def test_a_hint_brings_an_adapter_before_it_is_asked_for(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        client.engine.prefetch(town.refs[3])
        while client.engine.tiers_of([town.refs[3].digest]).result(5) != [Tier.DEVICE]:
            pass
        first = client.wait_for(client.submit("one", prompt_of(4), town.refs[3]))[0]
        assert first.origin is not None
        assert first.origin.tier is Tier.DEVICE
        client.engine.prefetch(AdapterRef("gone", "gone", 4))  # never fails
        assert client.ask(prompt_of(4), town.refs[3]) == greedy(town.oracles[3], prompt_of(4), 8)


def test_adapters_of_those_far_back_in_the_queue_are_read_ahead(town: Town) -> None:
    with serving(town.base, town.directory, max_batch=1) as client:
        client.submit("running", prompt_of(4), max_tokens=200)
        names = [client.submit(str(user), prompt_of(5), town.refs[user]) for user in range(3)]
        wanted = [town.refs[user].digest for user in range(3)]
        while client.engine.tiers_of(wanted).result(5) != [Tier.DEVICE] * 3:
            assert not any(o.last for o in client.heard("running"))
        for user, name in enumerate(names):
            assert client.tokens(name) == greedy(town.oracles[user], prompt_of(5), 8)


def order_of_ends(client: Client, *names: str) -> list[str]:
    for name in names:
        client.tokens(name)
    return [o.request for o in client.heard() if o.last and o.request in names]


def test_who_finds_no_room_holds_up_nobody_whose_adapter_is_in_use_already(town: Town) -> None:
    mine, cold = town.refs[0], town.refs[4]  # of one size, and the pool holds one
    with serving(town.base, town.directory, device_bytes=mine.nbytes + 256) as client:
        client.submit("long", prompt_of(4), mine, max_tokens=200)
        client.wait_for("long", 2)
        client.submit("cold", prompt_of(5), cold)
        client.submit("short", prompt_of(6), mine)
        assert order_of_ends(client, "long", "cold", "short") == ["short", "long", "cold"]
        for name, oracle, length in (("cold", 4, 5), ("short", 0, 6)):
            assert client.tokens(name) == greedy(town.oracles[oracle], prompt_of(length), 8)


def test_who_finds_no_room_holds_up_nobody_whose_adapter_is_on_the_device_and_leaves_it_room(town: Town) -> None:
    small, large, cold = town.refs[0], town.refs[2], town.refs[6]  # ranks 1, 3 and 3
    room = small.nbytes + large.nbytes + 512
    with serving(town.base, town.directory, device_bytes=room, max_batch=3) as client:
        client.ask(prompt_of(4), small)
        client.submit("long", prompt_of(4), large, max_tokens=200)
        client.wait_for("long", 2)
        for number in range(4):  # more than a batch
            client.submit(f"cold {number}", prompt_of(5), cold, max_tokens=1)
        client.submit("short", prompt_of(6), small)
        assert order_of_ends(client, "long", "cold 0", "short") == ["short", "long", "cold 0"]


@pytest.mark.parametrize("remote", [False, True])
def test_who_finds_no_room_gets_it_while_others_keep_coming_for_what_is_on_the_device(
    town: Town, tmp_path: Path, remote: bool
) -> None:
    mine, cold = town.refs[0], town.refs[4]
    disk = None
    if remote:
        shutil.copytree(town.directory / "blobs", tmp_path / "blobs")
        store = Store.open(f"file://{tmp_path}/store", "server", tmp_path / "blobs")
        store.create()
        disk = DiskTier(tmp_path / "blobs", None, store)
        disk.upload(cold.digest)
        disk.remove(cold.digest)
    with serving(
        town.base, tmp_path if remote else town.directory, disk=disk, device_bytes=mine.nbytes + 256
    ) as client:
        client.submit("0", prompt_of(4), mine, max_tokens=200)
        client.wait_for("0", 2)
        client.submit("cold", prompt_of(5), cold)
        for number in range(1, 100):  # there is always one more long before the last has ended
            client.submit(str(number), prompt_of(4), mine, max_tokens=200)
            client.wait_for(str(number), 100)
            if any(o.last for o in client.heard("cold")):
                break
        else:
            pytest.fail("it waits for as long as they come")
        assert client.tokens("cold") == greedy(town.oracles[4], prompt_of(5), 8)


def test_each_use_is_told_once_with_where_the_adapter_was(town: Town) -> None:
    uses: list[Use] = []
    ref = town.refs[1]._replace(owner="ada")
    with serving(town.base, town.directory) as client:
        client.engine._serving._on_use = uses.append
        for _ in range(2):
            client.ask(prompt_of(4), ref)
        client.ask(prompt_of(4))
    assert [(use.version, use.owner, use.nbytes, use.tier) for use in uses] == [
        (ref.version, "ada", ref.nbytes, Tier.DISK),
        (ref.version, "ada", ref.nbytes, Tier.DEVICE),
    ]
    assert uses[0].load_ms > uses[1].load_ms == 0


def test_an_operator_pins_plans_and_changes_rules_and_budgets_while_it_runs(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        for ref in town.refs[:3]:
            client.ask(prompt_of(4), ref)
        digests = [ref.digest for ref in town.refs[:3]]
        client.engine.pin(digests[0], True).result(5)
        pinned = aligned(town.refs[0].nbytes)
        with pytest.raises(BadRequest, match="pins may hold 3/4"):
            client.engine.plan(device=pinned + 256).result(5)
        assert [d for d, _ in client.engine.plan(device=4 * pinned // 3 + 256).result(5).device] == digests[1:]
        client.engine.set_rules(Rules(device=TierRules(ttl_seconds=1e-9))).result(5)
        assert client.engine.tiers_of(digests).result(5) == [Tier.DEVICE, Tier.DISK, Tier.DISK]
        with pytest.raises(BadRequest, match="pinned or in use"):
            client.engine.set_budgets(device=256).result(5)
        client.engine.set_budgets(device=2 * 1024**2, ram=1024**2).result(5)
        stats = client.engine.stats().result(5)["tiers"]
        assert (stats["device"]["budget_bytes"], stats["ram"]["budget_bytes"]) == (2 * 1024**2, 1024**2)
        assert client.ask(prompt_of(4), town.refs[0]) == greedy(town.oracles[0], prompt_of(4), 8)


def test_what_was_unused_for_too_long_goes_although_nobody_asks(town: Town) -> None:
    with serving(town.base, town.directory, request_seconds=0.05) as client:
        client.engine.set_rules(Rules(device=TierRules(ttl_seconds=0.02))).result(5)
        client.ask(prompt_of(1), town.refs[0], max_tokens=1)
        while client.engine.tiers_of([town.refs[0].digest]).result(5) != [Tier.DISK]:
            time.sleep(0.01)


@pytest.mark.parametrize("kind", ["torch", "native"])
def test_answers_stay_right_while_blocks_move_and_budgets_change(town: Town, tmp_path: Path, kind: str) -> None:
    base, refs = town.base, town.refs
    if kind == "native":  # sixteen bits
        base = serving_twin(tiny_model("llama").bfloat16())
        blocks = [encoded(saved(oracle, tmp_path / f"{i}"), base) for i, oracle in enumerate(town.oracles)]
        refs = [stored(block, tmp_path / "blobs") for block in blocks]
    directory = town.directory if kind == "torch" else tmp_path
    sizes = sorted(ref.nbytes + 256 for ref in refs)
    choose = random.Random(1)
    asked = [
        (str(i), prompt_of(choose.randint(1, 30), i), choose.choice(refs), choose.randint(8, 40)) for i in range(120)
    ]
    with serving(base, directory) as client:
        alone = {name: client.ask(prompt, ref, max_tokens=count) for name, prompt, ref, count in asked}
    with serving(base, directory, device_bytes=sum(sizes[-3:]), max_batch=4) as client:
        changes = []
        for name, prompt, ref, count in asked:
            client.submit(name, prompt, ref, max_tokens=count)
            if choose.random() < 0.3:
                budget = choose.choice([sum(sizes[-3:]), sum(sizes[-4:]) + sizes[0], sum(sizes[:-1])])
                changes.append(client.engine.set_budgets(device=budget, ram=choose.choice([0, sizes[-1]])))
            if choose.random() < 0.3:
                client.wait_for(name, choose.randint(1, 6))
            if choose.random() < 0.2:
                client.engine.set_rules(Rules(device=TierRules(choose.choice(list(Policy)))))
            if choose.random() < 0.2:
                client.check_integrity()
        for name, expected in alone.items():
            assert client.tokens(name) == expected
        outcomes = [change.exception(5) for change in changes]
        assert all(error is None or isinstance(error, BadRequest) for error in outcomes)
        assert None in outcomes
        assert client.engine.stats().result(5)["tiers"]["device"]["moved_bytes"] > 0


# -- failures and the end


def test_the_engine_survives_a_step_that_fails(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    with serving(town.base, town.directory) as client:
        client.ask(prompt_of(3), town.refs[0])
        client.submit("bad", [5, 10**6], town.refs[0])  # no such token: the embedding raises
        error = client.error("bad")
        assert isinstance(error, ServerFault)
        assert "failed on this request" in error.message
        client.check_integrity()
        assert client.ask(prompt_of(3), town.refs[0]) == greedy(town.oracles[0], prompt_of(3), 8)
        assert client.engine.alive
    assert "a step failed" in caplog.text


def test_the_engine_survives_a_listener_that_fails(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    with serving(town.base, town.directory) as client:
        hear, failures = client._hear, iter([True, True])

        def stumble(outputs: list[Output]) -> None:
            if next(failures, False):
                raise RuntimeError("the listener stumbles")
            hear(outputs)

        client.engine._serving._on_output = stumble
        client.submit("one", prompt_of(3), max_tokens=6)
        outputs = client.wait_for("one")
        assert [o.token.id for o in outputs if o.token] == greedy(town.model, prompt_of(3), 6)[2:]
    assert "outside of a step" in caplog.text


def test_stopping_fails_what_is_under_way(town: Town, tmp_path: Path) -> None:
    blobs = shutil.copytree(town.directory / "blobs", tmp_path / "blobs")
    with serving(town.base, tmp_path, max_batch=1, load_threads=1) as client:
        pipe = block_path(blobs, "pipe")
        os.mkfifo(pipe)
        client.submit("running", prompt_of(5), max_tokens=240)
        client.submit("on its way", prompt_of(5), AdapterRef("pipe", "pipe", 4))
        client.submit("waiting", prompt_of(5))
        client.wait_for("running", 3)
        stopping = threading.Thread(target=client.engine.stop)
        stopping.start()
        for name in ("running", "waiting", "on its way"):
            assert isinstance(client.error(name), Unavailable)
        while stopping.is_alive():  # it waits for the reader
            with contextlib.suppress(OSError):
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            stopping.join(0.01)
        assert not client.engine.alive
        with pytest.raises(Unavailable, match="shutting down"):
            client.submit("late", prompt_of(5))
        with pytest.raises(Unavailable, match="shutting down"):
            client.engine.stats()
        client.engine.cancel("running")


def test_a_request_that_races_with_the_end_is_refused_or_told(town: Town) -> None:
    for _ in range(20):
        with serving(town.base, town.directory) as client:
            client.check_integrity()
            accepted: list[str] = []

            def submit(client: Client = client, accepted: list[str] = accepted) -> None:
                for i in range(300):
                    try:
                        accepted.append(client.submit(str(i), [5], max_tokens=1))
                    except Unavailable:
                        return

            thread = threading.Thread(target=submit)
            thread.start()
            client.engine.stop()
            thread.join()
            for name in accepted:
                client.wait_for(name)


# -- too many, and too long


def test_one_more_than_the_queue_holds_is_refused_until_another_has_ended(town: Town) -> None:
    with serving(town.base, town.directory, max_batch=1, max_waiting=2) as client:
        for name in ("running", "second", "third"):
            client.submit(name, prompt_of(5), max_tokens=60)
        with pytest.raises(TooManyRequests, match="Too many requests are waiting or running"):
            client.submit("fourth", prompt_of(5))
        client.engine.cancel("third")
        client.tokens("second")
        assert client.ask(prompt_of(5)) == greedy(town.model, prompt_of(5), 8)


def test_a_refused_or_failed_request_leaves_its_place_to_others(town: Town) -> None:
    with serving(town.base, town.directory, max_batch=1, max_waiting=1) as client:
        for i in range(5):
            with pytest.raises(ContextLengthExceeded):
                client.submit("long", prompt_of(300))
            assert isinstance(client.error(client.submit(f"bad-{i}", [10**6])), ServerFault)
            assert isinstance(client.error(client.submit(f"gone-{i}", [5], AdapterRef("x", "x", 4))), BlockDamaged)
        assert client.ask(prompt_of(5)) == greedy(town.model, prompt_of(5), 8)


def test_a_request_over_its_deadline_ends_even_when_nothing_happens(town: Town, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    with serving(town.base, tmp_path, load_threads=1, request_seconds=0.1) as client:
        pipe = block_path(blobs, "pipe")
        os.mkfifo(pipe)
        error = client.error(client.submit("late", prompt_of(5), AdapterRef("pipe", "pipe", 4)))
        assert isinstance(error, DeadlineExceeded)
        assert "within 0.1 seconds" in error.message
        with pipe.open("wb"):
            pipe.unlink()
        assert client.ask(prompt_of(5), max_tokens=2) == greedy(town.model, prompt_of(5), 2)


# -- idle work


class Counting:
    """Idle work of so many pieces; the first may fail. `look` is asked at the beginning of each."""

    def __init__(self, pieces: int, *, fails: bool = False, look: Callable[[], Any] = lambda: None) -> None:
        self.left, self.fails, self.look = pieces, fails, look
        self.threads: set[str] = set()
        self.seen: set[Any] = set()
        self.asked: set[int] = set()  # tokens
        self.over = threading.Event()

    @property
    def running(self) -> int:
        return int(self.left > 0)

    def step(self, tokens: int, give_way: Callable[[], None]) -> int:
        self.threads.add(threading.current_thread().name)
        self.seen.add(self.look())
        self.asked.add(tokens)
        if self.fails:
            self.fails = False
            raise ValueError("it broke")
        if self.left == 0:
            self.over.set()
            return 0
        time.sleep(1e-3)  # a piece of training, too, leaves the interpreter to the other threads
        self.left -= 1
        return tokens

    def lose(self) -> None:
        raise AssertionError("no device is lost here")

    def refill(self, pieces: int) -> None:
        self.over.clear()
        self.left = pieces


def test_idle_work_runs_when_nobody_asks_and_ends(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        work = Counting(50)
        client.engine.set_idle_work(work)
        assert work.over.wait(20)
        assert work.threads == {"adapterhub-engine"}
        assert client.ask(prompt_of(3)) == greedy(town.model, prompt_of(3), 8)
        assert work.left == 0


def test_idle_work_and_serving_go_on_together(town: Town) -> None:
    prompt = prompt_of(10)
    with serving(town.base, town.directory) as client:
        work = Counting(10**9, look=lambda: bool(client.engine._scheduler.running))
        client.engine.set_idle_work(work)
        for user in itertools.cycle(range(USERS)):
            answer = client.ask(prompt, town.refs[user], max_tokens=100)
            assert answer == greedy(town.oracles[user], prompt, 100)
            if True in work.seen:
                break
        client.check_integrity()
        work.left = 0


def test_idle_work_waits_while_somebody_waits_for_a_first_token(town: Town) -> None:
    with serving(town.base, town.directory, max_step_tokens=4, max_batch=4) as client:

        def first() -> bool:
            scheduler = client.engine._scheduler
            return scheduler.num_waiting > 0 or any(s.produced == 0 for s in scheduler.running)

        work = Counting(10**9, look=first)
        client.engine.set_idle_work(work)
        names = [client.submit(str(user), prompt_of(30, user), ref) for user, ref in enumerate(town.refs)]
        for user, name in enumerate(names):
            assert client.tokens(name) == greedy(town.oracles[user], prompt_of(30, user), 8)
        assert work.seen == {False}


def test_pieces_of_idle_work_are_as_large_as_can_be_when_nobody_asks(town: Town) -> None:
    with serving(town.base, town.directory, train_micro_tokens=500) as client:
        work = Counting(20)
        client.engine.set_idle_work(work)
        assert work.over.wait(20)
        assert work.asked == {500}


def test_what_training_gets_is_told(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        idle = client.engine.stats().result(5)["engine"]["training"]
        assert idle == {
            "runs": 0,
            "tokens": 0,
            "out_of_memory": 0,
            "share": 0.0,
            "tokens_per_second": 0.0,
            "latency_slo": 1.3,
            "p95_ms": None,
            "idle_p95_ms": None,
        }
        work = Counting(10)
        client.engine.set_idle_work(work)
        client.ask(prompt_of(3))
        assert work.over.wait(20)
        told = client.engine.stats().result(5)["engine"]["training"]
        assert told["runs"] == 0
        assert told["tokens"] >= 10 * min(work.asked)
        assert 0 < told["share"] < 1
        assert told["tokens_per_second"] > 0
        assert 0 < told["idle_p95_ms"] <= told["p95_ms"]


def test_idle_work_that_has_nothing_to_do_is_asked_again_when_it_is_woken(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        work = Counting(0)
        client.engine.set_idle_work(work)
        for _ in range(3):
            assert work.over.wait(20)
            work.refill(5)
            client.engine.wake()
        assert work.over.wait(20)
        assert work.left == 0


def test_idle_work_that_raises_is_logged_and_tried_again(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    with serving(town.base, town.directory) as client:
        work = Counting(3, fails=True)
        client.engine.set_idle_work(work)
        assert client.ask(prompt_of(3)) == greedy(town.model, prompt_of(3), 8)
        assert work.over.wait(20)
        assert work.left == 0
        assert client.ask(prompt_of(3)) == greedy(town.model, prompt_of(3), 8)
    assert "idle work failed" in caplog.text


# -- all at once


def test_answers_are_those_of_each_alone_whatever_else_happens(town: Town) -> None:
    choose = random.Random(0)
    asked = []
    for i in range(60):
        user = choose.choice([None, *range(USERS)])
        ref = None if user is None else town.refs[user]
        asked.append((str(i), prompt_of(choose.randint(1, 60), i), ref, choose.randint(1, 24)))
    with serving(town.base, town.directory) as client:
        alone = {name: client.ask(prompt, ref, max_tokens=count) for name, prompt, ref, count in asked}
    budgets: dict[str, Any] = {
        "device_bytes": sum(sorted(ref.nbytes for ref in town.refs)[-2:]) + 512,
        "kv_bytes": kv_bytes(town.base, 12),
        "max_batch": 7,
        "max_step_tokens": 20,
    }
    with serving(town.base, town.directory, **budgets) as client:
        cancelled = set()
        client.engine.set_idle_work(Counting(200))
        for name, prompt, ref, count in asked:
            client.submit(name, prompt, ref, max_tokens=count)
            if choose.random() < 0.2:
                other = choose.choice(asked)[0]
                client.engine.cancel(other)
                cancelled.add(other)
            if choose.random() < 0.2:
                client.engine.evict(choose.choice(town.refs).digest)
            if choose.random() < 0.1:
                client.check_integrity()
        for name, expected in alone.items():
            if name not in cancelled:
                assert client.tokens(name) == expected
            else:
                tokens = [o.token.id for o in client.heard(name) if o.token]
                assert tokens == expected[: len(tokens)]


class Long:
    """A piece of training that is not done before `end` says so; it gives way all the time."""

    running = 1

    def __init__(self) -> None:
        self.begun, self.end = threading.Event(), threading.Event()

    def step(self, tokens: int, give_way: Callable[[], None]) -> int:
        if self.end.is_set():
            return 0
        self.begun.set()
        while not self.end.wait(1e-3):
            give_way()
        return tokens

    def lose(self) -> None:
        raise AssertionError("no device is lost here")


@contextmanager
def within_a_piece(town: Town) -> Iterator[Client]:
    """Of training, which ends after the block."""
    work = Long()
    with serving(town.base, town.directory) as client:
        client.engine.set_idle_work(work)
        try:
            assert work.begun.wait(20)
            yield client
            assert not work.end.is_set()
        finally:
            work.end.set()
        client.engine.check_integrity().result()


def test_a_request_is_answered_in_the_middle_of_a_piece_of_training(town: Town) -> None:
    with within_a_piece(town) as client:
        for _ in range(3):
            assert client.ask(prompt_of(30), max_tokens=20) == greedy(town.model, prompt_of(30), 20)


def test_what_fails_in_the_middle_of_a_piece_of_training_does_not_reach_it(town: Town) -> None:
    with within_a_piece(town) as client:
        failed = client.submit("missing", prompt_of(3), AdapterRef("v", "0" * 64, 100))
        assert isinstance(client.wait_for(failed)[-1].error, BlockDamaged)
        assert client.ask(prompt_of(3)) == greedy(town.model, prompt_of(3), 8)
