"""How far the host may run ahead of a GPU while it launches a training forward and its backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

_AHEAD = 3  # steps: enough that the device never waits for the host


class Mark(Protocol):
    """A place in the device's queue, as `torch.cuda.Event` is."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Pace:
    """Told of each step, it waits until all but the last few are done. So whoever is served between two steps does not
    wait for all that was launched before, and the host's clock says how long training takes."""

    def __init__(self, mark: Callable[[], Mark] | None = None) -> None:
        """`mark` makes marks of another device than torch's current GPU, for tests."""
        self._mark = mark or torch.cuda.Event
        self._marks: deque[Mark] = deque()

    def step(self) -> None:
        """After a step's launches."""
        self._record()
        while len(self._marks) > _AHEAD:
            self._marks.popleft().synchronize()

    def finish(self) -> None:
        """Waits for all of them."""
        self._record()
        self._marks.pop().synchronize()
        self._marks.clear()

    def _record(self) -> None:
        mark = self._mark()
        mark.record()
        self._marks.append(mark)
