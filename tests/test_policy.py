"""What to evict and what to drop, against brute force over everything that could be chosen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapterhub.swap.policy import Span, plan_room, plan_shrink


@st.composite
def _pools(draw: st.DrawFn) -> list[Span]:
    """Spans that tile a pool; last uses from a small range, so that there are ties."""
    spans, at = [], 0
    for i in range(draw(st.integers(0, 9))):
        size = draw(st.integers(1, 5))
        kind = draw(st.sampled_from(["hole", "block", "block", "pinned"]))
        if kind == "hole":
            spans.append(Span(at, size))
        else:
            spans.append(Span(at, size, f"block-{i}", float(draw(st.integers(0, 4))), kind == "pinned"))
        at += size
    return spans


def _windows(spans: list[Span], size: int) -> list[list[Span]]:
    """Every run of neighbours that could become one free piece of `size` bytes."""
    runs = [spans[i:j] for i in range(len(spans)) for j in range(i + 1, len(spans) + 1)]
    return [run for run in runs if sum(s.size for s in run) >= size and not any(s.pinned for s in run)]


def _cost(window: list[Span]) -> tuple[float, int]:
    blocks = [s for s in window if s.key is not None]
    return max((s.last_use for s in blocks), default=float("-inf")), sum(s.size for s in blocks)


@given(spans=_pools(), size=st.integers(1, 20))
def test_evicts_the_window_that_was_used_longest_ago_and_of_those_the_smallest(spans: list[Span], size: int) -> None:
    victims = plan_room(spans, size)
    windows = _windows(spans, size)
    if not windows:
        assert victims is None
        return
    assert victims is not None
    chosen = [s for s in spans if s.key in victims]
    assert _cost(chosen) == min(map(_cost, windows))
    # once the victims are gone, `size` bytes are free in one piece
    assert _windows(
        [Span(s.start, s.size) if s in chosen else s._replace(pinned=s.key is not None) for s in spans], size
    )


@given(spans=_pools(), size=st.integers(1, 20))
def test_never_evicts_what_is_pinned(spans: list[Span], size: int) -> None:
    pinned = {s.key for s in spans if s.pinned}
    assert pinned.isdisjoint(plan_room(spans, size) or [])


def test_evicts_nothing_when_a_hole_is_large_enough() -> None:
    assert plan_room([Span(0, 4, "old", 1.0), Span(4, 8), Span(12, 4, "new", 2.0)], 8) == []


def test_joins_holes_with_the_blocks_between_them() -> None:
    assert plan_room([Span(0, 3), Span(3, 2, "between", 9.0), Span(5, 3), Span(8, 4, "old", 1.0)], 8) == ["between"]


def test_gives_up_when_pinned_blocks_leave_no_window() -> None:
    spans = [Span(0, 4, "a", 1.0), Span(4, 1, "pinned", 0.0, pinned=True), Span(5, 4, "b", 2.0)]
    assert plan_room(spans, 5) is None
    assert plan_room(spans, 4) == ["a"]


@given(sizes=st.lists(st.integers(1, 9), max_size=8), excess=st.integers(-3, 60))
def test_shrinking_drops_the_shortest_run_of_the_oldest_that_suffices(sizes: list[int], excess: int) -> None:
    dropped = plan_shrink(list(enumerate(sizes)), excess)
    assert dropped == list(range(len(dropped)))
    assert sum(sizes[: len(dropped)]) >= min(excess, sum(sizes))
    if dropped:
        assert sum(sizes[: len(dropped) - 1]) < excess
