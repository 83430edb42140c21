"""Takes away what jobs have left: their rows with their events, and what lies in `DATA_DIR/jobs/<id>/`."""

from __future__ import annotations

import shutil
from pathlib import Path

from adapterhub.swap.database import Database
from adapterhub.swap.files import sync_directory


def erase_jobs(database: Database, directory: Path, owner: str) -> None:
    """Removes all jobs of an owner, which must have ended and be nobody's work any more. Rows go last, so that it can
    go on where it was killed."""
    rows = database.rows("select id from jobs where owner = ?", (owner,))
    for row in rows:
        shutil.rmtree(directory / row["id"], ignore_errors=not (directory / row["id"]).exists())
    if directory.exists():
        sync_directory(directory)
    with database.freeing() as db:
        db.execute("delete from jobs where owner = ?", [owner])
