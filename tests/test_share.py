"""How training shares the device, over a simulated clock: what each step and each piece cost is drawn at random."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.base.share import PieceCosts, Share

MOST_TOKENS = 1024
LONGEST = 0.6  # seconds of a pause
STEPS, WINDOW = 2000, 400


@dataclass(frozen=True)
class Machine:
    """Seconds of a step; of a piece, which has at least one item of that many tokens, and can be interrupted between
    its stages; and how much both vary."""

    step: float
    piece: float
    token: float
    item: int
    noise: float = 0.1
    stages: int = 60

    def piece_seconds(self, tokens: int) -> float:
        return self.piece + self.token * tokens


machines = st.builds(
    Machine,
    step=st.floats(1e-3, 0.15),
    piece=st.floats(0, 0.08),
    token=st.floats(1e-5, 3e-3),
    item=st.integers(1, 160),
    noise=st.floats(0, 0.25),
)


few = settings(max_examples=30)  # each is some thousand steps


@dataclass
class Day:
    """`Share` between training that never ends and streams that never do."""

    share: Share
    machine: Machine
    random: random.Random
    steps: list[float] = field(default_factory=list)  # seconds, by themselves
    gaps: list[float] = field(default_factory=list)  # the same with the pieces before them
    pieces: list[float] = field(default_factory=list)  # or parts of one that was interrupted
    trained: int = 0  # tokens
    whole: float = 0.0  # seconds of the piece under way, what is left of it, and its tokens
    left: float = 0.0
    size: int = 0

    def go_on(self, steps: int, *, first: Callable[[], bool] = lambda: False) -> Day:
        for _ in range(steps):
            waits, pause = first(), 0.0
            while tokens := self.share.next_tokens(running=True, first=waits):
                pause += self.train(tokens)
            seconds = self.machine.step * self._noise()
            self.share.served(seconds, streams=True)
            self.steps.append(seconds)
            self.gaps.append(pause + seconds)
        return self

    def train(self, tokens: int) -> float:
        """A piece, or what is left of one, until it has taken as long as it may."""
        if not self.left:
            self.size = max(self.machine.item, tokens // self.machine.item * self.machine.item)
            self.whole = self.left = self.machine.piece_seconds(self.size) * self._noise()
        stage = self.whole / self.machine.stages
        seconds = min(self.left, math.ceil(self.share.pause_left / stage) * stage)
        self.left -= seconds
        if self.left > 1e-9:
            self.share.interrupted(seconds)
        else:
            self.left = 0.0
            self.share.trained(seconds, self.size, before=self.whole - seconds)
            self.trained += self.size
        self.pieces.append(seconds)
        return seconds

    @property
    def part(self) -> float:
        """Of the time, that training had."""
        return sum(self.pieces) / (sum(self.pieces) + sum(self.steps))

    def _noise(self) -> float:
        return self.random.lognormvariate(0, self.machine.noise)


def day(machine: Machine, slo: float = 1.3, seed: int = 0) -> Day:
    return Day(Share(slo, MOST_TOKENS), machine, random.Random(seed))


def train_whole(alone: Day, tokens: int) -> None:
    """A piece to its end, with nobody there."""
    alone.train(tokens)
    while alone.left:
        alone.train(tokens)


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


# -- those who wait for tokens


@few
@given(machines, st.floats(1.1, 3), st.integers(0, 99))
def test_the_95th_percentile_holds_in_every_window_of_some_hundred_tokens(
    machine: Machine, slo: float, seed: int
) -> None:
    done = day(machine, slo, seed).go_on(STEPS)
    for start in range(0, STEPS - WINDOW, WINDOW // 4):
        window = slice(start, start + WINDOW)
        # how slow the slowest steps are is known from those before the window, so not exactly
        assert p95(done.gaps[window]) <= 1.1 * slo * p95(done.steps[window])


@few
@given(machines, st.integers(0, 99))
def test_training_gets_at_most_as_much_as_serving_can_spare_and_never_nothing(machine: Machine, seed: int) -> None:
    done = day(machine, seed=seed).go_on(STEPS)
    longest = max(done.pieces)
    assert sum(done.pieces) <= 0.6 * (sum(done.pieces) + sum(done.steps)) + longest
    assert sum(done.pieces) >= 0.03 * (sum(done.pieces) + sum(done.steps)) - longest


@few
@given(machines, st.integers(0, 99))
def test_while_first_tokens_are_always_waited_for_training_has_its_least(machine: Machine, seed: int) -> None:
    done = day(machine, seed=seed).go_on(STEPS, first=lambda: True)
    whole = sum(done.pieces) + sum(done.steps)
    longest = max(done.pieces, default=LONGEST)
    assert 0.03 * whole - 2 * max(longest, LONGEST) <= sum(done.pieces) <= 0.045 * whole + longest


def test_a_step_of_ten_milliseconds_leaves_training_half_of_the_time() -> None:
    machine = Machine(step=0.01, piece=0.02, token=1e-3, item=16)
    done = day(machine).go_on(STEPS)
    assert done.part > 0.5
    assert p95(done.gaps) <= 1.3 * p95(done.steps)


def test_a_machine_with_troubles_of_its_own_gives_training_less() -> None:
    machine = Machine(step=0.01, piece=0.02, token=1e-3, item=16)
    calm, troubled = day(machine).go_on(STEPS), day(machine)
    for _ in range(STEPS):
        slow = troubled.random.random() < 0.03
        troubled.machine = Machine(0.2 if slow else 0.01, 0.02, 1e-3, 16)
        troubled.go_on(1)
    assert len(troubled.pieces) < 0.6 * len(calm.pieces)
    assert p95(troubled.gaps) <= 1.3 * p95(troubled.steps)


def test_pieces_that_are_shorter_than_a_step_may_grow_come_after_every_step() -> None:
    done = day(Machine(step=0.1, piece=1e-3, token=1e-4, item=10)).go_on(STEPS)
    assert len(done.pieces) > 0.8 * STEPS
    assert p95(done.gaps) <= 1.3 * p95(done.steps)


def test_pieces_that_cannot_be_so_short_are_soon_tried_no_more() -> None:
    """Each try is a late step, which a long piece could have had."""
    done = day(Machine(step=0.1, piece=0.0, token=1e-3, item=100, stages=1)).go_on(STEPS)
    pauses = [gap - step for gap, step in zip(done.gaps, done.steps, strict=True) if gap > step]
    assert len([p for p in pauses if p > 0.15]) > 0.75 * len(pauses)


def test_after_a_piece_that_was_far_too_long_serving_is_made_up_to() -> None:
    done = day(Machine(step=0.01, piece=0.0, token=3e-3, item=1000, noise=0.0, stages=1)).go_on(STEPS)
    assert max(done.pieces) == pytest.approx(3.0)
    late = [i for i, gap in enumerate(done.gaps) if gap > 1]
    made_up = (3.0 - LONGEST) / 1.5 / 0.01  # steps: training may have half as long again as serving
    assert min(after - before for before, after in pairwise(late)) >= int(made_up)


# -- when nobody asks


def test_with_nobody_there_a_piece_is_as_large_as_can_be() -> None:
    share = Share(1.3, MOST_TOKENS)
    for _ in range(3):
        assert share.next_tokens(running=False, first=False) == MOST_TOKENS
        share.trained(0.02 + 1e-3 * MOST_TOKENS, MOST_TOKENS)
    share.next_tokens(running=True, first=True)
    share.served(0.01, streams=True)
    assert share.next_tokens(running=False, first=False) == MOST_TOKENS


def test_what_nobody_used_is_not_made_up_for() -> None:
    """Hours of training alone, or of serving alone, are no debt."""
    for trains in (True, False):
        before = day(Machine(step=0.01, piece=0.02, token=1e-3, item=1))
        for _ in range(STEPS):
            if trains:
                before.train(before.share.next_tokens(running=False, first=False))
            else:
                before.share.served(0.01, streams=True)
        after = Day(before.share, before.machine, random.Random(0)).go_on(WINDOW)
        assert 0.3 < after.part < 0.62


# -- what a piece costs


@few
@given(machines, st.integers(0, 99))
def test_the_sizes_of_pieces_converge_to_what_the_time_is_enough_for(machine: Machine, seed: int) -> None:
    alone = day(machine, seed=seed)
    costs = alone.share.costs
    for _ in range(40):
        train_whole(alone, costs.tokens(LONGEST))
    right = (LONGEST - machine.piece) / machine.token
    expected = max(machine.item, min(right, MOST_TOKENS))
    for _ in range(10):
        tokens = max(machine.item, costs.tokens(LONGEST))
        train_whole(alone, tokens)
        assert 0.4 * expected <= tokens <= 1.6 * expected
        assert machine.piece_seconds(tokens) <= max(1.6 * LONGEST, machine.piece_seconds(machine.item))


def test_pieces_of_one_size_are_held_to_cost_by_the_token() -> None:
    costs = PieceCosts(MOST_TOKENS)
    for _ in range(5):
        costs.note(0.1, 100)
    assert costs.seconds(50) == pytest.approx(0.05)
    assert costs.tokens(0.15) == pytest.approx(150, abs=1)


def test_pieces_of_several_sizes_tell_what_a_piece_costs_by_itself() -> None:
    costs = PieceCosts(MOST_TOKENS)
    for tokens in (50, 200, 50, 200, 100) * 4:
        costs.note(0.05 + 1e-3 * tokens, tokens)
    assert costs.seconds(100) == pytest.approx(0.15, rel=0.05)
    assert costs.tokens(0.25) == pytest.approx(200, rel=0.05)


def test_nothing_far_beyond_what_was_tried_is_asked_for() -> None:
    costs = PieceCosts(MOST_TOKENS)
    assert costs.tokens(LONGEST) == 64
    costs.note(1e-3, 64)
    assert costs.tokens(LONGEST) == 128
    costs.note(2e-3, 128)
    assert costs.tokens(LONGEST) == 256
    assert PieceCosts(16).tokens(LONGEST) == 16


def test_a_piece_that_costs_more_than_was_thought_counts_for_more() -> None:
    dearer, cheaper = PieceCosts(MOST_TOKENS), PieceCosts(MOST_TOKENS)
    for costs in (dearer, cheaper):
        for _ in range(20):
            costs.note(0.1, 100)
    dearer.note(0.2, 100)
    cheaper.note(0.0, 100)
    assert dearer.seconds(100) - 0.1 > 1.5 * (0.1 - cheaper.seconds(100))
