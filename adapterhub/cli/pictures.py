"""Whether a picture can be drawn, asked before the work that it shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from adapterhub.errors import BadRequest


def check_png(path: Path, option: str) -> None:
    """Raises BadRequest, which names the `option`, where no PNG could be written to `path`."""
    if path.suffix.lower() != ".png":
        raise BadRequest(f"{option} writes a PNG: {path} should end in .png.")
    if not path.absolute().parent.is_dir():
        raise BadRequest(f"There is no directory {path.absolute().parent} to write {path.name} to.")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadRequest(f"{option} needs matplotlib, which is not installed: pip install 'adapterhub[plot]'.")
