"""A whole run: checks, the device's limits, figures, each section within its share of the time."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec

import torch

from gpu.apart import Result, Section, apart
from gpu.checks import checks
from gpu.clock import Clock
from gpu.figures import measure, shapes
from gpu.kernels import kernel_checks, kernel_figures
from gpu.learning import learning_checks, learning_figures
from gpu.limits import Limits, measure_limits
from gpu.report import Check, Report
from gpu.stage import Sizes, staged

CHECKS, KERNELS, DENOISER = "checks", "limits and kernels", "SDXL's denoiser"
# seconds of the nine minutes; what a section does not use, later ones may
SHARES = {"start": 20, CHECKS: 150, KERNELS: 80, "Qwen2.5-0.5B": 90, "Llama-3.1-8B": 160, DENOISER: 60}
Named = tuple[str, Callable[[str], Check]]  # a check's name, and what does the check of that name
_PATIENCE = 60.0  # seconds that figures may take when the time is over
_CORES = 2  # of a process that checks: while one waits for the compiler, another waits for the device


def run(report: Report, write: Callable[[], None] = lambda: None) -> None:
    """Adds everything to `report`, and calls `write` after each section, so that what was found by then is kept
    whatever comes next. What breaks is told as a check that failed, and the rest goes on."""
    device, quick, clock = report.device, report.quick, report.clock
    clock.seconds["start"] = clock.elapsed
    limits: list[Limits] = []
    lock = threading.Lock()

    def hear(result: Result) -> None:
        with lock:
            report.seconds[result.title] = result.seconds
            if result.error is not None:
                report.add(Check(result.title, False, result.error))
            elif isinstance(result.value, Check):
                report.add(result.value)
            elif isinstance(result.value, Limits):
                limits.append(result.value)
                report.show(result.title, result.value.figures)
            else:
                report.show(result.title, result.value)
            write()

    def figures(name: str, sections: Callable[[], Iterator[Section]]) -> None:
        if not clock.is_over(name):
            with clock.section(name):
                apart(name, sections, device, clock, max(_PATIENCE, clock.limit - clock.elapsed), hear)

    diffusers = find_spec("diffusers") is not None
    if not diffusers:
        report.lack(DENOISER, "diffusers")
    with clock.section(CHECKS):
        groups = _shared_out([*kernel_checks(device, quick), *learning_checks(device, quick), *checks(device, quick)])
        untimed = Clock({}, math.inf)  # no check is left out
        works = [partial(_checks, group) for group in groups]
        works += [partial(_denoiser_checks, device)] if diffusers else []
        with ThreadPoolExecutor(_processes()) as threads:
            list(threads.map(lambda work: apart(CHECKS, work, device, untimed, clock.limit / 3, hear), works))
    figures(KERNELS, partial(_kernels, device, quick, clock))
    if not limits:
        return
    for sizes in shapes(quick):
        figures(sizes.name, partial(_shape, device, sizes, limits[0], clock))
    if diffusers:
        figures(DENOISER, partial(_denoiser, device, limits[0], quick, clock))


def _processes() -> int:
    """That check at once."""
    return max(1, (os.cpu_count() or 1) // _CORES)


def _shared_out(found: Sequence[Named]) -> list[list[Named]]:
    """Checks among the processes, in turn: neighbours take long alike."""
    return [group for i in range(_processes()) if (group := list(found[i :: _processes()]))]


# what the processes go through


def _checks(group: Sequence[Named]) -> Iterator[Section]:
    for name, check in group:
        yield name, partial(check, name)


def _denoiser_checks(device: torch.device) -> Iterator[Section]:
    from gpu.denoiser import denoiser_checks

    return _checks(list(denoiser_checks(device)))


def _kernels(device: torch.device, quick: bool, clock: Clock) -> Iterator[Section]:
    limits = measure_limits(device, quick)
    yield "Limits of the device", lambda: limits
    yield from kernel_figures(device, limits, quick, clock)
    yield from learning_figures(device, limits, quick, clock)


def _shape(device: torch.device, sizes: Sizes, limits: Limits, clock: Clock) -> Iterator[Section]:
    with staged(device, sizes) as stage:
        yield from measure(stage, limits, clock)


def _denoiser(device: torch.device, limits: Limits, quick: bool, clock: Clock) -> Iterator[Section]:
    from gpu.denoiser import denoiser_figures

    yield denoiser_figures(device, limits, quick, clock)
