"""Moves jobs along: one thread validates their files (`validator.py`), one runs them and has what they have learned
published (`conductor.py`)."""

from __future__ import annotations

from collections.abc import Collection

from adapterhub.train.conductor import Conductor
from adapterhub.train.validator import Validator


class Worker:
    """`wake` it after a job was created, paused, resumed or cancelled."""

    def __init__(self, validator: Validator, conductor: Conductor) -> None:
        self._validator, self._conductor = validator, conductor

    def start(self) -> None:
        self._validator.start(on_done=self._conductor.wake)
        self._conductor.start(on_unprepared=self._validator.wake, validating=lambda: self._validator.taken)

    def stop(self) -> None:
        """While the engine still runs: it hands over the states of the runs."""
        self._validator.stop()
        self._conductor.stop()

    def busy(self, jobs: Collection[str]) -> bool:
        """Whether anything may still be written for one of those jobs, by their ids."""
        return self._validator.busy(jobs) or self._conductor.busy(jobs)

    def wake(self) -> None:
        """Looks at the database again: something in it is new."""
        self._validator.wake()
        self._conductor.wake()
