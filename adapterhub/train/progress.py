"""What a run tells after a step, as the job and its events show it."""

from __future__ import annotations

from typing import Any

from adapterhub.swap.database import now
from adapterhub.train.job import Job, Note
from adapterhub.train.news import Progress


def note_of(job: Job, told: Progress) -> Note:
    data: dict[str, Any] = {
        "step": told.step,
        "total_steps": told.total_steps,
        "train_loss": round(told.loss, 5),
        "train_mean_token_accuracy": round(told.accuracy, 5),
        "learning_rate": told.learning_rate,
        "gradient_norm": round(told.gradient_norm, 5),
        "trained_tokens": told.trained_tokens,
        "tokens_per_second": round(told.tokens_per_second, 1),
        "seconds_left": round(told.seconds_left, 1),
    }
    message = f"Step {told.step}/{told.total_steps}: training loss={told.loss:.2f}"
    if told.valid is not None:
        data["valid_loss"] = round(told.valid.loss, 5)
        data["valid_mean_token_accuracy"] = round(told.valid.accuracy, 5)
        message += f", validation loss={told.valid.loss:.2f}"
    return Note(job.id, message, data, told.trained_tokens, now() + round(told.seconds_left))
