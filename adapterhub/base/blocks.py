"""Who has which block of the KV cache, and which blocks hold a beginning that the next request may share.

A full block is named by a digest over everything that its keys and values depend on: whose request it was, the base's
adapter version, and all tokens up to its end. Two owners, or two versions, never share a block. Blocks that nobody
holds keep their contents until they are needed, the least recently used first. Plain integers and bytes; no torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence


class BlockTable:
    """`clear` is called with blocks that are about to change hands."""

    def __init__(self, total: int, clear: Callable[[list[int]], None]) -> None:
        self.total = total
        self._clear = clear
        self._clean = list(range(total - 1, -1, -1))  # never used, or cleared
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, contents still named; oldest first
        self._holders: dict[int, int] = {}
        self._names: dict[int, bytes] = {}
        self._by_name: dict[bytes, int] = {}
        self._owners: dict[int, str] = {}  # of the named ones

    @property
    def free(self) -> int:
        return len(self._clean) + len(self._kept)

    def allocate(self, count: int) -> list[int] | None:
        """`count` cleared blocks, or None when fewer are free."""
        if count > self.free:
            return None
        forgotten = [self._kept.popitem(last=False)[0] for _ in range(count - len(self._clean))]
        for block in forgotten:
            self._unname(block)
        if forgotten:
            self._clear(forgotten)
        taken = [self._clean.pop() for _ in range(count - len(forgotten))] + forgotten
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of `names` that is still there, held once more each."""
        found = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            self._holders[block] = self._holders.get(block, 0) + 1
            self._kept.pop(block, None)
            found.append(block)
        return found

    def name(self, block: int, name: bytes, owner: str = "") -> None:
        """The held `block` is full, and from now on to be found by `name`, unless another one is already."""
        if name not in self._by_name and block not in self._names:
            self._names[block] = name
            self._by_name[name] = block
            self._owners[block] = owner

    def erase(self, owner: str) -> int:
        """No block of the owner's is found any more, and those that nobody holds are cleared, the others when they are
        released; returns how many that were."""
        gone = [block for block, whose in self._owners.items() if whose == owner]
        for block in gone:
            self._unname(block)
        idle = [block for block in gone if block in self._kept]
        for block in idle:
            del self._kept[block]
        if idle:
            self._clear(idle)
            self._clean += idle
        return len(gone)

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each. Later blocks of a sequence are forgotten before the earlier ones they build on."""
        dirty = []
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                del self._holders[block]
                if block in self._names:
                    self._kept[block] = None
                else:
                    dirty.append(block)
        if dirty:
            self._clear(dirty)
            self._clean += dirty

    def check_integrity(self, held: Sequence[int]) -> None:
        """Raises AssertionError unless the `held` blocks, each as often as it is held, and the free ones are all."""
        counts: dict[int, int] = {}
        for block in held:
            counts[block] = counts.get(block, 0) + 1
        assert counts == self._holders, "KV blocks leaked, or held by nobody"
        assert sorted([*self._clean, *self._kept, *counts]) == list(range(self.total)), "KV blocks lost or shared"
        assert {self._by_name[name] for name in self._names.values()} == self._names.keys(), "names disagree"
        assert self._owners.keys() == self._names.keys(), "blocks are somebody's and have no name"

    def _unname(self, block: int) -> None:
        del self._by_name[self._names.pop(block)]
        del self._owners[block]


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block from the name of the one before it (or a salt) and its tokens."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()
