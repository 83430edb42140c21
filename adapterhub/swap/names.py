"""What owners and adapters may be called: names become parts of model names. Light to import, for the CLI's sake."""

from __future__ import annotations

import re

from adapterhub.errors import BadRequest

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


def check_name(name: str, what: str) -> str:
    """Names of owners and adapters become parts of model names. Raises BadRequest."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{name[:80]!r} is not a valid {what}: use 1 to 64 letters, digits, '.', '_' or '-', beginning and ending "
            "with a letter or digit.",
            param=what,
        )
    return name
