"""The table of KV blocks against a naive one that writes down what lies in each block and searches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapterhub.base.blocks import BlockTable, chain

TOTAL = 6
CHAINS = [[bytes([letter, digit]) for digit in range(4)] for letter in b"abc"]  # names of sequences that might come


@dataclass
class Holder:
    """A sequence: the blocks it holds, and the names that its blocks get once they are full."""

    names: list[bytes]
    blocks: list[int]
    named: int = 0  # so many of its blocks are full


@dataclass
class NaiveTable:
    """holders[b] says how many hold block b; contents[b] its name, None for one that is in use; absent is cleared."""

    holders: Counter[int] = field(default_factory=Counter)
    contents: dict[int, bytes | None] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)  # least recently used first

    def find(self, name: bytes) -> int | None:
        return next((block for block, content in self.contents.items() if content == name), None)

    def release(self, blocks: Sequence[int]) -> set[int]:
        """Returns those whose contents nobody will ask for."""
        dirty = set()
        for block in reversed(blocks):
            self.holders[block] -= 1
            if not self.holders[block]:
                if self.contents[block] is None:
                    del self.contents[block]
                    dirty.add(block)
                else:
                    self.kept.append(block)
        return dirty

    @property
    def held(self) -> set[int]:
        return set(+self.holders)


class AgreesWithTheNaiveTable(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cleared: list[int] = []
        self.table = BlockTable(TOTAL, self.cleared.extend)
        self.naive = NaiveTable()
        self.live: list[Holder] = []

    def cleared_now(self) -> Counter[int]:
        found = Counter(self.cleared)
        self.cleared.clear()
        return found

    @rule(which=st.integers(0, len(CHAINS) - 1), length=st.integers(0, 4))
    def begin(self, which: int, length: int) -> None:
        """A sequence shares what is there of its beginning, as a scheduler does."""
        names = CHAINS[which][:length]
        expected = []
        for name in names:
            block = self.naive.find(name)
            if block is None:
                break
            expected.append(block)
        assert self.table.share(names) == expected
        assert not self.cleared_now()
        for block in expected:
            self.naive.holders[block] += 1
            if block in self.naive.kept:
                self.naive.kept.remove(block)
        self.live.append(Holder(CHAINS[which], expected, len(expected)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(0, TOTAL + 1))
    def grow(self, data: st.DataObject, count: int) -> None:
        holder = data.draw(st.sampled_from(self.live))
        held = self.naive.held
        clean = TOTAL - len(held) - len(self.naive.kept)
        taken = self.table.allocate(count)
        if taken is None:
            assert count > TOTAL - len(held)
            assert not self.cleared_now()
            return
        assert len(set(taken)) == count <= TOTAL - len(held)
        assert held.isdisjoint(taken)
        forgotten = self.naive.kept[: max(0, count - clean)]
        del self.naive.kept[: len(forgotten)]
        assert self.cleared_now() == Counter(forgotten), "just those that others left something in"
        assert set(forgotten) == {block for block in taken if block in self.naive.contents}
        for block in taken:
            self.naive.contents[block] = None
            self.naive.holders[block] = 1
        holder.blocks += taken

    @precondition(lambda self: any(h.named < min(len(h.blocks), len(h.names)) for h in self.live))
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        """The next block of a sequence is full."""
        growing = [h for h in self.live if h.named < min(len(h.blocks), len(h.names))]
        holder = data.draw(st.sampled_from(growing))
        block, name = holder.blocks[holder.named], holder.names[holder.named]
        self.table.name(block, name)
        if self.naive.find(name) is None:
            self.naive.contents[block] = name
        holder.named += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        holder = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.table.release(holder.blocks)
        assert self.cleared_now() == Counter(self.naive.release(holder.blocks))

    @invariant()
    def agrees(self) -> None:
        self.table.check_integrity([block for holder in self.live for block in holder.blocks])
        assert self.table.free == TOTAL - len(self.naive.held)

    def teardown(self) -> None:
        for holder in self.live:
            self.table.release(holder.blocks)
        assert self.table.free == TOTAL
        taken = self.table.allocate(TOTAL)
        assert sorted(taken or []) == list(range(TOTAL))


TestAgreesWithTheNaiveTable = AgreesWithTheNaiveTable.TestCase


def table(total: int = 4) -> tuple[BlockTable, list[list[int]]]:
    """A table, and the calls of its `clear`."""
    cleared: list[list[int]] = []
    return BlockTable(total, cleared.append), cleared


def filled(blocks: BlockTable, names: list[bytes]) -> list[int]:
    """Blocks of a sequence of its own, full and under these names."""
    taken = blocks.allocate(len(names))
    assert taken is not None
    for block, name in zip(taken, names, strict=True):
        blocks.name(block, name)
    return taken


def forgotten(blocks: BlockTable, names: list[bytes]) -> Iterator[bytes]:
    """Which of the names is forgotten at each block that is allocated."""
    there = list(names)
    while blocks.allocate(1):
        gone = [name for name in there if name not in blocks._by_name]
        there = [name for name in there if name not in gone]
        yield from gone


def test_what_was_released_is_found_again_as_far_as_it_goes() -> None:
    blocks, cleared = table()
    taken = filled(blocks, [b"1", b"2", b"3"])
    blocks.release(taken)
    assert blocks.free == 4
    assert blocks.share([b"1", b"2", b"other", b"3"]) == taken[:2]
    assert blocks.share([b"other", b"1"]) == []
    assert (blocks.free, cleared) == (2, [])
    blocks.check_integrity(taken[:2])


def test_a_shared_block_survives_the_end_of_either_holder() -> None:
    blocks, cleared = table(2)
    mine = filled(blocks, [b"1"])
    theirs = blocks.share([b"1"])
    blocks.release(mine)
    assert theirs == mine
    assert blocks.allocate(2) is None
    assert blocks.allocate(1) is not None
    blocks.check_integrity([0, 1])
    assert blocks.share([b"1"]) == mine
    assert cleared == []


def test_the_least_recently_used_is_forgotten_first() -> None:
    blocks, _ = table(3)
    for name in (b"a", b"b", b"c"):
        blocks.release(filled(blocks, [name]))
    blocks.release(blocks.share([b"a"]))
    assert list(forgotten(blocks, [b"a", b"b", b"c"])) == [b"b", b"c", b"a"]


def test_later_blocks_of_a_sequence_are_forgotten_before_those_they_build_on() -> None:
    blocks, _ = table(4)
    first = filled(blocks, [b"1", b"2"])
    second = blocks.share([b"1"]) + filled(blocks, [b"3", b"4"])
    blocks.release(second)
    blocks.release(first)
    assert list(forgotten(blocks, [b"1", b"2", b"3", b"4"])) == [b"4", b"3", b"2", b"1"]


def test_cleared_blocks_are_used_before_any_is_forgotten() -> None:
    blocks, cleared = table(3)
    blocks.release(filled(blocks, [b"1"]))
    assert blocks.allocate(2) is not None
    assert cleared == []
    assert blocks.share([b"1"])


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    blocks, cleared = table(3)
    held = filled(blocks, [b"1"])
    blocks.release(filled(blocks, [b"2"]))
    assert blocks.allocate(3) is None
    assert (blocks.free, cleared) == (2, [])
    assert blocks.share([b"2"])
    blocks.check_integrity([*held, *blocks.share([]), blocks._by_name[b"2"]])


def test_a_name_stays_with_the_block_that_had_it_first() -> None:
    blocks, cleared = table()
    first, second = filled(blocks, [b"1"]), filled(blocks, [b"1"])
    assert blocks.share([b"1"]) == first
    blocks.release(second)
    assert cleared == [second], "nobody would find it"
    blocks.name(first[0], b"another")
    assert blocks.share([b"another"]) == []


@pytest.mark.parametrize("held", [[], [0], [0, 0, 1], [0, 1, 2]])
def test_check_integrity_sees_what_is_held_by_nobody_or_twice(held: list[int]) -> None:
    blocks, _ = table(3)
    assert blocks.allocate(1)
    assert blocks.allocate(1)
    real = sorted(blocks._holders)
    blocks.check_integrity(real)
    with pytest.raises(AssertionError, match="leaked"):
        blocks.check_integrity([real[i] if i < 2 else 0 for i in held])


def test_check_integrity_sees_lost_blocks_and_names() -> None:
    blocks, _ = table(3)
    blocks._clean.pop()
    with pytest.raises(AssertionError, match="lost"):
        blocks.check_integrity([])
    blocks, _ = table(3)
    held = filled(blocks, [b"1"])
    blocks._by_name[b"1"] = 3 - held[0]
    with pytest.raises(AssertionError, match="names"):
        blocks.check_integrity(held)


@given(
    chains=st.lists(
        st.tuples(st.binary(max_size=20), st.lists(st.lists(st.integers(0, 99), min_size=16, max_size=16), max_size=3)),
        min_size=2,
        max_size=2,
        unique_by=repr,
    )
)
def test_a_name_stands_for_its_salt_and_all_tokens_before(chains: list[tuple[bytes, list[list[int]]]]) -> None:
    def names(salt: bytes, parts: list[list[int]]) -> list[bytes]:
        found: list[bytes] = []
        for part in parts:
            found.append(chain(found[-1] if found else salt, part))
        return found

    (salt, parts), (other_salt, other_parts) = chains
    for at, (name, other) in enumerate(zip(names(salt, parts), names(other_salt, other_parts), strict=False)):
        same = salt == other_salt and parts[: at + 1] == other_parts[: at + 1]
        assert (name == other) is same


def test_a_name_differs_by_salt_by_token_and_by_place() -> None:
    tokens = list(range(16))
    one = chain(b"salt", tokens)
    assert one == chain(b"salt", tuple(tokens))
    others = [chain(b"pepper", tokens), chain(one, tokens), chain(b"salt", tokens[::-1]), chain(b"salt", tokens[:15])]
    assert len({one, *others}) == 5
    assert chain(b"salt", [49151, 2**33]) != chain(b"salt", [49151, 0])


def test_an_owners_blocks_are_erased_and_nobody_elses() -> None:
    cleared: list[int] = []
    blocks = BlockTable(4, cleared.extend)
    taken = blocks.allocate(4)
    assert taken is not None
    for block, owner in zip(taken, ("mira", "mira", "ola", "mira"), strict=True):
        blocks.name(block, bytes([block]), owner)
    blocks.release(taken[1:])
    assert blocks.erase("mira") == 3
    assert sorted(cleared) == sorted([taken[1], taken[3]])
    assert blocks.share([bytes([taken[2]])]) == [taken[2]]
    assert blocks.share([bytes([taken[0]])]) == []
    blocks.check_integrity([taken[0], taken[2]])
    blocks.release([taken[0], taken[2]])
    assert taken[0] in cleared, "what was still held is not kept"
    assert blocks.erase("mira") == 0
    blocks.check_integrity([])
