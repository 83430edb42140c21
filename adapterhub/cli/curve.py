"""The learning curve of a job: as sparklines and a table in the terminal, or drawn as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from adapterhub.cli.client import console, table_of

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60  # characters of a sparkline
_ROWS = 12  # of the table, besides those with an evaluation
_LOSSES = {"training loss": "train_loss", "validation loss": "valid_loss"}
Metrics = Sequence[dict[str, Any]]


def show_curve(metrics: Metrics) -> None:
    """`metrics`: of each step, in order, at least one."""
    for name, field in _LOSSES.items():
        values = [(m["step"], m[field]) for m in metrics if m.get(field) is not None]
        if values:
            losses = [loss for _, loss in values]
            step, lowest = min(values, key=lambda value: value[1])
            console.print(
                f"{name:15} {sparkline(losses)} {losses[0]:.4g} to {losses[-1]:.4g}, lowest {lowest:.4g} at step {step}"
            )
    every = -(-len(metrics) // _ROWS)
    last = len(metrics) - 1
    shown = [m for i, m in enumerate(metrics) if i % every == 0 or i == last or m.get("valid_loss") is not None]
    fields = {
        "Step": "step",
        "Training loss": "train_loss",
        "Accuracy": "train_mean_token_accuracy",
        "Validation loss": "valid_loss",
        "Validation accuracy": "valid_mean_token_accuracy",
        "Learning rate": "learning_rate",
    }
    rows = [{k: v if k == "step" or v is None else f"{v:.4g}" for k, v in m.items()} for m in shown]
    console.print(table_of(rows, fields, right=fields.keys()))


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, or for the mean of several where they are many; the highest is a full one."""
    width = min(_WIDTH, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def draw(metrics: Metrics, path: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, field in _LOSSES.items():
        points = [(m["step"], m[field]) for m in metrics if m.get(field) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-" if field == "valid_loss" else "-", label=name)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
