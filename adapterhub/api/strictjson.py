"""JSON bodies that could be read in two ways, or cost more than they say, are refused before a route sees them."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any

from adapterhub.errors import BadRequest

MAX_DEPTH = 100
# an unfinished string ends with the text: searching on from each of its quotes would take quadratic time
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_CLOSE, _OPEN = 0, 1
_KINDS = bytes.maketrans(b"]}[{", bytes((_CLOSE, _CLOSE, _OPEN, _OPEN)))
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_CHANGES = (-1, 1)  # of the depth, by kind


def check_json(body: bytes) -> None:
    """Raises BadRequest for what is no JSON in UTF-8, nests deeper than `MAX_DEPTH`, or says a key of an object twice:
    two readers may take different ones."""
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _too_deep(body):
        raise _invalid(f"it nests deeper than the {MAX_DEPTH} levels that are taken here")
    try:
        json.loads(body.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise _invalid(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(str(error)) from error


def _too_deep(body: bytes) -> bool:
    kinds = _STRING.sub(b"", body).translate(None, _OTHERS).translate(_KINDS)
    depths = accumulate(map(_CHANGES.__getitem__, kinds))
    return next(filter(MAX_DEPTH.__lt__, depths), None) is not None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is there twice in one object")
    return made


def _invalid(reason: str) -> BadRequest:
    return BadRequest(f"The body is not valid JSON: {reason}.", code="invalid_json")
