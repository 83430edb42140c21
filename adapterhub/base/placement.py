"""On which of several devices a request runs: a decision over plain data, apart from carrying it out.

It looks at each engine once, and never at what adapters there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Seat(NamedTuple):
    """An engine as a request finds it."""

    requests: int  # that it has not ended yet
    used_bytes: int  # of its pool
    holds: bool = False  # the request's adapter is on its device, or will be: it is on its way, or asked for already
    in_ram: bool = False  # its own host copy of it is
    warm: bool = False  # the last request of this owner for this adapter, or for the base, ran here: KV may be left


def margin_of(max_batch: int) -> int:
    """How many more requests than the idlest an engine may have before others are sent there. A batch that is not full
    takes another sequence almost for nothing; a place in it should not be worth a load."""
    return max(1, max_batch // 4)


def place(seats: Sequence[Seat | None], margin: int) -> int:
    """The index of the engine for a request; None is one that takes no more. Raises ValueError when all are.

    Of the engines that have at most `margin` more requests than the idlest: the one that needs to load and to compute
    least, then the least busy. So an adapter stays where it is, and one so hot that its engine falls behind gets a
    replica on the idlest; among its replicas requests go by load.
    """
    living = [(i, seat) for i, seat in enumerate(seats) if seat is not None]
    most = min(seat.requests for _, seat in living) + margin
    index, _ = min(((i, s) for i, s in living if s.requests <= most), key=lambda found: _cost(found[1]))
    return index


def _cost(seat: Seat) -> tuple[bool, bool, bool, int, int]:
    return not seat.holds, not seat.warm, not seat.in_ram, seat.requests, seat.used_bytes
