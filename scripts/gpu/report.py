"""Checks and figures, and what is made of them: a plain table, JSON, a page of Markdown."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy
import peft
import torch
import transformers
from figure import Figure

from gpu.clock import Clock


@dataclass(frozen=True)
class Check:
    """Whether something that must hold did, and what was seen."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.ok else 'WRONG'}  {self.name}: {self.detail}"


class Report:
    """One run on one device, and its clock."""

    def __init__(self, device: torch.device, quick: bool, clock: Clock) -> None:
        self.device, self.quick, self.clock = device, quick, clock
        self.checks: list[Check] = []
        self.figures: dict[str, list[Figure]] = {}
        self.lacking: dict[str, str] = {}  # what is left out, and the package that it needs
        self.seconds: dict[str, float] = {}  # that each check, and the figures of each title, took

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def where(self) -> str:
        return f"{describe(self.device)}; {'small sizes (--quick)' if self.quick else 'full sizes'}"

    def add(self, check: Check) -> None:
        self.checks.append(check)
        print(check, flush=True)

    def lack(self, what: str, package: str) -> None:
        self.lacking[what] = package
        print(f"Left out, for want of {package}: {what}.", flush=True)

    def show(self, title: str, figures: list[Figure]) -> None:
        self.figures[title] = figures
        print(f"\n{title}", *figures, sep="\n", flush=True)

    def times(self) -> list[tuple[str, float, float]]:
        """Each section, the seconds that it took, and the most that it may take where others take theirs."""
        return [(name, seconds, self.clock.share(name)) for name, seconds in self.clock.seconds.items()]

    def time_table(self) -> str:
        lines = [f"{name:<40} {seconds:>7.1f} s of {share:.0f}" for name, seconds, share in self.times()]
        return "\n".join(["Where the time went", *lines, *self._left_out()])

    def write_json(self, path: Path) -> None:
        fields = {
            "device": self.where,
            "gpu": self.device.type == "cuda",
            "versions": versions(),
            "date": f"{date.today()}",
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "took": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
            "figures": {title: [asdict(figure) for figure in figures] for title, figures in self.figures.items()},
            "seconds": {name: round(seconds, 1) for name, seconds in self.clock.seconds.items()},
            "left_out": self.clock.left_out,
            "lacking": self.lacking,
        }
        path.write_text(json.dumps(fields, indent=1) + "\n")

    def write_markdown(self, path: Path) -> None:
        lines = [
            "# The engine on one device",
            "",
            f"Written by `scripts/gpu_check --markdown`, in one run: {self.where}; {versions()}; {date.today()}.",
            "Every limit was measured in the same run as the figures beside it. Run it again with",
            "`scripts/gpu_check --json docs/gpu.json --markdown docs/gpu.md`.",
            "",
            f"{sum(c.ok for c in self.checks)} of {len(self.checks)} checks passed.",
            "",
            *_table(
                ("check", "", "seen", "seconds"),
                ((c.name, "ok" if c.ok else "**wrong**", c.detail, self._took(c.name)) for c in self.checks),
            ),
        ]
        for title, figures in self.figures.items():
            rows = (
                (f.name, f"{f.median:g}", f"{f.low:g}", f"{f.high:g}", f.unit, str(f.runs), f.note) for f in figures
            )
            lines += [
                "",
                f"## {title}",
                "",
                *_table(("", "median", "min", "max", "unit", "runs", "beside it"), rows),
                "",
                f"Measured in {self._took(title)} s.",
            ]
        times = ((name, f"{seconds:.1f}", f"{share:.0f}") for name, seconds, share in self.times())
        lines += ["", "## Where the time went", "", *_table(("section", "seconds", "its share"), times)]
        for line in self._left_out():
            lines += ["", line]
        path.write_text("\n".join(lines) + "\n")

    def _took(self, name: str) -> str:
        return f"{self.seconds.get(name, 0.0):.1f}"

    def _left_out(self) -> list[str]:
        left_out = [f"Left out, for want of {package}: {what}." for what, package in self.lacking.items()]
        if self.clock.left_out:
            left_out.append(f"Left out, for want of time: {'; '.join(self.clock.left_out)}.")
        return left_out


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    whole = [list(head), *(list(row) for row in rows)]
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in whole]
    return [lines[0], "| " + " | ".join("---" for _ in whole[0]) + " |", *lines[1:]]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"GPU {card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
    return f"CPU {platform.machine()} with {os.cpu_count()} cores, no GPU used"


def versions() -> str:
    cuda = f" (CUDA {torch.version.cuda})" if torch.version.cuda else ""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}{cuda}, triton {triton}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}, numpy {numpy.__version__}"
    )
