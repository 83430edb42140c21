"""The scheduler and its real KV table without a model: whose turn it is, and that everybody's comes."""

from __future__ import annotations

import random
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.base.batch import KV_BLOCK
from adapterhub.base.kv import KVCache, KVShape
from adapterhub.base.request import Request, Sampling
from adapterhub.base.scheduler import Scheduler, Sequence
from adapterhub.swap.tiers import AdapterRef

SHAPES = {0: KVShape(1, 1, 1)}


class Floor:
    """Runs a scheduler's steps as the engine would, with 7 for every new token."""

    def __init__(self, *, blocks: int = 1000, max_batch: int = 4, max_step_tokens: int = 64) -> None:
        kv = KVCache(SHAPES, blocks * KV_BLOCK * 4, torch.bfloat16, torch.device("cpu"))
        assert kv.blocks.total == blocks
        self.scheduler = Scheduler(kv, max_batch, max_step_tokens)
        self.served: Counter[str] = Counter()  # tokens computed, by owner
        self.ended: list[str] = []
        self._number = 0

    def submit(self, owner: str, prompt: int = 20, count: int = 8, seed: int | None = None) -> Sequence:
        self._number += 1
        tokens = random.Random(self._number if seed is None else f"seed {seed}").choices(range(1000), k=prompt)
        sequence = Sequence.of(Request(f"{owner}-{self._number}", tokens, Sampling(max_tokens=count), owner=owner))
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> bool:
        scheduler = self.scheduler
        work = scheduler.schedule()
        assert sum(w.tokens for w in work) <= scheduler.max_step_tokens
        assert len(scheduler.running) <= scheduler.max_batch
        assert len({id(w.sequence) for w in work}) == len(work)
        for w in work:
            assert 1 <= w.tokens <= w.sequence.pending
            assert w.sequence in scheduler.running
            assert len(w.sequence.blocks) * KV_BLOCK >= w.sequence.computed + w.tokens
        for w in work:
            self.served[w.sequence.owner] += w.tokens
            scheduler.advance(w, 7 if w.samples else None)
            if w.sequence.produced == w.sequence.request.sampling.max_tokens:
                scheduler.remove(w.sequence)
                self.ended.append(w.sequence.request.id)
        scheduler.check_integrity()
        return bool(work)

    def until(self, sequence: Sequence, produced: int) -> int:
        """Steps until it has so many tokens."""
        steps = 0
        while sequence.produced < produced:
            assert self.step()
            steps += 1
        return steps


_requests = st.tuples(st.sampled_from("ABC"), st.integers(1, 90), st.integers(1, 30), st.integers(0, 3))


@given(requests=st.lists(_requests, max_size=15), pauses=st.lists(st.integers(0, 5), min_size=15, max_size=15))
def test_everybody_ends_whatever_comes_when(requests: list[tuple[str, int, int, int]], pauses: list[int]) -> None:
    floor = Floor(blocks=9, max_batch=3, max_step_tokens=16)
    for (owner, prompt, count, seed), pause in zip(requests, pauses, strict=False):
        floor.submit(owner, prompt, count, seed)
        for _ in range(pause):
            floor.step()
    steps = 0
    while floor.step():
        steps += 1
        assert steps < 3000
    assert len(floor.ended) == len(requests)
    assert floor.scheduler.kv.blocks.free == 9


def test_one_request_is_not_held_up_by_anothers_hundred() -> None:
    floor = Floor()
    for _ in range(100):
        floor.submit("many", count=50)
    for _ in range(10):
        floor.step()
    assert floor.until(floor.submit("one"), 1) == 1


def test_one_request_is_not_held_up_by_anothers_in_a_full_cache() -> None:
    floor = Floor(blocks=8, max_batch=16)
    for _ in range(20):
        floor.submit("many", prompt=20, count=60)
    for _ in range(30):
        floor.step()
    assert floor.until(floor.submit("one"), 1) <= 2


def test_owners_who_always_want_more_get_the_same_whatever_they_ask() -> None:
    floor = Floor(max_batch=8, max_step_tokens=32)
    for step in range(600):
        if step % 2 == 0:
            floor.submit("short", prompt=4, count=8)
            floor.submit("short", prompt=4, count=8)
            floor.submit("long", prompt=200, count=4)
        floor.step()
        if step > 50:
            assert abs(floor.served["short"] - floor.served["long"]) <= 2 * 204


def test_an_owner_who_paused_comes_back_level_and_not_with_credit() -> None:
    floor = Floor(max_batch=2)
    for _ in range(40):
        floor.submit("steady")
    for _ in range(50):
        floor.step()
    before = Counter(floor.served)
    for _ in range(40):
        floor.submit("back")
    for _ in range(50):
        floor.step()
    gained = floor.served - before
    assert gained["steady"] > 0.3 * gained["back"] > 0


def test_an_owner_in_turn_is_not_made_to_compute_twice_for_one_who_had_more() -> None:
    """Both places of the batch are the newcomer's, who was served less: the other waits, and nothing is thrown away."""
    floor = Floor(max_batch=2)
    for _ in range(5):
        floor.submit("had more", prompt=60, count=20)
    for _ in range(30):
        floor.step()
    floor.scheduler._served["had less"] = 0
    mine = [floor.submit("had less", prompt=40, count=20) for _ in range(2)]
    for sequence in list(floor.scheduler.running):
        floor.scheduler.remove(sequence)
    floor.until(mine[0], 20)
    floor.until(mine[1], 20)
    assert floor.served["had less"] == 2 * (40 + 19)


def test_decodes_come_before_prompts_in_a_step() -> None:
    floor = Floor(max_step_tokens=8)
    decoding = [floor.submit("a", prompt=2, count=50) for _ in range(3)]
    floor.step()
    floor.submit("a", prompt=100)
    work = floor.scheduler.schedule()
    assert [w.tokens for w in work] == [1, 1, 1, 5]
    assert [w.sequence for w in work[:3]] == decoding


# -- shared beginnings


def test_the_next_turn_of_a_conversation_computes_only_what_is_new() -> None:
    floor = Floor()
    first = floor.submit("a", prompt=50, count=14)
    floor.until(first, 14)
    turn = Sequence.of(Request("next", [*first.tokens, 1, 2, 3], Sampling(max_tokens=4), owner="a"))
    floor.scheduler.add(turn)
    floor.step()
    assert floor.scheduler.shared_tokens == 48  # of 63 that were computed, those in full blocks
    assert turn.produced == 1


def test_a_whole_prompt_in_the_cache_still_leaves_a_token_to_sample_from() -> None:
    floor = Floor()
    floor.until(floor.submit("a", prompt=48, count=2, seed=1), 2)
    again = floor.submit("a", prompt=48, count=2, seed=1)
    [work] = floor.scheduler.schedule()
    assert work.tokens == 16
    assert again.computed == 32


def test_owners_and_versions_share_nothing() -> None:
    floor = Floor(max_batch=10, max_step_tokens=1000)
    prompt = list(range(64))
    refs = [None, AdapterRef("v1", "digest", 4), AdapterRef("v2", "digest", 4), AdapterRef("v1", "other", 4)]
    names = set()
    for owner in ("a", "b", "('a'", ""):
        for ref in refs:
            sequence = Sequence.of(Request("", prompt, adapter=ref, owner=owner))
            names |= {sequence.name(i) for i in range(4)}
    assert len(names) == 4 * 4 * len(refs)
    floor.submit("a", prompt=64, seed=1)
    floor.submit("b", prompt=64, seed=1)
    floor.step()
    floor.submit("b", prompt=64, seed=2)
    floor.step()
    assert floor.scheduler.shared_tokens == 0
    floor.submit("b", prompt=64, seed=1)
    floor.step()
    assert floor.scheduler.shared_tokens == 48


def test_what_was_preempted_finds_its_beginning_in_the_cache_again() -> None:
    floor = Floor(blocks=6, max_batch=4)
    old, young = (floor.submit("a", prompt=33, count=30) for _ in range(2))
    floor.step()
    assert young.computed == 31  # a step has 64 tokens
    while young in floor.scheduler.running:
        floor.step()
    floor.until(old, 30)
    floor.until(young, 30)
    assert floor.scheduler.shared_tokens >= KV_BLOCK
