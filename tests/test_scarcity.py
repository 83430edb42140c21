"""When memory runs out: what is given up in which order, and that every answer is what it would have been."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import PreTrainedModel

from adapterhub.base import sampler
from adapterhub.base.batch import Batch
from adapterhub.base.idle import PieceAbandoned
from adapterhub.base.lost import out_of_memory
from adapterhub.base.model import Base
from adapterhub.base.scarcity import Allowance, Relief, Scarcity
from adapterhub.errors import OutOfMemory, ServerFault
from adapterhub.swap.ref import AdapterRef
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.news import News, Trained
from adapterhub.train.run import Run
from tests.scarce import NO_MEMORY, PLENTY, Holding, Memory, fail_after
from tests.serving import BASE, run_cli, running, small_config
from tests.test_cotrainer import PLANS, assert_same, items_of, run_of
from tests.test_metrics import read
from tests.test_scheduler import Floor
from tests.test_trainer import all_of, make_items, make_plan, run
from tests.tiny import (
    Client,
    data_set,
    encoded,
    greedy,
    kv_bytes,
    peft_model,
    prompt_of,
    saved,
    serving,
    serving_twin,
    stored,
    tiny_model,
)

SECONDS = 30

# -- what is given up


def reliefs(scarcity: Scarcity, room: int, tokens: int, sequences: int) -> list[Relief]:
    """Until a step fits, or nothing helps. The pool gives something twice."""
    found: list[Relief] = []
    while (needed := min(tokens, scarcity.allowance.tokens)) > room:
        relief = scarcity.failed(needed, piece=False)
        if relief is Relief.POOL and found.count(Relief.POOL) == 2:
            relief = scarcity.pool_is_spent(needed)
        found.append(relief)
        if relief is Relief.REQUEST:
            return found
    scarcity.went_well(needed)
    return found


def test_what_is_only_kept_to_be_faster_goes_first_and_a_request_last() -> None:
    scarcity = Scarcity(256, 32)
    caches, tokens, pool, request = Relief.CACHES, Relief.TOKENS, Relief.POOL, Relief.REQUEST
    found = reliefs(scarcity, 0, 256, 32)
    assert found == [caches, *[tokens] * 3, pool, pool, *[tokens] * 5, request]
    assert scarcity.allowance.tokens == 1
    assert scarcity.failures == len(found)


def test_prompts_are_cut_before_anybody_loses_an_adapter_or_a_turn() -> None:
    scarcity = Scarcity(256, 32)
    assert reliefs(scarcity, 40, 256, 32) == [Relief.CACHES, *[Relief.TOKENS] * 3]
    assert scarcity.allowance.tokens == 32
    assert not scarcity.short


def test_a_piece_of_training_goes_before_anything_of_servings() -> None:
    scarcity = Scarcity(256, 32)
    assert scarcity.failed(256, piece=True) is Relief.PIECE
    assert scarcity.short
    assert scarcity.failed(256, piece=False) is Relief.CACHES


def test_a_new_shortage_begins_with_what_is_cheap_again() -> None:
    scarcity = Scarcity(256, 32)
    reliefs(scarcity, 0, 256, 32)
    scarcity.rest()
    assert scarcity.failed(1, piece=False) is Relief.CACHES
    assert scarcity.failed(1, piece=False) is Relief.POOL


def test_graphs_are_captured_again_after_steps_that_went_well_and_later_each_time_that_fails() -> None:
    scarcity = Scarcity(256, 32)
    assert scarcity.may_capture
    waits = []
    for _ in range(9):
        scarcity.failed(8, piece=False)
        steps = 0
        while not scarcity.may_capture:
            scarcity.went_well(8)
            steps += 1
        waits.append(steps)
    assert waits == [16, 32, 64, 128, 256, 512, 1024, 1024, 1024]
    for _ in range(5000):
        scarcity.went_well(8)
    scarcity.failed(8, piece=False)
    assert sum(1 for _ in itertools.takewhile(lambda _: not scarcity.may_capture, went_well(scarcity))) == 16


def went_well(scarcity: Scarcity) -> Iterator[None]:
    while True:
        yield
        scarcity.went_well(8)


def test_what_was_too_much_is_tried_again_and_less_often_each_time_it_still_is() -> None:
    allowance, tries = Allowance(256), []
    for step in range(20_000):
        if allowance.tokens > 50:
            allowance.too_many(allowance.tokens)
            tries.append(step)
        else:
            allowance.went_well(allowance.tokens)
    between = [later - sooner for sooner, later in itertools.pairwise(tries)][3:]  # after it was found
    assert between == sorted(between)
    assert between[0] < 64
    assert max(between) > 1000
    assert sum(allowance.tokens == n for n in (32, 64)) == 1


def test_steps_with_less_than_they_may_have_say_nothing_of_more() -> None:
    allowance = Allowance(256)
    assert allowance.too_many(200)
    for _ in range(1000):
        allowance.went_well(99)
    assert allowance.tokens == 100
    for _ in range(100):
        allowance.went_well(allowance.tokens)
    assert allowance.tokens == 256
    assert not allowance.too_many(1)
    assert not allowance.too_many(32, least=32)


@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=300))
def test_an_allowance_stays_between_one_token_and_all(steps: list[tuple[int, bool]]) -> None:
    allowance = Allowance(256)
    for tokens, fits in steps:
        if fits:
            allowance.went_well(tokens)
        else:
            allowance.too_many(min(tokens, allowance.tokens))
        assert 1 <= allowance.tokens <= 256


def test_errors_that_say_in_other_words_that_there_is_no_memory_are_known() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert out_of_memory(refused.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be .."))
    assert out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_capture_that_ended_for_lack_of_memory_is_told_from_one_that_cannot_be() -> None:
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert not out_of_memory(error)
    error.__context__ = torch.OutOfMemoryError(NO_MEMORY)  # as where the end of the capture fails after that
    assert out_of_memory(error)


# -- a step that is taken back, and steps of few tokens


_requests = st.tuples(st.sampled_from("ABC"), st.integers(1, 90), st.integers(1, 30), st.integers(0, 3))
_rooms = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(requests=st.lists(_requests, min_size=1, max_size=12), rooms=_rooms, max_batch=st.integers(1, 5))
def test_a_step_that_is_taken_back_was_never_there(
    requests: list[tuple[str, int, int, int]], rooms: list[int], max_batch: int
) -> None:
    floor = Floor(blocks=9, max_batch=max_batch, max_step_tokens=40)
    scheduler = floor.scheduler
    for owner, prompt, count, seed in requests:
        floor.submit(owner, prompt, count, seed)
    for room in itertools.islice(itertools.cycle(rooms), 6000):
        accounts = dict(scheduler._served)
        work = scheduler.schedule()
        scheduler.take_back(work)
        assert scheduler._served == accounts
        assert all(s.begun == math.inf for s in scheduler.find(lambda s: s.latest == 0))
        scheduler.check_integrity()
        scheduler.step_tokens = room
        if not floor.step():
            break
    assert len(floor.ended) == len(requests)
    assert scheduler.kv.blocks.free == 9


@pytest.mark.parametrize("room", [1, 2, 5])
def test_those_for_whom_a_step_has_no_token_take_turns(room: int) -> None:
    floor = Floor(max_batch=8, max_step_tokens=64)
    sequences = [floor.submit("A" if i < 6 else "B", prompt=20, count=1000) for i in range(8)]
    for sequence in sequences:
        floor.until(sequence, 1)
    floor.scheduler.step_tokens = room
    before = [s.produced for s in sequences]
    for _ in range(80):
        floor.step()
    got = [s.produced - b for s, b in zip(sequences, before, strict=True)]
    assert sum(got) == 80 * room
    assert min(got) >= 80 // math.ceil(8 / room) - 1, "somebody waits for more steps than all others have tokens for"


def test_a_prompt_goes_on_however_many_decode_and_however_few_tokens_a_step_has() -> None:
    floor = Floor(max_batch=8, max_step_tokens=64)
    for i in range(7):
        floor.until(floor.submit(f"{i}", prompt=2, count=1000), 1)
    floor.scheduler.step_tokens = 4
    late = floor.submit("late", prompt=40, count=2)
    assert floor.until(late, 1) <= 90


# -- served with too little memory


class Town(NamedTuple):
    model: PreTrainedModel
    base: Base
    refs: list[AdapterRef]
    oracles: list[PeftModel]
    directory: Path


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Town:
    directory, model = tmp_path_factory.mktemp("scarce"), tiny_model("llama")
    town = Town(model, serving_twin(model), [], [], directory)
    for seed in range(4):
        wrapped = peft_model(model, seed=seed, r=1 + seed, size=0.2)
        town.oracles.append(wrapped)
        town.refs.append(stored(encoded(saved(wrapped, directory / f"peft-{seed}"), town.base), directory / "blobs"))
    return town


@pytest.fixture
def memory(town: Town) -> Iterator[Memory]:
    memory = Memory(town.base)
    with memory.watched():
        yield memory


class Question(NamedTuple):
    name: str
    prompt: list[int]
    ref: AdapterRef | None
    sampling: dict[str, Any]


def questions(town: Town, count: int = 24) -> list[Question]:
    """Long and short, with and without adapters, drawn from seeds, with penalties."""
    choose = random.Random(count)
    found = []
    for i in range(count):
        drawn = {"temperature": 1.0, "top_p": 0.9, "seed": i, "frequency_penalty": 0.5} if i % 2 else {}
        sampling = {"max_tokens": choose.randint(1, 24), **drawn}
        ref = choose.choice([None, *town.refs])
        found.append(Question(f"{i}", prompt_of(choose.randint(1, 70), i), ref, sampling))
    return found


@pytest.fixture(scope="module")
def alone(town: Town) -> list[list[int]]:
    """The answers with all the memory in the world."""
    with serving(town.base, town.directory) as client:
        return [client.ask(q.prompt, q.ref, **q.sampling) for q in questions(town)]


def ask_all(town: Town, client: Client) -> list[list[int]]:
    asked = questions(town)
    for i, q in enumerate(asked):
        client.submit(q.name, q.prompt, q.ref, owner=f"owner {i % 3}", **q.sampling)
    return [client.tokens(q.name) for q in asked]


def engine_stats(client: Client) -> dict[str, Any]:
    return client.engine.stats().result(SECONDS)["engine"]


@pytest.mark.parametrize("room", [1, 3, 9, 30])
def test_answers_are_the_same_however_few_tokens_fit_into_a_step(
    town: Town, memory: Memory, alone: list[list[int]], room: int
) -> None:
    memory.room = lambda _: room
    sizes = {"max_batch": 8, "max_step_tokens": 64, "kv_bytes": kv_bytes(town.base, 24)}
    with serving(town.base, town.directory, **sizes) as client:
        assert ask_all(town, client) == alone
        client.check_integrity()
        told = engine_stats(client)
    assert memory.failures > 0
    assert told["out_of_memory"] == memory.failures
    assert told["refused"] == 0
    assert told["step_tokens"] <= 2 * room
    assert told["kv_blocks_free"] == told["kv_blocks"]


def test_answers_are_the_same_when_memory_comes_and_goes(town: Town, memory: Memory, alone: list[list[int]]) -> None:
    choose = random.Random(3)
    rooms = itertools.cycle([PLENTY, 1, PLENTY, 40, 7, PLENTY])
    now = next(rooms)

    def room(_: Batch) -> int:
        nonlocal now
        if choose.random() < 0.2:
            now = next(rooms)
        return now

    memory.room = room
    with serving(town.base, town.directory, max_batch=8, max_step_tokens=64) as client:
        assert ask_all(town, client) == alone
    assert memory.failures > 10


def test_a_step_that_ran_to_its_end_and_has_no_memory_then_is_run_again(town: Town, alone: list[list[int]]) -> None:
    """Its tokens were drawn already, and all of its keys and values are in the cache."""
    choose = random.Random(5)
    with serving(town.base, town.directory, max_batch=8, max_step_tokens=64) as client:
        fail_after(client.engine._serving.runner, lambda work: len(work) > 1 and choose.random() < 0.3)
        assert ask_all(town, client) == alone
        assert engine_stats(client)["out_of_memory"] > 10


def test_a_token_is_drawn_once_however_often_there_is_no_memory_to_draw_it(
    town: Town, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, invert = random.Random(9), sampler._invert

    def stumble(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        if choose.random() < 0.3:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return invert(weights, uniform)

    monkeypatch.setattr(sampler, "_invert", stumble)
    with serving(town.base, town.directory, max_batch=8) as client:
        assert ask_all(town, client) == alone


MARK = 159  # a token


def needs_all_of_it(batch: Batch) -> int:
    """What has this token in it never fits."""
    return 0 if MARK in batch.tokens else PLENTY


def test_what_fits_in_no_way_fails_alone_and_says_when_to_try_again(
    town: Town, memory: Memory, alone: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    memory.room = needs_all_of_it
    prompt = [t if t != MARK else 5 for t in prompt_of(30)]
    with serving(town.base, town.directory, max_batch=8, max_step_tokens=64) as client:
        client.submit("beside", prompt, town.refs[1], max_tokens=60, owner="another")
        client.wait_for("beside", 2)
        for i in range(3):
            client.submit(f"bad {i}", [*prompt[:9], MARK, *prompt[:9]], town.refs[i])
        for i in range(3):
            error = client.error(f"bad {i}")
            assert isinstance(error, OutOfMemory)
            assert (error.status, error.code, error.headers) == (503, "out_of_memory", {"retry-after": "10"})
        expected = greedy(town.oracles[1], prompt, 60)
        expected = expected[: expected.index(MARK) + 1] if MARK in expected else expected
        assert client.tokens("beside")[: len(expected)] == expected
        assert engine_stats(client)["refused"] == 3
        memory.room = lambda _: PLENTY
        assert ask_all(town, client) == alone
    assert "request gives way" in caplog.text


def test_the_pool_of_adapters_becomes_smaller_when_that_is_what_helps(
    town: Town, memory: Memory, alone: list[list[int]]
) -> None:
    """Until a third of it is there no row of eight fits; what is in use stays."""
    with serving(town.base, town.directory, max_batch=8, max_step_tokens=64) as client:
        pool = client.engine.tiers.pool
        whole = pool.capacity
        memory.room = lambda _: 8 if pool.capacity < 2 * whole // 3 else 4
        assert ask_all(town, client) == alone
        assert pool.capacity < 2 * whole // 3
        told = client.engine.stats().result(SECONDS)
        assert told["tiers"]["device"]["budget_bytes"] == pool.capacity == client.engine.budgets.device
        client.engine.set_budgets(device=whole).result(SECONDS)
        assert client.engine.budgets.device == whole


def test_memory_that_was_short_for_a_while_is_used_again(town: Town, memory: Memory) -> None:
    memory.room = lambda _: 4
    with serving(town.base, town.directory, max_batch=4, max_step_tokens=64) as client:
        client.ask(prompt_of(30))
        assert engine_stats(client)["step_tokens"] <= 8
        memory.room = lambda _: PLENTY
        for i in range(40):
            client.ask(prompt_of(200, i), max_tokens=1)
        assert engine_stats(client)["step_tokens"] == 64


def test_an_error_of_another_kind_is_still_the_requests_own(town: Town) -> None:
    with serving(town.base, town.directory) as client:
        assert isinstance(client.error(client.submit("bad", [5, 10**6])), ServerFault)
        assert engine_stats(client)["out_of_memory"] == 0


# -- trained with too little memory


@pytest.fixture
def holding(town: Town, memory: Memory) -> Holding:
    trainer = Holding(town.base, lambda: None)
    trainer.memory = memory
    return trainer


def largest(name: str) -> int:
    """Tokens of the largest item of a plan."""
    return max(sum(len(e.tokens) for e in item) for item in items_of(name))


def carry_out_all(trainer: CoTrainer, tokens: int = 10**6, give_way: Callable[[], None] = lambda: None) -> int:
    """As the engine does it; returns how many pieces were abandoned."""
    abandoned = 0
    while True:
        try:
            if not trainer.step(tokens, give_way):
                return abandoned
        except PieceAbandoned:
            abandoned += 1


@pytest.mark.parametrize("spare", [0, 5, 60])
def test_pieces_that_do_not_fit_are_done_again_smaller_and_every_job_ends_as_if_they_had(
    town: Town, memory: Memory, holding: Holding, spare: int
) -> None:
    expected = {name: run(town.base, PLANS[name], items_of(name)) for name in PLANS}
    memory.room = lambda _: max(map(largest, PLANS)) + spare
    told: dict[str, list[News]] = {name: [] for name in PLANS}
    for name, news in told.items():
        holding.add(run_of(town.base, name, news))
    assert carry_out_all(holding) > 0
    for name, news in told.items():
        assert_same(news, expected[name])
        assert all_of(Trained, news)[0].trained_tokens == all_of(Trained, expected[name])[0].trained_tokens


def test_a_piece_is_as_if_it_had_never_been_wherever_in_it_serving_wants_its_memory(
    town: Town, memory: Memory, holding: Holding
) -> None:
    """In the forward and in the backward, where some of the gradient is there already."""
    choose = random.Random(1)
    expected = {name: run(town.base, PLANS[name], items_of(name)) for name in PLANS}
    told: dict[str, list[News]] = {name: [] for name in PLANS}
    for name, news in told.items():
        holding.add(run_of(town.base, name, news))
    where: Counter[bool] = Counter()

    def give_way() -> None:
        if choose.random() < 0.03:
            where[torch._C._current_graph_task_id() != -1] += 1  # in a backward
            raise PieceAbandoned("serving needs it")

    assert carry_out_all(holding, 60, give_way) == sum(where.values())
    assert where[True] > 3
    assert where[False] > 3
    for name, news in told.items():
        assert_same(news, expected[name])


def test_a_job_with_an_item_that_fits_in_no_way_fails_alone_and_says_what_to_do(
    town: Town, memory: Memory, holding: Holding
) -> None:
    expected = run(town.base, PLANS["large"], items_of("large"))
    memory.room = lambda batch: 60 if MARK not in batch.tokens else 0
    assert not any(MARK in e.tokens for item in items_of("large") for e in item)
    good: list[News] = []
    bad: list[News] = []
    broken = make_items(start=5)
    broken[3][0].tokens[1] = MARK
    holding.add(run_of(town.base, "large", good))
    holding.add(Run(town.base, make_plan(), data_set(broken), None, bad.append))
    carry_out_all(holding)
    assert isinstance(bad[-1], ServerFault)
    assert bad[-1].code == "out_of_memory"
    assert f"{len(broken[3][0].tokens)} tokens at once" in bad[-1].message
    assert "shorter examples" in bad[-1].message
    assert_same(good, expected)


def test_an_item_alone_is_tried_twice_before_its_job_fails(town: Town, memory: Memory, holding: Holding) -> None:
    rooms = itertools.cycle([0, PLENTY])
    memory.room = lambda _: next(rooms)
    news: list[News] = []
    holding.add(run_of(town.base, "small", news))
    assert carry_out_all(holding, tokens=1) > 5
    memory.room = lambda _: PLENTY
    assert_same(news, run(town.base, PLANS["small"], items_of("small")))


class Paused(Holding):
    """Stops once in a piece, in its forward or in its backward, before it gives way."""

    backward = False

    def __init__(self, base: Base, wake: Callable[[], None]) -> None:
        super().__init__(base, wake)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def step(self, tokens: int, give_way: Callable[[], None] = lambda: None) -> int:
        def pause() -> None:
            in_backward = torch._C._current_graph_task_id() != -1
            if self.memory.held and in_backward == self.backward and not self.begun.is_set():
                self.begun.set()
                assert self.go_on.wait(SECONDS)
            give_way()

        return super().step(tokens, pause)


@pytest.mark.parametrize("backward", [False, True])
def test_serving_has_the_memory_of_a_piece_of_training_and_the_piece_is_done_again(
    town: Town, memory: Memory, alone: list[list[int]], backward: bool
) -> None:
    """There is room for a whole step, or for a whole piece."""
    news: list[News] = []
    with serving(town.base, town.directory, max_batch=4, max_step_tokens=64, train_micro_tokens=60) as client:
        trainer = Paused(town.base, client.engine.wake)
        trainer.memory, trainer.backward = memory, backward
        memory.room = lambda _: 80
        client.engine.set_idle_work(trainer)
        trainer.add(Run(town.base, make_plan(), data_set(make_items()), None, news.append))
        assert trainer.begun.wait(SECONDS)
        client.submit("long", prompt_of(70))
        trainer.go_on.set()
        assert client.tokens("long") == greedy(town.model, prompt_of(70), 8)
        told = engine_stats(client)
        assert told["training"]["out_of_memory"] == told["out_of_memory"] == 1
        assert told["step_tokens"] == 64, "serving gave up nothing"
        assert ask_all(town, client) == alone
        while not all_of(Trained, news):
            assert client.ask(prompt_of(3)) == greedy(town.model, prompt_of(3), 8)
    memory.room = lambda _: PLENTY
    assert_same(news, run(town.base, make_plan(), make_items()))


# -- told


def test_a_request_for_which_there_is_no_memory_is_answered_with_503_and_operators_see_it(
    base_directory: Path, tmp_path: Path
) -> None:
    with running(small_config(base_directory, tmp_path)) as server:
        user, short = server.user(), True
        fail_after(server.hub.engine.engines[0]._serving.runner, lambda _: short)
        body = {"model": BASE, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        answer = user.http.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
        assert answer.headers["retry-after"] == "10"
        short = False
        assert user.ask(BASE)
        told = read(server)
        assert told["adapterhub:out_of_memory_total{device=cpu,of=request}"] == 1
        assert told["adapterhub:out_of_memory_total{device=cpu,of=step}"] > 1
        assert told["adapterhub:out_of_memory_total{device=cpu,of=piece}"] == 0
        for command in (("tiers",), ("top", "--once")):
            assert "requests that failed for it: 1" in run_cli(*command, user=server.admin).stdout
