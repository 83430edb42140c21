"""What comes in, goes and moves, carried out on a small memory that shows every block lost, overwritten or moved
wrongly; and brute force over the whole pool says whether there was room."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.swap.allocator import ALIGNMENT
from adapterhub.swap.policies import Item, OwnerRule, Policy, Rules, TierRules
from adapterhub.swap.ref import Tier
from adapterhub.swap.residency import Residency
from adapterhub.swap.space import Admission, Space

OWNERS = ["ada", "bob", "cyd"]


def item(number: int, units: int) -> Item:
    return Item(f"key-{number}", units * ALIGNMENT, OWNERS[number % 3], 1.0 + number % 2)


@dataclass
class Machine:
    """A residency, and a memory of one entry per unit that does as it says."""

    residency: Residency
    memory: list[str | None] = field(default_factory=list)
    held: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = [None] * (self.residency.allocator.capacity // ALIGNMENT)

    def admit(self, new: Item, now: float, *, pinned: bool = False, spare: tuple[str, ...] = ()) -> Admission | None:
        possible = self.has_room(new.size // ALIGNMENT, spare)
        admission = self.residency.admit(new, now, pinned=pinned, spare=spare)
        assert (admission is not None) == possible
        if admission is None:
            return None
        assert not set(admission.evicted) & {*self.held, *spare}
        for key in admission.evicted:
            self.memory = [None if held == key else held for held in self.memory]
        for move in admission.moves:
            source, target, count = (n // ALIGNMENT for n in (move.source, move.target, move.size))
            block = self.memory[source : source + count]
            assert block == [move.key] * count
            self.memory[source : source + count] = [None] * count
            assert self.memory[target : target + count] == [None] * count
            self.memory[target : target + count] = block
        start, count = admission.start // ALIGNMENT, new.size // ALIGNMENT
        assert self.memory[start : start + count] == [None] * count
        self.memory[start : start + count] = [new.key] * count
        return admission

    def has_room(self, units: int, spare: tuple[str, ...]) -> bool:
        """Between two blocks on their way, does what is free and what may go have so many units?"""
        places, keeper = self.residency.pool.places, self.residency.device
        found, best = 0, 0
        for key in self.memory:
            if key is not None and places[key].loading:
                found = 0
            elif key is None or not (places[key].users or keeper.is_pinned(key) or key in spare):
                found += 1
            best = max(best, found)
        return best >= units

    def check(self) -> None:
        self.residency.check_integrity()
        for key, place in self.residency.pool.places.items():
            start, count = place.start // ALIGNMENT, place.size // ALIGNMENT
            assert self.memory[start : start + count] == [key] * count
        for unit, key in enumerate(self.memory):
            assert key is None or key in self.residency.pool.places, f"{key} has left unit {unit}"

    def sync(self) -> None:
        """After blocks were taken away or laid out anew."""
        self.memory = [None] * (self.residency.allocator.capacity // ALIGNMENT)
        for key, place in self.residency.pool.places.items():
            for unit in range(place.start // ALIGNMENT, (place.start + place.size) // ALIGNMENT):
                assert self.memory[unit] is None
                self.memory[unit] = key


_OFTEN = ["admit", "admit", "admit", "arrive", "arrive", "hold", "hold", "release", "release"]
_events = st.sampled_from([*_OFTEN, "remove", "pin", "unpin", "resize", "rules", "expire", "keep"])


@st.composite
def _rules(draw: st.DrawFn) -> Rules:
    owner = st.builds(
        OwnerRule,
        st.sampled_from([0, 3 * ALIGNMENT]),
        st.sampled_from([None, 6 * ALIGNMENT]),
        st.sampled_from([0, 1, 2]),
    )
    tier = st.builds(
        TierRules,
        st.sampled_from(Policy),
        st.sampled_from([None, None, 10.0]),
        st.dictionaries(st.sampled_from([*OWNERS, "*"]), owner, max_size=2),
    )
    return Rules(device=draw(tier), ram=draw(tier))


@given(
    rules=st.tuples(_rules(), _rules()),
    steps=st.lists(st.tuples(_events, st.integers(0, 60), st.integers(1, 9)), max_size=70),
)
def test_room_is_found_whenever_there_is_any_and_no_block_is_hurt(
    rules: tuple[Rules, Rules], steps: list[tuple[str, int, int]]
) -> None:
    machine = Machine(Residency(16 * ALIGNMENT, 8 * ALIGNMENT, rules[0]))
    residency = machine.residency
    for now, (event, number, units) in enumerate(steps):
        keys = sorted(residency.pool.places)
        key = keys[number % len(keys)] if keys else ""
        if event == "admit" and f"key-{number}" not in residency.pool.places:
            spare = (key,) if key and units % 3 == 0 else ()
            machine.admit(item(number, units), now, pinned=number % 9 == 0, spare=spare)
        elif event == "keep" and f"key-{number}" not in residency.ram:
            residency.keep(item(number, units), now, pinned=number % 9 == 0)
        elif event == "resize" and not any(place.loading for place in residency.pool.places.values()):
            size = residency.allocator.used_bytes // 2 if units < 4 else units * 4 * ALIGNMENT
            plan = residency.plan(None, size, units * ALIGNMENT, now)
            assert residency.change(None, size, units * ALIGNMENT, now) == plan
            machine.sync()
        elif event == "rules":
            plan = residency.plan(rules[1], None, None, now)
            assert residency.change(rules[1], None, None, now) == plan
            machine.sync()
        elif event == "expire":
            residency.expire(now)
            machine.sync()
        elif keys and event == "arrive" and residency.place(key).loading:
            residency.arrived(key)
        elif keys and event == "hold":
            residency.hold(key, now)
            machine.held.append(key)
        elif machine.held and event == "release":
            residency.release(machine.held.pop(number % len(machine.held)), now)
        elif keys and event == "remove" and not residency.place(key).busy:
            residency.remove(key)
            machine.sync()
        elif keys and event in ("pin", "unpin"):
            residency.pin(key, event == "pin", now)
        machine.check()


def filled(units: list[int], capacity: int, rules: Rules | None = None) -> Machine:
    """Blocks side by side, the first used longest ago."""
    machine = Machine(Residency(capacity * ALIGNMENT, 0, rules))
    for number, size in enumerate(units):
        assert machine.admit(item(number, size), number) is not None
        machine.residency.arrived(f"key-{number}")
    return machine


def admitted(machine: Machine, units: int) -> Admission:
    admission = machine.admit(item(99, units), 99)
    assert admission is not None
    machine.check()
    return admission


def test_equals_leave_in_the_order_of_their_last_use() -> None:
    machine = filled([2] * 8, 16)
    machine.residency.hold("key-1", 20)
    machine.residency.release("key-1", 21)
    gone = [machine.admit(item(20 + n, 2), 30 + n).evicted for n in range(4)]  # type: ignore[union-attr]
    assert gone == [["key-0"], ["key-2"], ["key-3"], ["key-4"]]


def test_scattered_holes_are_moved_together_rather_than_evict_more() -> None:
    machine = filled([2, 2, 2, 2, 2, 2], 12)
    machine.residency.remove("key-1")
    machine.residency.remove("key-3")
    machine.sync()
    admission = admitted(machine, 4)
    assert admission.evicted == []
    assert [move.key for move in admission.moves] == ["key-2"]


def test_a_block_in_use_is_moved_and_stays() -> None:
    machine = filled([2, 2, 2], 6)
    machine.residency.hold("key-1", 9)
    admission = admitted(machine, 4)
    assert set(admission.evicted) == {"key-0", "key-2"}
    assert [move.key for move in admission.moves] == ["key-1"]


def test_a_block_on_its_way_stays_where_it_is() -> None:
    machine = filled([1, 2, 3], 6)
    machine.residency.remove("key-1")
    machine.sync()
    assert machine.admit(item(50, 1), 50) is not None
    assert machine.admit(item(99, 5), 99) is None
    machine.residency.arrived("key-50")
    machine.residency.hold("key-50", 60)
    assert [move.key for move in admitted(machine, 5).moves] == ["key-50"]


def test_two_neighbours_of_the_first_to_go_go_with_it_where_moving_would_cost_more() -> None:
    machine = filled([1, 30, 1, 30, 1, 30], 93)
    for number in (0, 2, 4):
        machine.residency.hold(f"key-{number}", 50 + number)
        machine.residency.release(f"key-{number}", 50 + number)
    assert admitted(machine, 2).evicted == ["key-1"]


def test_what_more_than_three_quarters_of_a_budget_would_pin_is_not_pinned() -> None:
    machine = Machine(Residency(8 * ALIGNMENT, 8 * ALIGNMENT))
    for number in range(4):
        assert machine.admit(item(number, 2), number, pinned=True) is not None
        machine.residency.arrived(f"key-{number}")
        machine.residency.keep(item(number, 2), number, pinned=True)
    assert (machine.residency.device.pinned, machine.residency.ram.pinned) == (3, 3)
    assert admitted(machine, 2).evicted == ["key-3"]


def test_what_would_fit_beside_others_finds_room_once_only_those_are_in_use() -> None:
    machine = Machine(Residency(8 * ALIGNMENT, 0))
    for number in range(4):  # the first is pinned
        machine.admit(item(number, 2), number, pinned=number == 0)
        machine.residency.arrived(f"key-{number}")
        machine.residency.hold(f"key-{number}", number)
    fits = lambda units, *numbers: machine.residency.fits_beside(  # noqa: E731
        units * ALIGNMENT, [f"key-{number}" for number in numbers]
    )
    assert fits(6)
    assert not fits(7), "the pinned one stays"
    assert fits(6, 0), "and counts once"
    assert fits(4, 0, 2)
    assert not fits(5, 0, 2)
    for number in (1, 3):
        machine.residency.release(f"key-{number}", 9)
    assert admitted(machine, 4).evicted == ["key-1", "key-3"]


def test_what_pins_left_no_room_for_is_pinned_when_they_do() -> None:
    residency = Residency(8 * ALIGNMENT, 0)
    for number in range(4):
        assert residency.admit(item(number, 2), number, pinned=True) is not None
        residency.arrived(f"key-{number}")
    assert not residency.device.is_pinned("key-3")
    residency.pin("key-0", False, 5)
    assert residency.device.is_pinned("key-3")
    residency.pin("key-0", True, 6)
    assert not residency.device.is_pinned("key-0")
    residency.remove("key-1")
    assert residency.device.is_pinned("key-0")
    residency.admit(item(1, 2), 7, pinned=True)
    residency.arrived("key-1")
    assert not residency.device.is_pinned("key-1")
    assert residency.change(None, 12 * ALIGNMENT, None, 8) is not None
    assert residency.device.is_pinned("key-1"), "a larger budget"
    residency.check_integrity()


def test_blocks_in_ram_are_found_there_and_the_device_comes_first() -> None:
    residency = Residency(4 * ALIGNMENT, 4 * ALIGNMENT)
    residency.keep(item(1, 2), 0)
    assert residency.find("key-1") is Tier.RAM
    residency.admit(item(1, 2), 1)
    assert residency.find("key-1") is Tier.DEVICE
    assert residency.find("key-2") is None


@pytest.mark.parametrize("policy", Policy)
def test_a_pool_too_small_for_what_is_pinned_or_in_use_is_refused(policy: Policy) -> None:
    machine = filled([2, 2, 2, 2], 8, Rules(device=TierRules(policy)))
    machine.residency.pin("key-0", True, 10)
    machine.residency.hold("key-1", 10)
    assert machine.residency.change(None, 3 * ALIGNMENT, None, 11) is None
    plan = machine.residency.change(None, 4 * ALIGNMENT, None, 11)
    assert plan is not None
    assert {key for key, _ in plan.device} == {"key-2", "key-3"}
    machine.sync()
    machine.check()


@given(
    rules=_rules(),
    steps=st.lists(st.tuples(st.sampled_from([*_OFTEN, "remove", "pin"]), st.integers(0, 60), st.integers(1, 6))),
)
def test_where_nothing_moves_room_is_found_whenever_neighbours_may_go(
    rules: Rules, steps: list[tuple[str, int, int]]
) -> None:
    space = Space(16 * ALIGNMENT, rules.ram, moves=False)
    used: list[str] = []

    def stays(key: str | None) -> bool:
        return key is not None and (space.places[key].busy or space.keeper.is_pinned(key))

    def units() -> list[str | None]:
        seen: list[str | None] = [None] * 16
        for key, place in space.places.items():
            for unit in range(place.start // ALIGNMENT, (place.start + place.size) // ALIGNMENT):
                assert seen[unit] is None
                seen[unit] = key
        return seen

    for now, (event, number, size) in enumerate(steps):
        keys = sorted(space.places)
        key = keys[number % len(keys)] if keys else ""
        if event == "admit" and f"key-{number}" not in space.places:
            before = {key: place.start for key, place in space.places.items()}
            free = [not stays(key) for key in units()]
            possible = any(all(free[at : at + size]) for at in range(16 - size + 1))
            admission = space.admit(item(number, size), now, pinned=number % 9 == 0)
            assert (admission is not None) == possible
            if admission is not None:
                assert not admission.moves
                assert not {*admission.evicted} & {*used}
                assert all(space.places[key].start == at for key, at in before.items() if key not in admission.evicted)
        elif keys and event == "hold":
            space.take(key)
            used.append(key)
        elif used and event == "release":
            space.leave(used.pop(number % len(used)))
        elif keys and event == "remove" and not space.places[key].busy:
            space.remove(key)
        elif keys and event == "pin":
            space.pin(key, number % 2 == 0, now)
        units()
        space.check_integrity()


def test_of_blocks_that_do_not_move_neighbours_go_rather_than_those_used_longest_ago() -> None:
    space = Space(8 * ALIGNMENT, TierRules(), moves=False)
    for number in range(4):
        assert space.admit(item(number, 2), number) is not None
    for number in (1, 2, 0, 3):
        space.keeper.touch(f"key-{number}", 10)
    assert space.admit(item(9, 2), 11) == Admission(2 * ALIGNMENT, ["key-1"], [])
    admission = space.admit(item(8, 4), 12)
    assert admission is not None
    assert set(admission.evicted) == {"key-2", "key-3"}
