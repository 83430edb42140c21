"""Figures, and the reports made of them: a table on the terminal, JSON, and a page in docs/."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from figure import Figure
from rich.console import Console
from rich.table import Table

DOCS = Path(__file__).resolve().parents[2] / "docs"
console = Console(highlight=False)


def show(title: str, figures: list[Figure]) -> None:
    table = Table("", "median", "min", "max", "unit", "runs", "beside it", title=title, title_justify="left")
    for f in figures:
        table.add_row(f.name, f"{f.median:g}", f"{f.low:g}", f"{f.high:g}", f.unit, str(f.runs), f.note)
    console.print(table)


def save(results: dict[str, list[Figure]], path: Path) -> None:
    path.write_text(json.dumps({name: [asdict(f) for f in figures] for name, figures in results.items()}, indent=2))


def publish(results: dict[str, list[Figure]], titles: dict[str, str]) -> None:
    """Writes docs/benchmarks.md, from these results and those of earlier runs that these do not replace."""
    store = DOCS / "benchmarks.json"
    sections: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    for name, figures in results.items():
        sections[name] = {"machine": machine(), "date": f"{date.today()}", "figures": [asdict(f) for f in figures]}
    store.write_text(json.dumps(sections, indent=1))
    lines = [
        "# Benchmarks",
        "",
        "Written by `scripts/bench --publish`. Each section is one run; compare only within a section, since these",
        "machines are shared and a factor of two between runs is normal.",
    ]
    for name in titles:
        if name in sections:
            section = sections[name]
            lines += ["", f"## {name}", "", titles[name], "", f"{section['machine']}; {section['date']}.", ""]
            lines += [
                "| | median | min | max | unit | runs | beside it |",
                "| --- | --- | --- | --- | --- | --- | --- |",
            ]
            for f in section["figures"]:
                numbers = f"{f['median']:g} | {f['low']:g} | {f['high']:g} | {f['unit']} | {f['runs']}"
                lines.append(f"| {f['name']} | {numbers} | {f['note']} |")
            if (DOCS / f"{name}.png").exists():
                lines += ["", f"![{name}]({name}.png)"]
    (DOCS / "benchmarks.md").write_text("\n".join(lines) + "\n")


def machine() -> str:
    """The processor and what it has for bf16."""
    flags, model = set(), platform.processor()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            flags = set(value.split())
        elif name.strip() == "model name":
            model = value.strip()
    bf16 = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return f"{os.cpu_count()} cores of {model} ({', '.join(bf16) or 'no bf16 instructions'})"
