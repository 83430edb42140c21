"""Whose request still comes into a queue that is full, or nearly so."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.base.occupancy import Occupancy
from adapterhub.base.request import Request
from adapterhub.errors import TooManyRequests


class Door:
    def __init__(self, most: int) -> None:
        self.occupancy = Occupancy(most)
        self.inside: list[Request] = []

    def let_in(self, owner: str) -> bool:
        request = Request("", [1], owner=owner)
        try:
            self.occupancy.enter(request)
        except TooManyRequests:
            return False
        self.inside.append(request)
        return True

    def fill(self, owner: str) -> int:
        """As many as come in."""
        count = 0
        while self.let_in(owner):
            count += 1
        return count

    def leave(self, index: int) -> None:
        self.occupancy.leave([self.inside.pop(index)])


def test_an_owner_alone_may_fill_the_whole_queue() -> None:
    assert Door(64).fill("many") == 64


def test_an_owner_who_fills_the_queue_keeps_nobody_else_out_of_it() -> None:
    door = Door(64)
    door.fill("many")
    assert door.fill("second") == 4  # of the 8 that are left
    assert door.fill("third") == 2
    assert door.let_in("fourth")
    assert door.occupancy.requests == 71
    assert not door.let_in("many")


def test_others_come_in_first_when_requests_of_who_fills_the_queue_end() -> None:
    door = Door(64)
    door.fill("many")
    door.fill("second")
    for _ in range(4):
        door.leave(0)
        assert not door.let_in("many")
        assert door.let_in("another")
    assert [r.owner for r in door.inside].count("many") == 60


@pytest.mark.parametrize("most", [1, 3])
def test_even_the_smallest_queue_has_a_place_for_another(most: int) -> None:
    door = Door(most)
    assert door.fill("many") == most
    assert door.fill("another") == 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=60), st.integers(1, 12))
def test_the_queue_is_bounded_and_empty_in_the_end(events: list[tuple[str, int]], most: int) -> None:
    door = Door(most)
    for owner, leaving in events:
        door.let_in(owner)
        for _ in range(min(leaving, len(door.inside))):
            door.leave(0)
        assert door.occupancy.requests == len(door.inside) <= most + -(-most // 8)
        assert door.occupancy._owners == Counter(r.owner for r in door.inside)
    while door.inside:
        door.leave(0)
    assert door.fill("new") == most
