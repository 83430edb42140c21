"""JSON bodies that could be read in two ways, or cost more than they say, are refused before a route sees them."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

from adapterhub.errors import BadRequest

MAX_DEPTH = 100
MAX_VALUES = 2**18  # in lists and objects, so that the interpreter is busy with one body for some milliseconds alone
_OPEN, _CLOSE, _NEXT = b"[{", b"]}", b","
_OTHERS = bytes(set(range(256)) - set(_OPEN + _CLOSE + _NEXT))
_KINDS = bytes.maketrans(_OPEN + _CLOSE, bytes((1, 1, 0, 0)))
_CHANGES = (-1, 1)  # of the depth, by kind


def check_json(body: bytes) -> None:
    """Raises BadRequest for what is no JSON in UTF-8, nests deeper than `MAX_DEPTH`, has more than `MAX_VALUES`, or
    says a key of an object twice: two readers may take different ones."""
    if _count(body) > MAX_DEPTH:
        _check_shape(body)
    try:
        json.loads(body.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise _invalid(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(str(error)) from error


def _count(text: bytes) -> int:
    """No fewer than there are values in lists and objects, but for one in each of those; none nests deeper."""
    return sum(map(text.count, _OPEN + _NEXT))


def _check_shape(body: bytes) -> None:
    """In a few passes of native code, before anything is made of what the body says. Where a backslash is in no string,
    it is no JSON from there on, whatever is counted."""
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > 4 * (MAX_VALUES + 1):  # as many keys as values, each a string of two quotes
        raise _too_many()
    between_strings = b"".join(unescaped.split(b'"')[::2])
    marks = between_strings.translate(None, _OTHERS)
    if _count(marks) > MAX_VALUES:
        raise _too_many()
    depths = accumulate(map(_CHANGES.__getitem__, marks.translate(_KINDS, _NEXT)))
    if next(filter(MAX_DEPTH.__lt__, depths), None) is not None:
        raise _invalid(f"it nests deeper than the {MAX_DEPTH} levels that are taken here")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is there twice in one object")
    return made


def _too_many() -> BadRequest:
    return _invalid(f"it has more than the {MAX_VALUES} values in lists and objects that are taken here")


def _invalid(reason: str) -> BadRequest:
    return BadRequest(f"The body is not valid JSON: {reason}.", code="invalid_json")
