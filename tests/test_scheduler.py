"""The scheduler and its real KV table without a model: whose turn it is, and that everybody's comes."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.base.batch import KV_BLOCK
from adapterhub.base.kv import KVCache, KVShape
from adapterhub.base.request import Request, Sampling
from adapterhub.base.scheduler import Scheduler, Sequence
from adapterhub.swap.ref import AdapterRef

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
        """With a `seed`, a beginning of a text that others with that seed begin as well."""
        self._number += 1
        tokens = random.Random(self._number if seed is None else f"seed {seed}").choices(range(1000), k=prompt)
        sequence = Sequence.of(Request(f"{owner}-{self._number}", tokens, Sampling(max_tokens=count), owner=owner))
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> bool:
        scheduler = self.scheduler
        work = scheduler.schedule()
        assert sum(w.tokens for w in work) <= scheduler.step_tokens <= scheduler.max_step_tokens
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
_pauses = st.lists(st.integers(0, 5), min_size=15, max_size=15)
_cancelled = st.lists(st.integers(0, 60), min_size=15, max_size=15)  # how many tokens each may have produced


@given(requests=st.lists(_requests, max_size=15), pauses=_pauses, cancelled=_cancelled, max_batch=st.integers(1, 5))
def test_everybody_ends_whatever_comes_and_goes(
    requests: list[tuple[str, int, int, int]], pauses: list[int], cancelled: list[int], max_batch: int
) -> None:
    floor = Floor(blocks=9, max_batch=max_batch, max_step_tokens=16)
    made: list[Sequence] = []
    gone: list[Sequence] = []

    def step() -> bool:
        for sequence, limit in zip(made, cancelled, strict=False):
            over = sequence in gone or sequence.request.id in floor.ended
            if not over and sequence.produced >= limit:
                floor.scheduler.remove(sequence)
                gone.append(sequence)
        return floor.step()

    for (owner, prompt, count, seed), pause in zip(requests, pauses, strict=False):
        made.append(floor.submit(owner, prompt, count, seed))
        for _ in range(pause):
            step()
    steps = 0
    while step():
        steps += 1
        assert steps < 3000
    assert len(floor.ended) + len(gone) == len(requests)
    assert floor.scheduler.kv.blocks.free == 9
    assert list(floor.scheduler.waiting()) == floor.scheduler.running == []


class Shape(NamedTuple):
    """An engine, what one owner asks of it a hundred times, and what another asks once."""

    blocks: int
    max_batch: int
    max_step_tokens: int
    many: tuple[int, int]  # tokens of the prompt, and of the answer
    one: tuple[int, int]


SHAPES_OF_LOAD = {
    "long prompts": Shape(64, 8, 64, (200, 20), (30, 5)),
    "long answers": Shape(64, 8, 64, (16, 200), (64, 40)),
    "answers in step with one another fill the cache": Shape(20, 16, 64, (15, 150), (40, 60)),
    "long prompts fill the cache": Shape(40, 32, 256, (150, 100), (150, 40)),
    "short prompts fill the batch": Shape(64, 32, 32, (1, 200), (1, 30)),
    "two places": Shape(64, 2, 256, (100, 50), (30, 30)),
    "few tokens in a step": Shape(64, 8, 8, (100, 50), (5, 30)),
}


@pytest.mark.parametrize("name", SHAPES_OF_LOAD)
def test_anothers_hundred_requests_hold_a_first_token_up_by_two_steps_at_most(name: str) -> None:
    """Whenever it comes; and what it computed is not thrown away for the others either."""
    shape = SHAPES_OF_LOAD[name]
    for before in range(1, 60):
        floor = Floor(blocks=shape.blocks, max_batch=shape.max_batch, max_step_tokens=shape.max_step_tokens)
        for _ in range(100):
            floor.submit("many", *shape.many)
        for _ in range(before):
            floor.step()
        one = floor.submit("one", *shape.one)
        assert floor.until(one, 1) <= 2, f"after {before} steps"
        floor.until(one, shape.one[1])
        assert floor.served["one"] == sum(shape.one) - 1


def test_several_owners_who_come_at_once_all_begin_at_once() -> None:
    floor = Floor(blocks=30, max_batch=8, max_step_tokens=64)
    for _ in range(100):
        floor.submit("many", prompt=30, count=60)
    for _ in range(20):
        floor.step()
    ones = [floor.submit(f"one-{i}", prompt=8) for i in range(6)]
    for one in ones:
        assert floor.until(one, 1) <= 1


def test_owners_come_in_turn_each_with_its_oldest() -> None:
    floor = Floor(max_batch=1)
    for owner in ("a", "a", "a", "b", "b", "c"):
        floor.submit(owner, prompt=5, count=3)
    while floor.step():
        pass
    assert floor.ended == ["a-1", "b-4", "c-6", "a-2", "b-5", "a-3"]


def lines(act: Callable[[], object]) -> int:
    """How many lines of Python it takes."""
    count, before = 0, sys.gettrace()

    def trace(_: object, event: str, __: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def test_what_a_step_and_a_cancel_take_grows_with_the_queue_alone() -> None:
    """One owner with many requests among many owners with one, and nobody can start: all wait for their adapters."""
    scheduler = Floor(max_batch=4).scheduler
    many = 300
    for number in range(2 * many):
        owner = "many" if number < many else str(number)
        ref = AdapterRef("v", str(number), 4)
        scheduler.add(Sequence.of(Request(str(number), [1], Sampling(), ref, owner)))
    assert lines(scheduler.schedule) < 30 * 2 * many
    assert lines(lambda: scheduler.remove(scheduler.get("7"))) < 30  # type: ignore[arg-type]
    assert scheduler.get("7") is None


def test_a_prompt_is_computed_in_pieces_that_fit_into_a_step() -> None:
    floor = Floor(max_step_tokens=64)
    sequence = floor.submit("a", prompt=200)
    seen = []
    while sequence.produced == 0:
        seen.append(-sequence.computed)
        floor.step()
        seen[-1] += sequence.computed
    assert seen == [64, 64, 64, 8]


def test_a_long_prompt_is_not_starved_by_short_ones_behind_it() -> None:
    floor = Floor(blocks=8, max_batch=4)
    short = [floor.submit("a", prompt=20, count=20) for _ in range(2)]
    floor.step()
    long = floor.submit("a", prompt=115, count=5)  # needs the whole cache
    behind = [floor.submit("a", prompt=5, count=5) for _ in range(20)]
    floor.until(long, 1)
    assert all(s.request.id in floor.ended for s in short)
    assert all(s.produced == 0 for s in behind)


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


def test_an_owner_who_asked_for_little_saves_up_no_credit() -> None:
    floor = Floor(max_batch=8)
    for _ in range(40):
        floor.submit("much", prompt=10, count=60)
    floor.submit("little", prompt=10, count=200)
    for _ in range(150):
        floor.step()
    assert floor.served["much"] > 5 * floor.served["little"]
    before = Counter(floor.served)
    for _ in range(40):
        floor.submit("little", prompt=10, count=60)
    for _ in range(100):
        floor.step()
    gained = floor.served - before
    assert gained["much"] > 0.7 * gained["little"] > 0


def test_an_owner_who_was_never_made_to_wait_is_owed_nothing_either() -> None:
    floor = Floor(max_batch=8)
    floor.submit("little", prompt=10, count=500)
    for _ in range(5):
        floor.submit("much", prompt=10, count=200)
    for _ in range(150):
        floor.step()
    for owner in ("much", "little", "new"):
        for _ in range(20):
            floor.submit(owner, prompt=10, count=20)
    before = Counter(floor.served)
    for _ in range(150):
        floor.step()
    gained = floor.served - before
    assert min(gained.values()) > 0.7 * max(gained.values())


def test_who_has_left_leaves_no_counter() -> None:
    floor = Floor(max_batch=2)
    for owner in "abcd":
        floor.submit(owner)
    waiting = floor.submit("e")
    floor.step()
    floor.scheduler.remove(waiting)
    assert floor.scheduler._served.keys() == set("abcd")
    while floor.step():
        pass
    assert floor.scheduler._served == {}


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


def test_the_same_beginning_is_computed_once_for_requests_that_come_together() -> None:
    floor = Floor(max_batch=8, max_step_tokens=32)
    same = [floor.submit("a", prompt=100, count=4, seed=1) for _ in range(4)]
    other = floor.submit("b", prompt=100, count=4, seed=1)
    assert floor.until(same[0], 1) <= 8
    for sequence in (*same, other):
        floor.until(sequence, 4)
    rest = 100 - 96
    assert floor.served == {"a": 96 + 4 * (rest + 3), "b": 100 + 3}


def test_a_beginning_that_parts_is_waited_for_only_as_far_as_it_goes() -> None:
    floor = Floor(max_batch=8, max_step_tokens=32)
    long = floor.submit("a", prompt=200, seed=1)
    short = floor.submit("a", prompt=20, seed=1)
    unlike = floor.submit("a", prompt=20, seed=2)
    floor.step()
    assert floor.scheduler.running == [long, unlike]
    floor.step()
    assert (short.computed, long.computed) == (16, 64)
    assert floor.scheduler.running == [long, unlike, short]


def test_who_waits_for_a_beginning_goes_on_when_that_one_is_cancelled_or_gives_way() -> None:
    floor = Floor(blocks=16, max_batch=8, max_step_tokens=32)
    first, second, third = (floor.submit("a", prompt=100, seed=1) for _ in range(3))
    floor.step()
    floor.scheduler.remove(first)
    floor.step()
    assert floor.scheduler.running == [second]
    assert floor.scheduler.shared_tokens == 32
    floor.scheduler.preempt(second)
    floor.until(third, 8)
    floor.until(second, 8)


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


def test_what_was_preempted_is_its_owners_next() -> None:
    floor = Floor(max_batch=2)
    first, second, third = (floor.submit("a", count=50) for _ in range(3))
    floor.step()
    one = floor.submit("b", count=3)
    floor.step()
    assert floor.scheduler.running == [first, one]
    said = list(second.tokens)
    floor.until(one, 3)
    floor.step()
    assert floor.scheduler.running == [first, second]
    floor.step()
    assert second.tokens[: len(said)] == said
    assert third.produced == 0


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


def test_the_time_in_the_queue_ends_with_the_first_step_and_giving_way_does_not_change_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("adapterhub.base.scheduler.time.monotonic", lambda: now)
    floor = Floor(blocks=4, max_batch=1)
    first = floor.submit("A")
    second = floor.submit("B")
    now = 101.0
    floor.step()
    assert (first.begun, second.begun) == (101.0, math.inf)
    now = 107.0
    while not second.produced:
        floor.step()
    assert (first.begun, second.begun) == (101.0, 107.0)
    floor.scheduler.preempt(second)
    now = 109.0
    floor.until(second, 8)
    assert second.begun == 107.0
    assert Sequence.of(second.request, 99.5).arrived == 99.5
