"""A replay against a naive model of two LRU tiers and against a server's own counters; where each policy is the better
one; and `policy simulate` as an operator calls it."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result as Called
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from typer.testing import CliRunner

from adapterhub.cli import app
from adapterhub.errors import BadRequest
from adapterhub.swap.allocator import ALIGNMENT, aligned
from adapterhub.swap.database import Database
from adapterhub.swap.frames import Adapter, Trace
from adapterhub.swap.generate import RANK_BYTES, Shape, generate, zipf
from adapterhub.swap.policies import Policy, Rules, TierRules
from adapterhub.swap.settings import Settings
from adapterhub.swap.simulate import Budgets, Outcome, Setting, best, blocks, share_budgets, simulate, sweep
from adapterhub.swap.trace import Recorder
from tests.serving import SECONDS, PeftFiles, running, small_config
from tests.uses import use

SIZE = 4 * ALIGNMENT
POLICIES = Path(__file__).parents[1] / "docs" / "policies.md"


def trace_of(picks: list[int], sizes: list[int] | None = None) -> Trace:
    """Uses of these adapters, one a second; all of SIZE bytes, or of `sizes`."""
    sizes = sizes or [SIZE] * (max(picks) + 1)
    adapters = [Adapter(f"version-{i}", f"digest-{i}", f"owner-{i}", size) for i, size in enumerate(sizes)]
    count = len(picks)
    nothing = np.zeros(count, np.uint8), np.zeros(count, np.float32)
    return Trace(adapters, np.arange(count, dtype=np.float64), np.array(picks, np.int64), *nothing)


def outcomes(trace: Trace, device: int, ram: int) -> dict[Policy, Outcome]:
    budgets = Budgets(device, ram)
    return {s.policy: outcome for s, outcome in sweep(trace, [Setting(budgets, policy) for policy in Policy])}


# -- against models


class NaiveLru:
    """Two tiers of blocks of one size. What leaves the device counts as used in RAM at that moment."""

    def __init__(self, device: int, ram: int) -> None:
        self.device: OrderedDict[int, None] = OrderedDict()
        self.ram: OrderedDict[int, None] = OrderedDict()
        self.places = (device, ram)
        self.hits = [0, 0]
        self.evictions = [0, 0]

    def use(self, key: int) -> None:
        if key in self.device:
            self.hits[0] += 1
            self.device.move_to_end(key)
            return
        if len(self.device) == self.places[0]:
            gone, _ = self.device.popitem(last=False)
            self.evictions[0] += 1
            if gone in self.ram:
                self.ram.move_to_end(gone)
        self.device[key] = None
        if key in self.ram:
            self.hits[1] += 1
            self.ram.move_to_end(key)
        elif self.places[1]:
            if len(self.ram) == self.places[1]:
                self.ram.popitem(last=False)
                self.evictions[1] += 1
            self.ram[key] = None


@given(picks=st.lists(st.integers(0, 9), min_size=1, max_size=120), device=st.integers(1, 6), ram=st.integers(0, 6))
def test_a_replay_under_lru_counts_what_a_naive_model_counts(picks: list[int], device: int, ram: int) -> None:
    model = NaiveLru(device, ram)
    for key in picks:
        model.use(key)
    outcome = simulate(trace_of(picks), Budgets(device * SIZE, ram * SIZE), Rules())
    cold = len(picks) - sum(model.hits)
    assert outcome == Outcome(len(picks), *model.hits, cold * SIZE, *model.evictions)
    assert (outcome.loads, outcome.cold_boots) == (len(picks) - model.hits[0], cold)
    assert outcome.cold_boots_per_1000 == pytest.approx(1000 * cold / len(picks))


@pytest.mark.parametrize("policy", Policy)
def test_with_room_for_all_only_first_uses_are_cold_boots(policy: Policy) -> None:
    trace = generate(Shape.POWER, 50, 1000, 0.3, (8, 32))
    sizes = blocks(trace)
    outcome = simulate(trace, Budgets(sum(sizes.values()), 0), Setting(Budgets(0, 0), policy).rules)
    first = len(sizes)
    assert outcome == Outcome(1000, 1000 - first, 0, sum(sizes.values()), 0, 0)


def test_what_is_unused_for_longer_than_its_rule_allows_is_read_again() -> None:
    rules = Rules(device=TierRules(ttl_seconds=3), ram=TierRules(ttl_seconds=8))
    outcome = simulate(trace_of([0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0]), Budgets(4 * SIZE, 4 * SIZE), rules)
    # 0 leaves the device 3 s after its use at 2, is in RAM at 5, and in neither at 13
    assert (outcome.ram_hits, outcome.cold_boots) == (1, 3)


def test_one_block_of_two_owners_is_loaded_once() -> None:
    trace = trace_of([0, 1, 0, 1])
    shared = [adapter._replace(digest="the same") for adapter in trace.adapters]
    trace = Trace(shared, trace.time, trace.adapter, trace.tier, trace.load_ms)
    assert blocks(trace) == {"the same": SIZE}
    assert simulate(trace, Budgets(4 * SIZE, 0), Rules()).loads == 1


# -- which policy when


def test_where_ranks_are_mixed_gdsf_has_the_fewest_cold_boots() -> None:
    """Popularity by Zipf's law, ranks from 8 to 64 and an eighth of the bytes on the device: small adapters, of which
    more fit, and often used ones are worth keeping, and lru, which looks at neither, is clearly last."""
    trace = generate(Shape.ZIPF, 300, 5000, 1.0, (8, 16, 32, 64))
    [device] = share_budgets(trace, [1 / 8])
    cold = {policy: outcome.cold_boots for policy, outcome in outcomes(trace, device, 0).items()}
    assert min(cold, key=cold.__getitem__) is Policy.GDSF
    assert max(cold, key=cold.__getitem__) is Policy.LRU
    assert cold[Policy.GDSF] < 0.9 * cold[Policy.LRU]


def test_where_scans_pass_through_sieve_has_the_fewest_cold_boots() -> None:
    """Forty adapters that are asked for again and again and, in between, batches that go through a hundred others once
    each: sieve lets those go first, as nobody comes back to them; under lru they push out all that was there."""
    popular = np.split(zipf(40, 4000, 0.8), 20)
    trace = trace_of([pick for some in popular for pick in (*some.tolist(), *range(40, 140))])
    found = outcomes(trace, 30 * SIZE, 30 * SIZE)
    cold = {policy: outcome.cold_boots for policy, outcome in found.items()}
    assert min(cold, key=cold.__getitem__) is Policy.SIEVE
    assert max(cold, key=cold.__getitem__) is Policy.LRU
    assert cold[Policy.SIEVE] < 0.8 * cold[Policy.LRU]


def test_of_equal_budgets_the_best_has_the_fewest_cold_boots_then_the_most_hits() -> None:
    trace = generate(Shape.ZIPF, 60, 1500, 1.0, (8, 64))
    pairs = [Budgets(device, ram) for device in share_budgets(trace, [1 / 8, 1 / 4]) for ram in (0, 200 * RANK_BYTES)]
    results = list(sweep(trace, [Setting(pair, policy) for pair in pairs for policy in Policy]))
    chosen = best(results)
    assert set(chosen) == set(pairs)
    for setting, outcome in results:
        winner = next(o for s, o in results if s == chosen[setting.budgets])
        assert (winner.cold_boots, -winner.device_hits) <= (outcome.cold_boots, -outcome.device_hits)


# -- against a server


@pytest.fixture(scope="module")
def mixed(base_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> list[PeftFiles]:
    """Nine adapters of three sizes."""
    directory = tmp_path_factory.mktemp("mixed")
    return [PeftFiles(base_model, directory / str(i), seed=i, r=2 + 2 * (i % 3)) for i in range(9)]


@pytest.mark.parametrize("policy", Policy)
def test_a_replay_of_a_server_s_trace_with_its_budgets_counts_what_the_server_counted(
    policy: Policy, base_directory: Path, mixed: list[PeftFiles], tmp_path: Path
) -> None:
    """One request after the other, over three times as many adapters as the device holds."""
    with running(small_config(base_directory, tmp_path)) as server:
        user = server.user()
        made = [user.import_adapter(files, f"a{i}") for i, files in enumerate(mixed)]
        budgets = Budgets(sum(aligned(one["bytes"]) for one in made[:3]), 4 * made[1]["bytes"])
        server.hub.engine.set_budgets(*budgets).result(SECONDS)
        server.hub.engine.set_rules(Setting(budgets, policy).rules).result(SECONDS)
        weights = [1 / (i + 1) for i in range(len(made))]
        picks = random.Random(3).choices(made, weights, k=80)
        found = [user.tier(one["model"]) for one in picks]
        server.hub.trace.flush()
        tiers = server.admin.http.get("/admin/tiers").raise_for_status().json()["tiers"]
        told = call("--data-dir", tmp_path, "--policy", policy, "--json", *budget_options(budgets))
    [result] = json.loads(told.stdout)["results"]
    assert result["hits"] == {name: tiers[name]["hits"] for name in ("device", "ram")}
    assert result["hits"] == {name: found.count(name) for name in ("device", "ram")}
    assert result["evictions"] == {name: tiers[name]["evictions"] for name in ("device", "ram")}
    assert result["read_bytes"] == tiers["device"]["loaded_bytes"]
    assert 20 < result["hits"]["device"] < 70
    assert result["hits"]["ram"] > 0


# -- `policy simulate`


def budget_options(budgets: Budgets) -> tuple[str, ...]:
    return ("--device-bytes", str(budgets.device), "--ram-bytes", str(budgets.ram))


def call(*arguments: Any) -> Called:
    return CliRunner().invoke(app, ["policy", "simulate", *map(str, arguments)], env={"COLUMNS": "200"})


SMALL = ("--generate", "zipf", "--adapters", "30", "--requests", "400")


def test_every_policy_is_replayed_under_every_pair_of_budgets() -> None:
    options = ("--device-bytes", "100MiB", "--device-bytes", "200MiB", "--ram-bytes", "0", "--ram-bytes", "50MiB")
    told = json.loads(call(*SMALL, *options, "--json").stdout)
    assert told["trace"]["uses"] == 400
    seen = [(r["policy"], r["device_bytes"] >> 20, r["ram_bytes"] >> 20) for r in told["results"]]
    assert sorted(seen) == sorted((p, d, r) for p in Policy for d in (100, 200) for r in (0, 50))
    for result in told["results"]:
        assert result["loads"] == 400 - result["hits"]["device"] == result["hits"]["ram"] + result["cold_boots"]
        assert result["hit_ratio"] == result["hits"]["device"] / 400
    assert sum(result["best"] for result in told["results"]) == 4


@pytest.mark.parametrize(("title", "ranks"), [("Ranks mixed", "8,16,32,64"), ("The same, all of rank 16", "16")])
def test_the_tables_in_the_docs_are_what_the_command_that_they_name_prints(title: str, ranks: str) -> None:
    """Of the rows, those of an eighth and a quarter, which take the least time."""
    text = POLICIES.read_text()
    named = re.search(r"`adapterhub policy simulate --generate zipf --adapters (\d+) --requests (\d+)`", text)
    assert named is not None
    table = re.findall(r"^\| (.+) \|$", text[text.index(f"**{title}") :].partition("\n\n**")[0], re.MULTILINE)
    (_, *policies), _, *rows = [line.split(" | ") for line in table]
    trace = generate(Shape.ZIPF, int(named[1]), int(named[2]), 1.0, [int(rank) for rank in ranks.split(",")])
    expected = []
    for share, part in (("1/8", 1 / 8), ("1/4", 1 / 4)):
        [device], [ram] = share_budgets(trace, [part]), share_budgets(trace, [1 / 4])
        cold = {policy: outcome.cold_boots_per_1000 for policy, outcome in outcomes(trace, device, ram).items()}
        found = [f"{cold[Policy(policy)]:.1f}" for policy in policies]
        best = min(found, key=float)
        expected.append([share, *(f"**{value}**" if value == best else value for value in found)])
    assert rows[2:] == expected


def test_the_table_marks_the_best_policy_of_each_budget() -> None:
    told = call(*SMALL, "--ranks", "8,64", "--policy", "gdsf", "--policy", "lru")
    rows = [line for line in told.stdout.splitlines() if " gdsf" in line or " lru" in line]
    assert len(rows) == 8
    assert sum(" * " in row for row in rows) == 4
    assert "400 uses of" in told.stdout


def test_a_recorded_trace_is_replayed_with_budgets_that_suit_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "trace")
    for index in range(70):
        recorder.record(use(index))
    recorder.close()
    told = json.loads(call("--data-dir", tmp_path, "--json").stdout)
    assert told["trace"] == {"uses": 70, "blocks": 7, "bytes": 256 * sum(range(1, 8)), "seconds": 69.0}
    budgets = {result["device_bytes"] for result in told["results"]}
    assert min(budgets) == 256 * 7
    assert max(budgets) == told["trace"]["bytes"] // 4


def test_a_recorded_trace_is_replayed_under_the_rules_that_the_server_has(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "trace")
    for index in range(70):
        recorder.record(use(index))
    recorder.close()
    options = ("--data-dir", tmp_path, "--device-bytes", "1MiB", "--ram-bytes", "1MiB", "--json")
    cold = lambda: {r["policy"]: r["cold_boots"] for r in json.loads(call(*options).stdout)["results"]}  # noqa: E731
    assert cold() == dict.fromkeys(Policy, 7), "there is room for all"
    database = Database(tmp_path / "hub.db")
    with Settings(database).saving_rules(Rules(*(TierRules(ttl_seconds=3),) * 3)):
        pass
    database.close()
    assert cold() == dict.fromkeys(Policy, 70), "each is unused for longer than it may be"


@pytest.mark.parametrize("budgets", [("--ram-bytes", "0"), ("--device-bytes", "1GiB", "--ram-bytes", "1GiB")])
def test_the_curves_are_drawn_as_a_png(budgets: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    told = call(*SMALL, *budgets, "--plot", path)
    assert f"Wrote {path}." in told.stdout
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = call(*SMALL, "--plot", tmp_path / "curves.png")
    assert isinstance(told.exception, BadRequest)
    assert "pip install 'adapterhub[plot]'" in str(told.exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--data-dir", "{tmp}/none"), "There is no directory {tmp}/none."),
        (("--data-dir", "{tmp}"), "{tmp}/trace holds no trace"),
        (("--data-dir", "{tmp}", "--generate", "zipf"), "not both"),
        (("--adapters", "3"), "give --generate too"),
        (("--generate", "zipf", "--skew", "nan"), "from 0 to 10, not nan"),
        (("--generate", "power", "--skew", "0"), "from 0.01 to 10, not 0"),
        (("--generate", "zipf", "--ranks", "8,x"), "'8,x' are not ranks"),
        ((*SMALL, "--device-bytes", "0"), "does not hold the largest adapter of the trace"),
        ((*SMALL, "--device-bytes", "much"), "'much' is not a size"),
        ((*SMALL, "--plot", "{tmp}/curves.pdf"), "should end in .png"),
        ((*SMALL, "--plot", "{tmp}/none/curves.png"), "There is no directory {tmp}/none to write"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_what_to_do(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    told = call(*(option.format(tmp=tmp_path) for option in options))
    assert isinstance(told.exception, BadRequest), told.output
    assert said.format(tmp=tmp_path) in str(told.exception)
