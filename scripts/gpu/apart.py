"""Work in processes of its own: what breaks there, or hangs, breaks nothing else.

After an illegal access nothing more runs on a GPU in the process that made it. So a child goes through what is to be
done, and tells of each result as it comes; where one breaks, another child goes on behind it.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from gpu.clock import Clock

Section = tuple[str, Callable[[], Any]]  # its title, and what finds or measures something
Sections = Callable[[], Iterator[Section]]
_TO_BEGIN = 120.0  # seconds that a child may have until it is at its first section, beyond the section's own
_TO_END = 20.0  # seconds that a child has to put its things away
_context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU


@dataclass(frozen=True)
class Result:
    """What came of one section: a value, or why there is none."""

    title: str
    value: Any = None
    error: str | None = None
    seconds: float = 0.0
    left_out: list[str] = field(default_factory=list)  # by the clock, so far


@dataclass(frozen=True)
class _Begun:
    title: str


def apart(
    name: str,
    sections: Sections,
    device: torch.device,
    clock: Clock,
    patience: float,
    hear: Callable[[Result], None],
) -> None:
    """Goes through `sections` in children, but for those for which the clock has no time left, and calls `hear` with
    each result. A section that takes longer than `patience`, in seconds, is ended. Where the sections themselves cannot
    be had, that is the result of `name`."""
    done: set[str] = set()
    while True:
        with tempfile.TemporaryDirectory() as scratch:
            ours, theirs = _context.Pipe()
            child = _context.Process(
                target=_work, args=(theirs, name, sections, frozenset(done), device, clock, scratch), daemon=True
            )
            child.start()
            theirs.close()
            try:
                with ours:
                    broke = _listen(ours, name, clock, patience, hear)
            finally:
                child.join(_TO_END)
                child.kill()
                child.join()
                child.close()
        if broke is None or broke.title == name:  # another child would end as this one did
            return
        done |= {*broke.done, broke.title}


class _Broke(NamedTuple):
    title: str
    done: list[str]  # before that


def _listen(
    child: Connection, name: str, clock: Clock, patience: float, hear: Callable[[Result], None]
) -> _Broke | None:
    """Until the child has ended; what it broke at, if it did."""
    title, since, done = name, time.monotonic(), list[str]()
    while True:
        wait = patience if title != name else patience + _TO_BEGIN
        if not child.poll(wait):
            message: Any = Result(title, error=f"It hangs: nothing came of it for {wait:.0f} s.", seconds=wait)
        else:
            try:
                message = child.recv()
            except EOFError:
                message = Result(title, error="Its process died.", seconds=time.monotonic() - since)
        if message is None:
            return None
        if isinstance(message, _Begun):
            title, since = message.title, time.monotonic()
            continue
        clock.leave_out(message.left_out)
        hear(message)
        if message.error is not None:
            return _Broke(message.title, done)
        done.append(message.title)
        title = name


def _work(
    parent: Connection,
    name: str,
    sections: Sections,
    done: frozenset[str],
    device: torch.device,
    clock: Clock,
    scratch: str,
) -> None:
    """The child: ends behind the first section that breaks."""
    tempfile.tempdir = scratch  # the parent removes it, however this process ends
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched on the current one
        for title, work in sections():
            if title in done or clock.is_over(title):
                continue
            parent.send(_Begun(title))
            result = _result(title, work, clock)
            parent.send(result)
            if result.error is not None:
                return
    except Exception as error:
        traceback.print_exception(error)
        parent.send(Result(name, error=_told(error), left_out=clock.left_out))
        return
    parent.send(None)


def _result(title: str, work: Callable[[], Any], clock: Clock) -> Result:
    began, value, told = time.monotonic(), None, None
    try:
        value = work()
    except Exception as error:
        traceback.print_exception(error)
        told = _told(error)
    return Result(title, value, told, time.monotonic() - began, clock.left_out)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
