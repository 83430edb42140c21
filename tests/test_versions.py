"""What names point at: releases, candidates, checkpoints; promoted, rolled back, split, deleted, by many at once, and
killed at any moment. Compared with a naive model of it."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import BadRequest, NotFound
from adapterhub.swap.database import Database
from adapterhub.swap.history import shares_of
from adapterhub.swap.pins import PinnedBy
from adapterhub.swap.ref import Tier
from adapterhub.swap.repair import inspect
from adapterhub.swap.tables import migrations
from adapterhub.swap.versions import Kind, Version, drawn
from tests.killed import said_until_killed
from tests.test_block import make_block
from tests.test_registry import Place


def add(place: Place, kind: Kind = Kind.RELEASE, *, seed: int = 0, step: int | None = None, **more: Any) -> Version:
    fields = {"owner": "mira", "name": "one", "base": "base", "origin": "ftjob-1", **more}
    return place.registry.publish(block=make_block(seed=seed), kind=kind, step=step, **fields)


def check(place: Place) -> None:
    """Every name points at a release of its own, which its history ends with, and every split is whole."""
    adapters: dict[str, list[Version]] = {}
    for version in place.registry.versions():
        adapters.setdefault(version.adapter, []).append(version)
    for adapter, versions in adapters.items():
        history = place.registry.history.of(adapter)
        current = [v for v in versions if v.current]
        assert [v.id for v in current] == [was.version for was in history[:1]]
        assert {was.version for was in history} <= {v.id for v in versions if v.kind is Kind.RELEASE}
        assert all((v.number is None) == (v.kind is Kind.CHECKPOINT) for v in versions)
        if split := versions[0].split:
            assert {share.version for share in split} <= {v.id for v in versions}
            assert sum(share.percent for share in split) == 100
            assert current
        elif not current:
            assert not any(v.kind is Kind.RELEASE for v in versions), "a release is left, and the name points at none"
    place.check()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "data")


# -- names


def test_only_a_release_flips_the_name(place: Place) -> None:
    checkpoint = add(place, Kind.CHECKPOINT, step=10)
    candidate = add(place, Kind.CANDIDATE, seed=1)
    assert place.registry.resolve("mira", "mira/one") is None
    first = add(place, seed=2)
    assert place.registry.resolve("mira", "mira/one") == first
    add(place, Kind.CANDIDATE, seed=3)
    add(place, Kind.CHECKPOINT, seed=4, step=20)
    assert place.registry.resolve("mira", "mira/one") == first
    assert [v.number for v in (checkpoint, candidate, first)] == [None, 1, 2]
    check(place)


def test_a_version_answers_to_its_own_name_and_to_what_it_is_among_its_adapters(place: Place) -> None:
    first = add(place)
    step = add(place, Kind.CHECKPOINT, seed=1, step=7, metrics={"train_loss": 0.5})
    second = add(place, seed=2)
    candidate = add(place, Kind.CANDIDATE, seed=3)
    assert first.model == f"ft:base:mira:one:{first.id}"
    assert (step.model, step.metrics) == (f"ft:base:mira:one:{step.id}:ckpt-step-7", {"train_loss": 0.5})
    meant = {
        "mira/one": second,
        "mira/one@1": first,
        "mira/one@2": second,
        "mira/one@3": candidate,
        "mira/one@candidate": candidate,
        "mira/one@previous": first,
        f"mira/one@{step.id}": step,
        **{version.model: version for version in (first, step, second, candidate)},
    }
    now = {v.id: v for v in place.registry.versions()}
    for name, version in meant.items():
        assert place.registry.resolve("mira", name) == now[version.id], name


def test_the_name_of_the_base_may_have_colons(place: Place) -> None:
    for version in (add(place, base="a:b@c"), add(place, Kind.CHECKPOINT, base="a:b:ckpt-step-7", step=7)):
        found = place.registry.resolve("mira", version.model)
        assert found is not None
        assert found.id == version.id


@pytest.mark.parametrize(
    "name",
    [
        "mira/one@",
        "mira/one@0",
        "mira/one@01",
        "mira/one@-1",
        "mira/one@2",
        "mira/one@99999999999999999999999",
        "mira/one@٣",
        "mira/one@1@1",
        "mira/one@current",
        "mira/one@candidate",
        "mira/one@previous",
        "mira/one:1",
        "mira/@1",
        "mira@1",
        "teo/one@1",
        "ft:base:mira:one:{id}:ckpt-step-7",
        "ft:base:mira:one:{step}",
        "ft:base:mira:one:{step}:ckpt-step-8",
        "ft:base:mira:one:{step}:ckpt-step-",
        "ft:base:mira:two:{id}",
        "ft:base:teo:one:{id}",
        "ft:",
        "ft:{id}",
        "ft::::",
        "{id}",
        "@{id}",
    ],
)
def test_any_other_name_means_nothing(place: Place, name: str) -> None:
    first, step = add(place), add(place, Kind.CHECKPOINT, seed=1, step=7)
    assert place.registry.resolve("mira", name.format(id=first.id, step=step.id)) is None


def test_a_version_of_another_adapter_or_owner_is_as_unknown_as_none(place: Place) -> None:
    mine, others, theirs = add(place), add(place, name="two"), add(place, owner="teo")
    for owner, adapter, which, message in (
        ("mira", mine.adapter, others.id, f"mira/one has no version '{others.id}'"),
        ("mira", mine.adapter, others.model, "mira/one has no version"),
        (None, mine.adapter, theirs.id, "mira/one has no version"),
        ("mira", mine.adapter, "9", "mira/one has no version '9'"),
        ("mira", theirs.adapter, theirs.id, f"You have no adapter '{theirs.adapter}'"),
        ("mira", "adapter-none", "1", "You have no adapter 'adapter-none'"),
    ):
        with pytest.raises(NotFound, match=message):
            place.registry.promote(owner, adapter, which)
        with pytest.raises(NotFound, match=message):
            place.registry.split(owner, adapter, {which: 10})
    with pytest.raises(NotFound, match="You have no adapter"):
        place.registry.rollback("mira", theirs.adapter)
    assert place.registry.promote(None, theirs.adapter, "1").owner == "teo", "an operator may"


def test_a_number_is_never_given_twice(place: Place) -> None:
    add(place)
    second = add(place, seed=1)
    place.registry.delete_version("mira", second.id)
    assert place.registry.resolve("mira", "mira/one@2") is None
    assert add(place, seed=2).number == 3
    step = add(place, Kind.CHECKPOINT, seed=3, step=1)
    assert place.registry.promote("mira", step.adapter, step.id).number == 4
    assert place.registry.promote("mira", step.adapter, "4").number == 4, "it has one already"


# -- checkpoints


def test_a_checkpoint_that_is_promoted_keeps_its_name_and_is_not_pruned(place: Place) -> None:
    steps = [add(place, Kind.CHECKPOINT, seed=step, step=step) for step in (10, 20, 30, 40)]
    promoted = place.registry.promote("mira", steps[0].adapter, steps[1].model)
    assert (promoted.model, promoted.kind, promoted.step) == (steps[1].model, Kind.RELEASE, 20)
    assert place.registry.of_origin("mira", "ftjob-1") is None, "it is not what the job has ended with"
    assert [v.id for v in place.registry.prune_checkpoints("mira", "ftjob-1", 1)] == [steps[2].id, steps[0].id]
    assert [v.step for v in place.registry.checkpoints("mira", "ftjob-1")] == [40, 20]
    assert place.registry.prune_checkpoints("mira", "ftjob-2", 0) == []
    assert place.registry.prune_checkpoints("teo", "ftjob-1", 0) == []
    check(place)


def test_pruning_spares_what_a_split_sends_requests_to(place: Place) -> None:
    release = add(place)
    steps = [add(place, Kind.CHECKPOINT, seed=step, step=step) for step in (10, 20)]
    place.registry.split("mira", release.adapter, {steps[0].id: 5})
    assert [v.id for v in place.registry.prune_checkpoints("mira", "ftjob-1", 0)] == [steps[1].id]
    assert dict(place.registry.checkpoints("mira", "ftjob-1")[0].split) == {steps[0].id: 5, release.id: 95}
    check(place)


def test_a_checkpoint_of_a_step_is_published_once(place: Place) -> None:
    first = add(place, Kind.CHECKPOINT, step=10)
    assert add(place, Kind.CHECKPOINT, seed=1, step=10) == first
    assert add(place, Kind.CHECKPOINT, seed=1, step=10, origin="ftjob-2") != first
    check(place)


def test_an_adapter_goes_with_its_last_checkpoint(place: Place) -> None:
    step = add(place, Kind.CHECKPOINT, step=10)
    place.registry.prune_checkpoints("mira", "ftjob-1", 0)
    with pytest.raises(NotFound):
        place.registry.adapter("mira", step.adapter)
    check(place)


def test_candidates_and_checkpoints_are_kept_mended_and_brought_to_the_store_as_releases_are(tmp_path: Path) -> None:
    data, url = tmp_path / "data", f"file://{tmp_path / 'store'}"
    before = Place(data)
    made = [add(before, Kind.CANDIDATE), add(before, Kind.CHECKPOINT, seed=1, step=3)]
    for version in made:
        path = before.disk.files.path(version.digest)
        path.write_bytes(path.read_bytes()[:-1])
    seen = inspect(before.database, data / "blobs", None, data)
    assert [fault.version for fault in seen.faults] == [f"mira/one, checkpoint {made[1].id}", "mira/one, version 1"]
    before.registry.delete_adapter("mira", made[0].adapter)
    made = [add(before, Kind.CANDIDATE), add(before, Kind.CHECKPOINT, seed=1, step=3)]
    before.database.close()
    place = Place(data, url)
    place.settle()
    assert place.disk.files.evict(2**30, "")
    assert [place.disk.tier_of(version.digest) for version in made] == [Tier.REMOTE] * 2
    check(place)
    assert place.files() == place.named(), "they were fetched"


# -- what was current


def test_rollbacks_go_further_back_each_time_and_then_no_further(place: Place) -> None:
    made = [add(place, seed=seed) for seed in range(3)]
    adapter = made[0].adapter
    place.registry.promote("mira", adapter, "1")
    assert [place.registry.rollback("mira", adapter).number for _ in range(3)] == [3, 2, 1]
    with pytest.raises(BadRequest, match="Nothing was current before version 1 of mira/one"):
        place.registry.rollback("mira", adapter)
    assert place.registry.resolve("mira", "mira/one@previous") is None
    place.registry.promote("mira", adapter, "3")
    assert [was.version for was in place.registry.history.of(adapter)] == [made[2].id, made[0].id]
    check(place)


def test_what_a_rollback_left_behind_does_not_come_back_by_a_deletion(place: Place) -> None:
    made = [add(place, seed=seed) for seed in range(3)]
    place.registry.rollback("mira", made[0].adapter)
    place.registry.delete_version("mira", made[1].id)
    assert place.registry.resolve("mira", "mira/one") == place.registry.version("mira", made[0].id)
    place.registry.delete_version("mira", made[0].id)
    assert place.registry.resolve("mira", "mira/one@3") == place.registry.resolve("mira", "mira/one")
    check(place)


def test_without_a_release_left_the_name_points_at_nothing(place: Place) -> None:
    release = add(place)
    candidate = add(place, Kind.CANDIDATE, seed=1)
    place.registry.delete_version("mira", release.id)
    assert place.registry.resolve("mira", "mira/one") is None
    with pytest.raises(BadRequest, match="mira/one has no release yet, only 1 candidate") as refused:
        place.registry.rollback("mira", candidate.adapter)
    assert refused.value.code == "no_release"
    with pytest.raises(BadRequest, match=f"Ask for {candidate.model}"):
        place.registry.split("mira", candidate.adapter, {"candidate": 10})
    assert place.registry.promote("mira", candidate.adapter, "candidate").current
    check(place)


def test_a_pin_is_on_what_is_current(place: Place) -> None:
    kept: dict[str, bool] = {}
    place.registry.pins._keep = kept.__setitem__
    first, second = add(place), add(place, seed=1)
    step = add(place, Kind.CHECKPOINT, seed=2, step=1)
    place.registry.pins.pin(first.adapter, PinnedBy.OWNER, 10**9)
    digests = {1: first.digest, 2: second.digest, 3: step.digest}
    pinned = lambda: {number for number, digest in digests.items() if kept.get(digest)}  # noqa: E731
    assert pinned() == {2}
    add(place, Kind.CANDIDATE, seed=9)
    assert pinned() == {2}
    place.registry.promote("mira", first.adapter, step.id)
    assert pinned() == {3}
    place.registry.rollback("mira", first.adapter)
    assert pinned() == {2}
    place.registry.delete_version("mira", second.id)
    assert pinned() == {1}
    assert place.registry.resolve("mira", "mira/one").ref.pinned  # type: ignore[union-attr]
    assert not place.registry.resolve("mira", step.model).ref.pinned  # type: ignore[union-attr]


# -- splits


def test_shares_are_what_is_given_and_the_current_version_gets_the_rest(place: Place) -> None:
    first, second = add(place), add(place, seed=1)
    candidate = add(place, Kind.CANDIDATE, seed=2)
    adapter = first.adapter
    for given, expected in (
        ({"candidate": 10}, {candidate.id: 10, second.id: 90}),
        ({"2": 60, "1": 10, candidate.model: 30}, {first.id: 10, candidate.id: 30, second.id: 60}),
        ({"previous": 100}, {first.id: 100, second.id: 0}),
        ({"2": 100}, {}),
        ({}, {}),
    ):
        versions = place.registry.split("mira", adapter, given)
        assert dict(versions[0].split) == expected, given
        current = next(v for v in versions if v.current)
        counts = Counter(drawn(current.split, point) for point in range(100)) if expected else {}
        assert {k: v for k, v in expected.items() if v} == counts
    check(place)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"1": 60, "candidate": 41}, "The shares sum to 101%"),
        ({"1": 60, "2": 30}, "The shares sum to 90%. Give 100 in all, or less without the current version 2"),
        ({"1": 0}, "version 1 of mira/one: 0%; give 1 to 100"),
        ({"1": 101}, "101%; give 1 to 100"),
        ({"1": 10, "previous": 10}, "version 1 of mira/one is named twice"),
    ],
)
def test_shares_that_cannot_be_are_refused_and_nothing_changes(
    place: Place, given: dict[str, int], message: str
) -> None:
    add(place)
    adapter = add(place, seed=1).adapter
    add(place, Kind.CANDIDATE, seed=2)
    before = place.registry.split("mira", adapter, {"candidate": 10})
    with pytest.raises(BadRequest, match=message) as refused:
        place.registry.split("mira", adapter, given)
    assert refused.value.param == "percent"
    assert place.registry.adapter("mira", adapter) == before


def test_a_version_for_another_base_takes_no_share(place: Place) -> None:
    current, other = add(place), replace(add(place, seed=1), fingerprint="0" * 64)
    with pytest.raises(BadRequest, match="made for another base"):
        shares_of(current, [(other, 10)])


def test_one_user_always_gets_the_same_version_and_keeps_it_when_its_share_grows(place: Place) -> None:
    adapter = add(place).adapter
    candidate = add(place, Kind.CANDIDATE, seed=1)
    users = [f"user-{i}" for i in range(1000)]

    def chosen(percent: int) -> set[str]:
        place.registry.split("mira", adapter, {"candidate": percent})
        current = place.registry.resolve("mira", "mira/one")
        assert current is not None
        found = [{user for user in users if place.registry.choose(current, user).id == candidate.id} for _ in range(2)]
        assert found[0] == found[1]
        return found[0]

    few, more = chosen(10), chosen(30)
    assert few < more
    assert 60 < len(few) < 140
    assert 240 < len(more) < 360
    assert chosen(100) == set(users)


def test_without_a_user_each_request_is_drawn_anew(place: Place) -> None:
    adapter = add(place).adapter
    add(place, Kind.CANDIDATE, seed=1)
    place.registry.split("mira", adapter, {"candidate": 25})
    current = place.registry.resolve("mira", "mira/one")
    assert current is not None
    random.seed(1)
    counts = Counter(place.registry.choose(current).kind for _ in range(1000))
    assert 190 < counts[Kind.CANDIDATE] < 310
    assert counts.total() == 1000


def test_a_split_ends_when_another_version_becomes_current_or_one_of_its_own_goes(place: Place) -> None:
    first, adapter = add(place), add(place, seed=1).adapter
    spare = add(place, Kind.CANDIDATE, seed=2)

    def ends(change: Callable[[], object]) -> None:
        place.registry.split("mira", adapter, {"1": 10})
        change()
        assert place.registry.adapter("mira", adapter)[0].split == ()

    ends(lambda: place.registry.promote("mira", adapter, "2"))
    ends(lambda: add(place, seed=3))
    ends(lambda: place.registry.rollback("mira", adapter))
    place.registry.split("mira", adapter, {"1": 10})
    add(place, Kind.CANDIDATE, seed=4)
    place.registry.delete_version("mira", spare.id)
    assert place.registry.adapter("mira", adapter)[0].split != (), "that has nothing to do with it"
    ends(lambda: place.registry.delete_version("mira", first.id))
    check(place)


def test_a_version_that_goes_while_a_request_is_about_to_get_it_leaves_that_to_the_current_one(place: Place) -> None:
    current = add(place)
    candidate = add(place, Kind.CANDIDATE, seed=1)
    place.registry.split("mira", current.adapter, {"candidate": 100})
    found = place.registry.resolve("mira", "mira/one")
    assert found is not None
    place.registry.delete_version("mira", candidate.id)
    assert place.registry.choose(found, "somebody") == found


# -- what it costs


def test_a_request_costs_one_query_by_index_and_one_more_only_where_its_name_is_split(place: Place) -> None:
    release = add(place)
    candidate = add(place, Kind.CANDIDATE, seed=1)
    step = add(place, Kind.CHECKPOINT, seed=2, step=1)
    asked: list[str] = []
    [reader] = place.database._readers
    reader.conn.set_trace_callback(lambda sql: asked.append(sql) if "select" in sql else None)

    def queries(name: str) -> int:
        asked.clear()
        found = place.registry.resolve("mira", name)
        assert found is not None
        place.registry.choose(found, "somebody")
        return len(asked)

    seen: list[str] = []
    for name in ("mira/one", "mira/one@1", "mira/one@candidate", release.model, candidate.model, step.model):
        assert queries(name) == 1, name
        seen += asked
    place.registry.split("mira", release.adapter, {"candidate": 100})
    assert queries("mira/one") == 2
    seen += asked
    asked.clear()
    place.registry.checkpoints("mira", "ftjob-1")
    place.registry.history.of(release.adapter)
    seen += asked
    reader.conn.set_trace_callback(None)
    for sql in seen:
        details = [row["detail"] for row in place.database.rows(f"explain query plan {sql}")]
        assert not [d for d in details if d.startswith("SCAN")], (sql, details)


# -- any order, many at once, and a kill


@dataclass
class Naive:
    """What one adapter's name should mean, done by hand."""

    kinds: dict[str, Kind] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    last: int = 0
    past: list[str] = field(default_factory=list)  # ends with what is current
    split: dict[str, int] = field(default_factory=dict)

    def number(self, version: str) -> None:
        if version not in self.numbers:
            self.last += 1
            self.numbers[version] = self.last

    def publish(self, version: str, kind: Kind) -> None:
        self.kinds[version] = kind
        if kind is not Kind.CHECKPOINT:
            self.number(version)
        if kind is Kind.RELEASE:
            self.point(version)

    def point(self, version: str) -> None:
        self.kinds[version] = Kind.RELEASE
        self.number(version)
        self.past += [] if self.past[-1:] == [version] else [version]
        self.split = {}

    def rollback(self) -> bool:
        before = [i for i, version in enumerate(self.past) if version != self.past[-1]]
        if not before:
            return False
        self.past, self.split = self.past[: before[-1] + 1], {}
        return True

    def delete(self, version: str) -> None:
        current = self.past[-1:] == [version]
        del self.kinds[version]
        self.past = [v for v in self.past if v != version]
        if not self.past and (left := [v for v, kind in self.kinds.items() if kind is Kind.RELEASE]):
            self.past = [max(left, key=lambda v: self.numbers[v])]
        if current or version in self.split:
            self.split = {}


def act(place: Place, naive: Naive, draw: random.Random, seed: int) -> None:
    known = list(naive.kinds)
    adapter = place.registry.named("mira", "one")[0].adapter if known else ""
    what = draw.choice(["publish", "publish", "promote", "rollback", "delete", "split", "split"])
    if what == "publish" or not known:
        kind = draw.choice(list(Kind))
        step = seed if kind is Kind.CHECKPOINT else None
        naive.publish(add(place, kind, seed=draw.randrange(6), step=step).id, kind)
    elif what == "promote":
        version = draw.choice(known)
        place.registry.promote("mira", adapter, version)
        naive.point(version)
    elif what == "rollback":
        if naive.past and naive.rollback():
            place.registry.rollback("mira", adapter)
        else:
            with pytest.raises(BadRequest):
                place.registry.rollback("mira", adapter)
    elif what == "delete":
        version = draw.choice(known)
        place.registry.delete_version("mira", version)
        naive.delete(version)
    elif naive.past:
        chosen = draw.sample(known, min(len(known), draw.randrange(3)))
        percent = {version: draw.randrange(1, 50) for version in chosen if version != naive.past[-1]}
        place.registry.split("mira", adapter, percent)
        naive.split = percent and {**percent, naive.past[-1]: 100 - sum(percent.values())}


def test_whatever_is_done_in_whatever_order_a_name_means_what_it_should(place: Place) -> None:
    draw, naive = random.Random(5), Naive()
    for turn in range(250):
        act(place, naive, draw, turn)
        if not naive.kinds:
            naive = Naive()  # the next one of the name is another adapter
        found = {v.id: v for v in place.registry.named("mira", "one")}
        assert {v.id: v.kind for v in found.values()} == naive.kinds
        assert [v.id for v in found.values() if v.current] == naive.past[-1:]
        assert {v.id: v.number for v in found.values() if v.number} == {
            version: number for version, number in naive.numbers.items() if version in naive.kinds
        }
        if found:
            one = next(iter(found.values()))
            assert dict(one.split) == naive.split
            past = [v for i, v in enumerate(naive.past) if naive.past[i - 1 : i] != [v]]
            assert [was.version for was in place.registry.history.of(one.adapter)] == past[::-1]
    check(place)


def test_many_at_once_leave_names_histories_and_splits_whole(place: Place) -> None:
    add(place)
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for turn in range(40):
                versions = place.registry.named("mira", "one")
                what = draw.randrange(5) if versions else 0
                try:
                    if what == 0:
                        kind = draw.choice(list(Kind))
                        step = turn if kind is Kind.CHECKPOINT else None
                        add(place, kind, seed=draw.randrange(6), step=step, origin=f"ftjob-{seed}")
                    elif what == 1:
                        place.registry.promote("mira", versions[0].adapter, draw.choice(versions).id)
                    elif what == 2:
                        place.registry.rollback("mira", versions[0].adapter)
                    elif what == 3:
                        place.registry.split("mira", versions[0].adapter, {draw.choice(versions).id: 40})
                    else:
                        place.registry.delete_version("mira", draw.choice(versions).id)
                except (NotFound, BadRequest):
                    pass  # another was faster
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    check(place)


CHANGER = """
import random, sys
from pathlib import Path
from tests.test_versions import Naive, act
from tests.test_registry import Place
place, draw, naive = Place(Path(sys.argv[1])), random.Random(int(sys.argv[2])), Naive()
print("ready", flush=True)
turn = int(sys.argv[2]) * 1_000_000
while True:
    turn += 1
    for version in place.registry.named("mira", "one") if not naive.kinds else []:
        place.registry.delete_version("mira", version.id)
    act(place, naive, draw, turn)
    if not naive.kinds:
        naive = Naive()
    print(naive.past[-1] if naive.past else "nothing", len(naive.kinds), flush=True)
"""


def test_killed_at_any_moment_a_name_means_what_was_said_last_or_what_came_just_after(tmp_path: Path) -> None:
    for turn in range(4):
        said = said_until_killed(CHANGER, str(tmp_path / "data"), str(turn), seconds=0.05 + 0.13 * turn)
        place = Place(tmp_path / "data")
        check(place)
        if said:
            count = int(said[-1].split()[1])
            assert abs(len(place.registry.named("mira", "one")) - count) <= 1
        place.database.close()


# -- what there was before


def test_a_database_from_before_there_were_kinds_keeps_every_name_and_can_be_rolled_back(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    database = Database(tmp_path / "data" / "hub.db")
    with database.transaction() as db:
        migrations.apply(db, stop_before="add_kinds")
        for name in ("one", "two"):
            db.table("adapters").insert(
                {"id": f"adapter-{name}", "owner": "mira", "name": name, "current": f"{name}-3", "created_at": 1}
            )
            for number in (1, 3):
                fixed = {"digest": "d", "nbytes": 8, "rank": 4, "fingerprint": "f", "base": "base", "origin": "import"}
                row = {"id": f"{name}-{number}", "adapter": f"adapter-{name}", "number": number, "created_at": number}
                db.table("versions").insert({**row, **fixed})
    database.close()
    place = Place(tmp_path / "data")
    one = place.registry.named("mira", "one")
    assert [(v.id, v.number, v.kind, v.current) for v in one] == [
        ("one-3", 3, Kind.RELEASE, True),
        ("one-1", 1, Kind.RELEASE, False),
    ]
    assert [tuple(was) for was in place.registry.history.of("adapter-one")] == [("one-3", 3), ("one-1", 1)]
    assert place.registry.resolve("mira", "ft:base:mira:one:one-1") == one[1]
    assert place.registry.rollback("mira", "adapter-one").id == "one-1"
    assert add(place).number == 4
    place.registry.delete_adapter("mira", "adapter-two")
    assert {v.adapter for v in place.registry.versions()} == {"adapter-one"}
