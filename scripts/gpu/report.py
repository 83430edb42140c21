"""Checks and figures, and what is made of them: a plain table, JSON, a page of Markdown."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import peft
import torch
import transformers
from figure import Figure


@dataclass(frozen=True)
class Check:
    """Whether something that must hold did, and what was seen."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.ok else 'WRONG'}  {self.name}: {self.detail}"


@dataclass
class Report:
    """One run on one device."""

    device: torch.device
    quick: bool
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, list[Figure]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def where(self) -> str:
        return f"{describe(self.device)}; {'small sizes (--quick)' if self.quick else 'full sizes'}"

    def add(self, check: Check) -> None:
        self.checks.append(check)
        print(check, flush=True)

    def show(self, title: str, figures: list[Figure]) -> None:
        self.figures[title] = figures
        print(f"\n{title}", *figures, sep="\n", flush=True)

    def write_json(self, path: Path) -> None:
        fields = {
            "device": self.where,
            "gpu": self.device.type == "cuda",
            "versions": versions(),
            "date": f"{date.today()}",
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "figures": {title: [asdict(figure) for figure in figures] for title, figures in self.figures.items()},
        }
        path.write_text(json.dumps(fields, indent=1) + "\n")

    def write_markdown(self, path: Path) -> None:
        lines = [
            "# The engine on one device",
            "",
            f"Written by `scripts/gpu_check --markdown`, in one run: {self.where}; {versions()}; {date.today()}.",
            "Every limit was measured in the same run as the figures beside it.",
            "",
            f"{sum(c.ok for c in self.checks)} of {len(self.checks)} checks passed.",
            "",
            "| check | | seen |",
            "| --- | --- | --- |",
            *(f"| {c.name} | {'ok' if c.ok else '**wrong**'} | {_cell(c.detail)} |" for c in self.checks),
        ]
        for title, figures in self.figures.items():
            lines += [
                "",
                f"## {title}",
                "",
                "| | median | min | max | unit | runs | beside it |",
                "| --- | --- | --- | --- | --- | --- | --- |",
                *(
                    f"| {f.name} | {f.median:g} | {f.low:g} | {f.high:g} | {f.unit} | {f.runs} | {f.note} |"
                    for f in figures
                ),
            ]
        path.write_text("\n".join(lines) + "\n")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"GPU {card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
    return f"CPU {platform.machine()} with {os.cpu_count()} cores, no GPU used"


def versions() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
