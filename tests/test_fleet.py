"""Several engines behave as one: requests go where their adapter is, what is hot is on both, and one can be lost."""

from __future__ import annotations

import ast
import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import PreTrainedModel

from adapterhub.api.devices import THROTTLING, of_nvml
from adapterhub.base import placement
from adapterhub.base.engine import Engine
from adapterhub.base.fleet import Fleet, names_of
from adapterhub.base.lost import DeviceLost, check_device
from adapterhub.base.model import Base, device_of, load_bases
from adapterhub.base.placement import Seat, margin_of, place
from adapterhub.base.request import Output
from adapterhub.base.runner import Runner
from adapterhub.config import Config, parse_devices
from adapterhub.errors import BadRequest, ContextLengthExceeded, ServerFault, Unavailable
from adapterhub.swap.policies import Policy, Rules, TierRules
from adapterhub.swap.ref import AdapterRef, Tier, Use
from tests.scarce import NO_MEMORY
from tests.serving import BASE, PeftFiles, Server, chat_lines, eventually, run_cli, running, small_config
from tests.test_metrics import read
from tests.tiny import Client, encoded, greedy, kv_bytes, peft_model, prompt_of, saved, serving_twin, stored, tiny_model

SECONDS = 60
BATCH = 4
MARGIN = margin_of(BATCH)


# -- where a request goes


seats = st.builds(
    Seat, st.integers(0, 40), st.integers(0, 3), st.booleans(), st.booleans(), st.booleans()
)  # requests, bytes, holds, in RAM, warm
places = st.lists(st.none() | seats, min_size=1, max_size=8).filter(any)


@given(places, st.integers(0, 12))
def test_a_request_goes_to_a_living_engine_that_is_not_far_behind(found: list[Seat | None], margin: int) -> None:
    chosen = found[place(found, margin)]
    assert chosen is not None
    assert chosen.requests <= min(seat.requests for seat in found if seat) + margin


@given(places, st.integers(0, 12))
def test_a_request_goes_where_its_adapter_is_unless_all_who_have_it_are_far_behind(
    found: list[Seat | None], margin: int
) -> None:
    chosen = found[place(found, margin)]
    assert chosen is not None
    near = [s for s in found if s and s.requests <= min(seat.requests for seat in found if seat) + margin]
    assert chosen.holds == any(s.holds for s in near)
    if any(s.holds for s in near):
        assert chosen.warm == any(s.warm for s in near if s.holds)
    equal = [s for s in near if (s.holds, s.warm, s.in_ram) == (chosen.holds, chosen.warm, chosen.in_ram)]
    assert chosen.requests == min(s.requests for s in equal)


@given(places, st.integers(0, 12))
def test_who_is_busy_elsewhere_changes_nothing(found: list[Seat | None], margin: int) -> None:
    """An engine that has ended is as one that was never there."""
    index = place(found, margin)
    living = [seat for seat in found if seat]
    assert living[place(living, margin)] == found[index]


def test_without_any_adapter_the_least_busy_engine_is_taken_and_then_the_emptiest() -> None:
    assert place([Seat(3, 0), Seat(1, 9), Seat(1, 5)], 8) == 2


def test_no_living_engine_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        place([None, None], 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=200), st.integers(2, 4), st.integers(1, 4))
def test_loads_never_drift_apart_and_what_is_asked_for_seldom_is_in_one_place(
    events: list[tuple[int, bool]], engines: int, margin: int
) -> None:
    """A naive fleet: adapters stay where they were once; a request ends, the oldest first, or another comes."""
    holding: list[set[int]] = [set() for _ in range(engines)]
    load, under_way = [0] * engines, list[int]()
    for adapter, comes in events:
        if not comes and under_way:
            load[under_way.pop(0)] -= 1
            continue
        found = [Seat(load[i], len(holding[i]), adapter in holding[i]) for i in range(engines)]
        index = place(found, margin)
        had = any(adapter in held for held in holding)
        if had and adapter not in holding[index]:  # a replica, for a reason
            assert all(load[i] > min(load) + margin for i in range(engines) if adapter in holding[i])
        assert load[index] <= min(load) + margin
        holding[index].add(adapter)
        load[index] += 1
        under_way.append(index)


def test_the_decision_knows_nothing_but_plain_data() -> None:
    tree = ast.parse(Path(placement.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "collections.abc", "typing"}


# -- two engines


class Town(NamedTuple):
    model: PreTrainedModel
    bases: list[Base]
    refs: list[AdapterRef]
    oracles: list[PeftModel]
    directory: Path


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Town:
    return make_town(tmp_path_factory.mktemp("fleet"))


def make_town(directory: Path) -> Town:
    model = tiny_model("llama")
    town = Town(model, [serving_twin(model), serving_twin(model)], [], [], directory)
    for seed in range(4):
        wrapped = peft_model(model, seed=seed, r=2, size=0.2)
        town.oracles.append(wrapped)
        block = encoded(saved(wrapped, directory / f"peft-{seed}"), town.bases[0])
        town.refs.append(stored(block, directory / "blobs")._replace(owner=f"owner-{seed}"))
    return town


class Pair(Client):
    """Two engines, and everything they answered."""

    def __init__(self, town: Town, **config: Any) -> None:
        self._heard, self._news = [], threading.Condition()
        self.uses: list[Use] = []
        sizes = {"kv_bytes": kv_bytes(town.bases[0], 64), "device_bytes": 1024**2, "ram_bytes": 0, "max_batch": BATCH}
        config = {**sizes, **config}
        self.fleet = Fleet(town.bases, Config(data_dir=town.directory, **config), self._hear, on_use=self.uses.append)
        self.engine = self.fleet  # type: ignore[assignment]
        self.engines = self.fleet.engines

    def holders(self, ref: AdapterRef) -> list[int]:
        found = [engine.tiers_of([ref.digest]).result(SECONDS) for engine in self.engines]
        return [index for index, tiers in enumerate(found) if tiers == [Tier.DEVICE]]

    def loads(self) -> list[int]:
        return [engine.occupancy.requests for engine in self.engines]


@pytest.fixture
def pair(town: Town) -> Iterator[Pair]:
    with started(Pair(town)) as pair:
        yield pair


@contextmanager
def started(pair: Pair) -> Iterator[Pair]:
    pair.fleet.start()
    try:
        yield pair
        pair.check_integrity()
    finally:
        pair.fleet.stop()


@contextmanager
def held_up(*engines: Engine) -> Iterator[None]:
    """Busy with something else, so that what they are given stays."""
    go_on = threading.Event()
    for engine in engines:
        engine._inbox.ask(lambda: go_on.wait(SECONDS))
    try:
        yield
    finally:
        go_on.set()


def fail() -> None:
    raise DeviceLost("the device fell off the bus")


def lose(engine: Engine) -> None:
    """As a GPU does that has failed."""

    engine._inbox.put(fail)
    engine._thread.join(SECONDS)
    assert not engine.alive


def test_answers_are_those_of_one_engine_wherever_they_are_made(town: Town, pair: Pair) -> None:
    prompts = [prompt_of(5 + i, i) for i in range(12)]
    with held_up(*pair.engines):
        for i, prompt in enumerate(prompts):
            pair.submit(str(i), prompt, None if i % 5 == 4 else town.refs[i % 5], owner=f"owner-{i % 5}")
    for i, prompt in enumerate(prompts):
        oracle = town.model if i % 5 == 4 else town.oracles[i % 5]
        assert pair.tokens(str(i)) == greedy(oracle, prompt, 8), i
    steps = [device["engine"]["steps"] for device in pair.fleet.stats().result(SECONDS)["devices"]]
    assert all(steps), steps
    assert len(pair.uses) == sum(1 for i in range(12) if i % 5 != 4)


def test_adapters_are_spread_and_requests_go_where_theirs_is(town: Town, pair: Pair) -> None:
    for ref in town.refs:
        pair.ask(prompt_of(4), ref, owner=ref.owner)
    where = [pair.holders(ref) for ref in town.refs]
    assert sorted(where) == [[0], [0], [1], [1]]  # the emptiest, as nobody is busy
    for ref in reversed(town.refs):
        pair.ask(prompt_of(4), ref, owner=ref.owner)
    assert [pair.holders(ref) for ref in town.refs] == where


def test_requests_for_what_is_on_its_way_go_there_too(town: Town, pair: Pair) -> None:
    with held_up(*pair.engines):  # nothing is even asked of the disk yet
        pair.submit("one", prompt_of(4), town.refs[0])
        pair.submit("two", prompt_of(4), town.refs[0], owner="another")
        assert sorted(pair.loads()) == [0, 2]
    pair.tokens("one"), pair.tokens("two")
    assert len(pair.holders(town.refs[0])) == 1


def test_a_hot_adapter_is_on_both_and_its_requests_are_spread(town: Town, pair: Pair) -> None:
    pair.ask(prompt_of(4), town.refs[0])
    assert pair.holders(town.refs[0]) == [0]
    names = [str(i) for i in range(12)]
    with held_up(*pair.engines):
        for name in names:
            pair.submit(name, prompt_of(4), town.refs[0])
        assert max(pair.loads()) - min(pair.loads()) <= MARGIN + 1
        assert sum(pair.loads()) == 12
    expected = greedy(town.oracles[0], prompt_of(4), 8)
    assert all(pair.tokens(name) == expected for name in names)
    assert pair.holders(town.refs[0]) == [0, 1]


def test_requests_for_the_base_go_to_who_has_least_to_do(town: Town, pair: Pair) -> None:
    pair.ask(prompt_of(4), town.refs[0])
    with held_up(*pair.engines):
        for i in range(2):
            pair.submit(f"adapted {i}", prompt_of(4), town.refs[0])
        assert pair.loads() == [2, 0]
        for i in range(8):
            pair.submit(f"plain {i}", prompt_of(4), owner=f"somebody {i}")
        assert pair.loads() == [5, 5]
    for i in range(8):
        assert pair.tokens(f"plain {i}") == greedy(town.model, prompt_of(4), 8)


def test_a_conversation_goes_on_where_its_beginning_was_computed(town: Town, pair: Pair) -> None:
    prompt = prompt_of(40)
    for turn in range(3):
        pair.ask(prompt + prompt_of(turn, turn), owner="ada")
        pair.ask(prompt_of(40, 9), owner="bob")
    assert pair.fleet.stats().result(SECONDS)["engine"]["shared_tokens"] == 4 * 32


def test_a_hint_goes_where_the_request_will(town: Town, pair: Pair) -> None:
    pair.ask(prompt_of(4), town.refs[0])
    pair.fleet.prefetch(town.refs[1])
    eventually(lambda: pair.holders(town.refs[1]) == [1])
    pair.ask(prompt_of(4), town.refs[1])
    assert pair.heard()[-1].finish is not None
    assert [use.tier for use in pair.uses] == [Tier.DISK, Tier.DEVICE]


def test_a_request_that_is_cancelled_ends_wherever_it_is(town: Town, pair: Pair) -> None:
    names = [pair.submit(f"{i}", prompt_of(4), owner=f"{i}", max_tokens=240) for i in range(4)]
    for name in names:
        pair.wait_for(name, 2)
        pair.fleet.cancel(name)
    eventually(lambda: pair.loads() == [0, 0])


def test_what_does_not_fit_is_refused_alike_everywhere(pair: Pair) -> None:
    with pytest.raises(ContextLengthExceeded, match=f"{pair.fleet.context} tokens"):
        pair.submit("long", prompt_of(4), max_tokens=10**6)


# -- what operators do


def on_both(town: Town, pair: Pair) -> AdapterRef:
    for engine in pair.engines:
        engine.prefetch(town.refs[0])
    eventually(lambda: pair.holders(town.refs[0]) == [0, 1])
    return town.refs[0]


def test_an_adapter_is_evicted_everywhere(town: Town, pair: Pair) -> None:
    ref = on_both(town, pair)
    assert pair.fleet.evict(ref.digest).result(SECONDS)
    assert pair.fleet.tiers_of([ref.digest]).result(SECONDS) == [Tier.DISK]
    assert pair.holders(ref) == []


def test_one_that_is_in_use_somewhere_leaves_later(town: Town, pair: Pair) -> None:
    ref = on_both(town, pair)
    begun, go_on = threading.Event(), threading.Event()

    def hear(outputs: list[Output]) -> None:
        begun.set()
        go_on.wait(SECONDS)

    for engine in pair.engines:
        engine._serving._on_output = hear
    pair.submit("long", prompt_of(4), ref, max_tokens=240)
    assert begun.wait(SECONDS)
    evicted = pair.fleet.evict(ref.digest)
    go_on.set()
    assert not evicted.result(SECONDS)
    pair.fleet.cancel("long")
    eventually(lambda: pair.holders(ref) == [])


def test_a_pin_holds_on_all_devices(town: Town, pair: Pair) -> None:
    ref = on_both(town, pair)
    pair.fleet.pin(ref.digest, True).result(SECONDS)
    assert pair.fleet.stats().result(SECONDS)["tiers"]["device"]["pinned"] == 2
    rules = Rules(device=TierRules(Policy.LRU, ttl_seconds=0.001))
    pair.fleet.set_rules(rules).result(SECONDS)
    assert pair.holders(ref) == [0, 1]
    pair.fleet.pin(ref.digest, False).result(SECONDS)
    eventually(lambda: pair.holders(ref) == [])


def test_a_trial_of_rules_names_each_block_once(town: Town, pair: Pair) -> None:
    ref = on_both(town, pair)
    rules = Rules(device=TierRules(Policy.LRU, ttl_seconds=1e-9))
    assert pair.fleet.plan(rules).result(SECONDS) == ([(ref.digest, ref.nbytes)], [])


def test_what_is_kept_of_an_owner_is_erased_everywhere(town: Town, pair: Pair) -> None:
    names = [str(i) for i in range(2 * MARGIN + 2)]  # more than one engine is given
    with held_up(*pair.engines):
        for name in names:
            pair.submit(name, prompt_of(40), owner="ada", max_tokens=2)
        assert all(pair.loads())
    for name in names:
        pair.tokens(name)
    assert pair.fleet.erase("ada").result(SECONDS) == 2 * 2  # full blocks of the prompt, on each
    assert not any(owner == "ada" for owner, _ in pair.fleet._last)
    assert pair.fleet.erase("ada").result(SECONDS) == 0


def test_budgets_are_each_devices_and_what_one_cannot_change_none_changes(town: Town, pair: Pair) -> None:
    pair.fleet.set_budgets(device=512 * 1024).result(SECONDS)
    stats = pair.fleet.stats().result(SECONDS)
    assert stats["tiers"]["device"]["budget_bytes"] == 1024**2
    assert [d["tiers"]["device"]["budget_bytes"] for d in stats["devices"]] == [512 * 1024] * 2
    pair.ask(prompt_of(4), town.refs[0])
    [holder] = pair.holders(town.refs[0])
    pair.engines[holder].pin(town.refs[0].digest, True).result(SECONDS)
    with pytest.raises(BadRequest, match="pinned or in use"):
        pair.fleet.set_budgets(device=0).result(SECONDS)
    stats = pair.fleet.stats().result(SECONDS)
    assert [d["tiers"]["device"]["budget_bytes"] for d in stats["devices"]] == [512 * 1024] * 2
    assert pair.fleet.budgets.device == 512 * 1024


def test_numbers_are_the_sums_of_the_devices(town: Town, pair: Pair) -> None:
    for ref in town.refs:
        for _ in range(3):
            pair.ask(prompt_of(20), ref, owner=ref.owner)
    stats = pair.fleet.stats().result(SECONDS)
    devices = stats["devices"]
    assert [d["device"] for d in devices] == ["cpu:0", "cpu:1"]
    for name in ("tokens", "steps", "kv_blocks", "kv_blocks_free", "shared_tokens", "running", "waiting"):
        assert stats["engine"][name] == sum(d["engine"][name] for d in devices), name
    device = stats["tiers"]["device"]
    for name in ("budget_bytes", "used_bytes", "adapters", "hits", "loads", "evictions", "loaded_bytes"):
        assert device[name] == sum(d["tiers"]["device"][name] for d in devices), name
    assert (device["hits"], device["loads"], device["hit_ratio"]) == (8, 4, 8 / 12)
    assert stats["tiers"]["disk"]["loads"] == 4  # one disk
    slowest = max(d["tiers"]["device"]["load_ms"]["disk"]["p99"] for d in devices)
    assert (device["load_ms"]["disk"]["p99"], device["load_ms"]["ram"]) == (slowest, None)


def test_one_engine_is_told_of_as_ever(town: Town) -> None:
    with started(Pair(town._replace(bases=town.bases[:1]))) as alone:
        alone.ask(prompt_of(4), town.refs[0])
        stats = alone.fleet.stats().result(SECONDS)
        [own] = stats.pop("devices")
        assert own["device"] == "cpu"
        assert own["engine"].keys() == stats["engine"].keys()
        assert stats == alone.engines[0].stats().result(SECONDS)
        assert alone.fleet._last == {}


# -- a device is lost


def test_the_requests_of_a_lost_device_fail_and_the_others_go_on(
    town: Town, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.ask(prompt_of(4), town.refs[0])
    [holder] = pair.holders(town.refs[0])
    other = pair.engines[1 - holder]
    with held_up(*pair.engines):
        pair.submit("lost", prompt_of(4), town.refs[0], max_tokens=200)
        pair.submit("kept", prompt_of(4), max_tokens=60, owner="kept")
        assert pair.loads() == [1, 1]
        pair.engines[holder]._inbox.put(fail)
    pair.engines[holder]._thread.join(SECONDS)
    error = pair.error("lost")
    assert isinstance(error, Unavailable)
    assert "has failed" in error.message
    assert pair.tokens("kept") == greedy(town.model, prompt_of(4), 60)
    assert pair.fleet.alive
    assert pair.fleet.degraded
    assert pair.ask(prompt_of(4), town.refs[0]) == greedy(town.oracles[0], prompt_of(4), 8)
    assert other.tiers_of([town.refs[0].digest]).result(SECONDS) == [Tier.DEVICE]
    devices = pair.fleet.stats().result(SECONDS)["devices"]
    assert sorted(device["alive"] for device in devices) == [False, True]
    assert pair.fleet.evict(town.refs[0].digest).result(SECONDS)
    assert "has ended" in caplog.text


def test_it_starts_once_every_engine_is_warm_and_not_where_one_cannot_compute(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Runner, "warm_up", lambda _, *most: warm.append((threading.current_thread().name, *most)))
    with started(Pair(town, max_step_tokens=32)):
        assert warm == [("adapterhub-engine", BATCH, 32)] * 2

    def fails(*_: int) -> None:
        raise RuntimeError("ptxas is not to be found")

    pair = Pair(town)
    monkeypatch.setattr(pair.engines[1]._serving.runner, "warm_up", fails)
    with pytest.raises(RuntimeError, match="ptxas"):
        pair.fleet.start()
    pair.fleet.stop()


def test_without_memory_to_get_ready_it_serves_all_the_same(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: int) -> None:
        raise torch.OutOfMemoryError(NO_MEMORY)

    pair = Pair(town)
    serving = pair.engines[0]._serving
    monkeypatch.setattr(serving.runner, "warm_up", fails)
    with started(pair):
        assert serving.scarcity.failures == 1
        assert not serving.scarcity.short
        assert not serving.scarcity.may_capture, "that was too much already"
        assert pair.ask(prompt_of(4)) == greedy(town.model, prompt_of(4), 8)


def test_a_step_that_fails_as_the_device_is_lost_ends_that_engine_alone(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: torch.device) -> None:
        raise DeviceLost(f"{device}: an illegal memory access was encountered")

    monkeypatch.setattr("adapterhub.base.serving.check_device", lost)
    with started(Pair(town)) as pair:
        pair.submit("bad", [5, 10**6])  # no such token: the embedding raises
        assert isinstance(pair.error("bad"), ServerFault)
        eventually(lambda: pair.fleet.degraded)
        assert pair.ask(prompt_of(4)) == greedy(town.model, prompt_of(4), 8)


def test_a_gpu_is_lost_when_nothing_runs_on_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    error: Exception = RuntimeError("CUDA error: an illegal memory access was encountered")
    check_device(torch.device("cpu"))
    with pytest.raises(DeviceLost, match=r"cuda:1: .*illegal memory access"):
        check_device(torch.device("cuda:1"))
    error = torch.OutOfMemoryError("CUDA out of memory")
    check_device(torch.device("cuda:1"))


def test_when_all_devices_are_lost_requests_are_told_what_helps(town: Town) -> None:
    pair = Pair(town)
    pair.fleet.start()
    with ExitStack() as stack:
        stack.callback(pair.fleet.stop)
        for engine in pair.engines:
            lose(engine)
        assert not pair.fleet.alive
        assert not pair.fleet.degraded
        with pytest.raises(Unavailable, match="needs a restart"):
            pair.submit("late", prompt_of(4))
        with pytest.raises(Unavailable, match="needs a restart"):
            pair.fleet.stats()
        pair.fleet.prefetch(town.refs[0])


# -- what is given, and what the machine says


def test_devices_are_read_as_they_are_written() -> None:
    assert parse_devices("0,1") == ("cuda:0", "cuda:1")
    assert parse_devices(" cuda:3 , 1") == ("cuda:3", "cuda:1")
    assert parse_devices("cpu,cpu") == ("cpu", "cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is not a device"),
        ("0,", "'' is not a device"),
        ("auto,0", "--device auto"),
        ("gpu0", "as in 0,1"),
        ("-1", "'-1' is not a device"),
        ("cpu,0", "mixes"),
        ("0,cuda:0", "twice"),
    ],
)
def test_devices_that_make_no_sense_are_refused_with_a_way_out(text: str, said: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_devices(text)
    assert said in refused.value.message


def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cuda:7"):
        load_bases(Config(data_dir=tmp_path, base="nowhere", devices=("cuda:7", "cuda:8")))


def test_a_gpu_without_a_number_is_the_first_and_known_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = {name: device_of(name) for name in ("cuda", "auto", "cuda:1", "cpu")}
    assert {name: str(device) for name, device in devices.items()} == {
        "cuda": "cuda:0", "auto": "cuda:0", "cuda:1": "cuda:1", "cpu": "cpu",
    }  # fmt: skip
    with pytest.raises(BadRequest, match="cuda:0 to cuda:1"):
        device_of("cuda:2")


def test_one_device_or_several_are_given_not_both(tmp_path: Path) -> None:
    done = run_cli("serve", "--device", "cpu", "--devices", "cpu,cpu", "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "not both" in done.stderr


def test_devices_have_names_that_tell_them_apart() -> None:
    assert names_of(["cpu"]) == ["cpu"]
    assert names_of(["cuda:0", "cuda:1"]) == ["cuda:0", "cuda:1"]
    assert names_of(["cpu", "cpu"]) == ["cpu:0", "cpu:1"]


class Nvml:
    """What NVML answers on a GPU that is held down by its power cap and does not tell its utilisation."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __getattr__(self, name: str) -> Any:
        class Memory(NamedTuple):
            total: int
            used: int

        answers: dict[str, Any] = {
            "MemoryInfo": Memory(80, 30),
            "Name": "NVIDIA H100",
            "CurrentClocksThrottleReasons": 0x1 | 0x4,
            "CurrPcieLinkGeneration": 1,
            "MaxPcieLinkGeneration": 5,
            "CurrPcieLinkWidth": 16,
            "MaxPcieLinkWidth": 16,
        }
        clocks = {"ClockInfo": {1: 1200, 2: 1593}, "MaxClockInfo": {1: 1980, 2: 2619}}

        def ask(handle: str, *arguments: Any) -> Any:
            asked = name.removeprefix("nvmlDeviceGet")
            assert handle == "handle"
            if asked in clocks:
                return clocks[asked][arguments[0]]
            if asked not in answers:
                raise self.NVMLError
            return answers[asked]

        return ask


def test_what_nvml_tells_is_told_and_what_it_does_not_is_left_open() -> None:
    seen = of_nvml(Nvml(), "handle")
    assert (seen.name, seen.memory_total_bytes, seen.memory_used_bytes) == ("NVIDIA H100", 80, 30)
    assert (seen.pcie_generation, seen.pcie_generation_max, seen.pcie_width, seen.pcie_width_max) == (1, 5, 16, 16)
    assert (seen.sm_clock_mhz, seen.sm_clock_max_mhz, seen.memory_clock_mhz) == (1200, 1980, 1593)
    assert seen.throttling == ("power_cap",)
    assert seen.utilization_ratio is None


def test_nvml_has_what_is_asked_of_it() -> None:
    nvml = pytest.importorskip("pynvml")
    asked = re.findall(r"nvml\.(\w+)", inspect.getsource(of_nvml))
    assert len(asked) > 10
    assert [name for name in asked if not hasattr(nvml, name)] == []
    bits = [getattr(nvml, name) for name in dir(nvml) if name.startswith("nvmlClocksThrottleReason")]
    assert set(THROTTLING) <= set(bits)


# -- over HTTP


@pytest.fixture(scope="module")
def both(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = small_config(base_directory, tmp_path_factory.mktemp("both"), devices=("cpu", "cpu"), max_batch=BATCH)
    with running(config) as server:
        yield server


def test_a_server_answers_on_both_devices_and_says_so(both: Server, adapter: PeftFiles) -> None:
    user = both.user()
    mine = user.import_adapter(adapter, "mine")
    assert user.tier(mine["model"]) == "disk"
    assert user.tier(mine["model"]) == "device"
    alone = user.ask(mine["model"])
    threads = [threading.Thread(target=lambda: said.append(user.ask(mine["model"], max_tokens=40))) for _ in range(12)]
    said: list[str] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 12
    assert len(set(said)) == 1
    assert said[0].startswith(alone)
    devices = both.admin.http.get("/admin/tiers").json()["devices"]
    assert [device["device"] for device in devices] == ["cpu:0", "cpu:1"]
    assert [device["tiers"]["device"]["adapters"] for device in devices] == [1, 1]
    assert all(device["hardware"]["memory_total_bytes"] > 0 for device in devices)
    table = run_cli("tiers", user=both.admin)
    assert table.returncode == 0, table.stderr
    assert "cpu:0" in table.stdout
    assert "cpu:1" in table.stdout
    shown = both.admin.http.get(f"/admin/adapters/{mine['id']}").json()
    assert shown["tier"] == "device"
    assert both.admin.http.post(f"/admin/adapters/{mine['id']}/evict").json()["evicted"]
    assert user.tier(mine["model"]) == "disk"


def test_metrics_tell_of_each_device_by_a_few_names(both: Server) -> None:
    told = read(both)
    names = ("up", "requests_running", "kv_usage_ratio", "pool_used_bytes", "adapters", "train_runs", "step_tokens")
    for name in names:
        labels = {key for key in told if key.startswith(f"adapterhub:device_{name}{{")}
        assert labels == {f"adapterhub:device_{name}{{device=cpu:{i}}}" for i in (0, 1)}, name
    assert told["adapterhub:device_up{device=cpu:1}"] == 1
    assert told["adapterhub:out_of_memory_total{device=cpu:1,of=step}"] == 0


def test_a_job_trains_on_one_device_and_its_model_serves_on_all(both: Server) -> None:
    user = both.user()
    job = user.job(user.train(chat_lines(), max_steps=2, suffix="taught"), "succeeded")
    assert user.ask(job.fine_tuned_model)
    stats = both.admin.http.get("/admin/tiers").json()
    trained = [device["engine"]["training"]["tokens"] for device in stats["devices"]]
    assert trained[0] > 0
    assert trained[1] == 0
    assert stats["engine"]["training"]["tokens"] == sum(trained)


def test_jobs_are_spread_over_the_devices(both: Server) -> None:
    user = both.user()
    jobs = [user.train(chat_lines(60), n_epochs=50, batch_size=1, suffix=f"job-{i}") for i in range(2)]
    eventually(lambda: [trainer.running for trainer in both.hub.trainers] == [1, 1])
    assert both.admin.http.get("/admin/tiers").json()["engine"]["training"]["runs"] == 2
    for job in jobs:
        user.openai.fine_tuning.jobs.cancel(job)
    eventually(lambda: [trainer.running for trainer in both.hub.trainers] == [0, 0])


def test_a_server_that_has_lost_a_device_is_degraded_and_serves(base_directory: Path, tmp_path: Path) -> None:
    config = small_config(base_directory, tmp_path, devices=("cpu", "cpu"))
    with running(config) as server:
        user = server.user()
        assert user.http.get("/readyz").json() == {"status": "ready"}
        lose(server.hub.engine.engines[1])
        answer = user.http.get("/readyz")
        assert (answer.status_code, answer.json()) == (200, {"status": "degraded"})
        assert user.http.get("/healthz").status_code == 200
        assert all(user.ask(BASE) for _ in range(4))
        told = read(server)
        assert told["adapterhub:device_up{device=cpu:1}"] == 0
        assert told["adapterhub:engine_up"] == 1
        table = run_cli("tiers", user=server.admin)
        assert "lost" in table.stdout
