"""The result file of a job: its learning curve as CSV, with OpenAI's columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

FILENAME = "step_metrics.csv"
_COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}  # by heading, as metrics call them


def result_csv(metrics: Iterable[Mapping[str, Any]]) -> bytes:
    """A line for each step; what was not measured after it is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for values in metrics:
        writer.writerow(values.get(name, "") for name in _COLUMNS.values())
    return text.getvalue().encode()
