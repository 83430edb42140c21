"""The engine's one package that a machine with a GPU may lack, in a form that is enough for a few hundred adapters.

Import this before anything of `adapterhub`. Nothing here is used where `sortedcontainers` is installed.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Iterable
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class SortedList(list[Any]):
    """As of `sortedcontainers`, but slow with many entries."""

    def __init__(self, entries: Iterable[Any] = ()) -> None:
        super().__init__(sorted(entries))

    def add(self, entry: Any) -> None:
        insort(self, entry)

    def remove(self, entry: Any) -> None:
        index = bisect_left(self, entry)
        if self[index : index + 1] != [entry]:
            raise ValueError(f"{entry!r} not in list")
        del self[index]

    def bisect_left(self, entry: Any) -> int:
        return bisect_left(self, entry)

    def copy(self) -> SortedList:
        return SortedList(self)


if find_spec("sortedcontainers") is None:
    module = ModuleType("sortedcontainers")
    vars(module)["SortedList"] = SortedList
    sys.modules["sortedcontainers"] = module
