"""What the engine does between the steps of serving and when nobody asks."""

from __future__ import annotations

from typing import Protocol


class IdleWork(Protocol):
    """Training, in pieces whose length the engine chooses. It deals with its own errors."""

    def step(self, tokens: int) -> int:
        """One piece on the engine's thread, of about `tokens` tokens and no more where that can be.

        Returns how many tokens it trained; 0 when there is nothing to do at the moment: it is asked again after
        `Engine.wake`."""
        ...
