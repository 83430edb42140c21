"""Log probabilities of prompts, with a real engine: transformers' and PEFT's own, however the prompt was computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from adapterhub.base.kv import KVCache
from adapterhub.base.request import Finish, Request, Sampling, Token
from adapterhub.base.runner import Runner
from adapterhub.base.scheduler import SCORED_ROWS, Scheduler, Sequence
from adapterhub.errors import ContextLengthExceeded
from adapterhub.swap.block import Block
from adapterhub.swap.pool import Pool
from adapterhub.swap.ref import AdapterRef
from tests.homes import Home
from tests.test_scheduler import Floor
from tests.tiny import (
    CPU,
    Client,
    encoded,
    full_logits,
    greedy,
    kv_bytes,
    prompt_of,
    saved,
    serving,
    serving_twin,
    stored,
    tiny_model,
)

CONTEXT = 256  # of the tiny base
LONG = 200  # tokens of a prompt of which a step cannot score all


def everyone(home: Home) -> list[tuple[Any, AdapterRef | None]]:
    """The base and both adapters: as each one's own library runs it, and what names it here."""
    return [(home.model, None), *zip(home.oracles, home.refs, strict=True)]


def shared(client: Client) -> int:
    return client.engine.stats().result(timeout=60)["engine"]["shared_tokens"]


def told(client: Client, name: str) -> tuple[Token, ...]:
    """What the first output of a request says of its prompt, and no other does."""
    first, *rest = client.wait_for(name)
    assert first.error is None, first.error
    assert all(not output.prompt for output in rest)
    return first.prompt


def check(prompt: list[int], scored: tuple[Token, ...], model: PreTrainedModel, best: int) -> None:
    logprobs = full_logits(model, prompt).log_softmax(-1)[:-1]
    assert [token.id for token in scored] == prompt[1:]
    expected = [row[token].item() for row, token in zip(logprobs, prompt[1:], strict=True)]
    assert [token.logprob for token in scored] == pytest.approx(expected, abs=1e-4)
    for token, row in zip(scored, logprobs, strict=True):
        assert [b.logprob for b in token.best] == pytest.approx(row.topk(best).values.tolist(), abs=1e-4)


def test_many_users_prompts_are_scored_as_each_ones_own_library_does(home: Home, client: Client) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate((1, 2, 17, 64, 65, 66, LONG, LONG, 90))]
    best = [0, 3, 1, 20, 2, 0, 5, 1, 4]
    asked = list(zip(prompts, best, everyone(home) * 3, strict=True))
    for i, (prompt, count, (_, ref)) in enumerate(asked):
        client.submit(str(i), prompt, ref, owner=f"user-{i}", prompt_logprobs=count, max_tokens=4)
        client.submit(f"plain-{i}", prompt, ref, owner=f"plain-{i}", max_tokens=4)
    for i, (prompt, count, (model, _)) in enumerate(asked):
        check(prompt, told(client, str(i)), model, count)
        assert client.tokens(str(i)) == greedy(model, prompt, 4)
        assert told(client, f"plain-{i}") == ()
        assert client.tokens(f"plain-{i}") == greedy(model, prompt, 4)


def test_a_beginning_in_the_cache_is_not_used_where_it_must_be_scored_and_is_there_for_others(
    home: Home, client: Client
) -> None:
    prompt = prompt_of(LONG)
    for turn in range(2):
        before = shared(client)
        check(prompt, told(client, client.submit(str(turn), prompt, prompt_logprobs=1)), home.model, 1)
        assert shared(client) == before
    client.ask(prompt)
    assert shared(client) == before + LONG // 16 * 16


def test_a_prompt_is_scored_without_an_answer_though_it_fills_the_whole_context(home: Home) -> None:
    with serving(home.base, home.directory, kv_bytes=kv_bytes(home.base, CONTEXT // 16)) as client:
        for length in (1, 2, CONTEXT):
            prompt = prompt_of(length, seed=length)
            [output] = client.wait_for(client.submit(str(length), prompt, prompt_logprobs=2, max_tokens=0))
            assert output.token is None
            assert output.finish is Finish.LENGTH
            assert output.origin is not None
            check(prompt, output.prompt, home.model, 2)
        with pytest.raises(ContextLengthExceeded):
            client.submit("longer", prompt_of(CONTEXT + 1), max_tokens=0)
        assert [output.finish for output in client.wait_for(client.submit("alone", [5], max_tokens=0))] == ["length"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_prompt_that_gave_way_is_scored_on_from_where_it_was(home: Home, kept: bool) -> None:
    """`kept`: what it had computed is still in the cache when it comes back."""
    kv = KVCache(home.base.kv_shapes, kv_bytes(home.base, 16), home.base.dtype, CPU)
    scheduler, runner = Scheduler(kv, 8, 16), Runner(home.base, kv, Pool(1024, home.base.dtype, CPU))
    rows = 0

    def step() -> None:
        nonlocal rows
        for work, token, diverged, scored in runner.run(scheduler.schedule()):
            assert not diverged
            rows += len(scored)
            scheduler.advance(work, token.id if token else None, scored)
            if work.sequence.produced == work.sequence.request.sampling.max_tokens:
                scheduler.remove(work.sequence)

    def sequence(owner: str, seed: int, count: int) -> Sequence:
        sampling = Sampling(temperature=0, max_tokens=count, prompt_logprobs=2)
        return Sequence.of(Request(f"{owner}-{seed}", prompt_of(100, seed), sampling, owner=owner))

    first, second, other = sequence("A", 0, 30), sequence("A", 1, 2), sequence("B", 2, 2)
    scheduler.add(first)
    scheduler.add(second)
    while len(second.scored) < 40:
        step()
    scheduler.add(other)
    step()
    assert second not in scheduler.running, "it did not give way"
    assert second.unscored
    if not kept:
        kv.blocks.erase("A")
    while scheduler.running:
        step()
    for done in (first, second, other):
        check(done.request.prompt, tuple(done.scored), home.model, 2)
        assert done.tokens[100:] == greedy(home.model, done.request.prompt, done.produced)
    assert rows == 3 * 99, "none was scored twice"


def test_a_prompt_whose_numbers_are_not_finite_fails_alone(home: Home, tmp_path: Path) -> None:
    shutil.copytree(home.directory / "blobs", tmp_path / "blobs")
    good = encoded(saved(home.oracles[0], tmp_path / "peft"), home.base)
    huge = stored(Block(good.meta, torch.full_like(good.payload, 1e30)), tmp_path / "blobs")
    with serving(home.base, tmp_path) as client:
        bad = client.submit("bad", prompt_of(LONG), huge, prompt_logprobs=1, max_tokens=0)
        fine = client.submit("fine", prompt_of(LONG), home.refs[0], prompt_logprobs=1, max_tokens=0)
        assert client.error(bad).code == "not_finite"
        check(prompt_of(LONG), told(client, fine), home.oracles[0], 1)


def test_sixteen_bits_score_a_prompt_the_same_alone_and_among_others(tmp_path: Path) -> None:
    """By whatever code serves sixteen bits on this machine, bit for bit."""
    base = serving_twin(tiny_model("llama").bfloat16())
    prompt, asked = prompt_of(LONG), {"prompt_logprobs": 2, "max_tokens": 3}
    with serving(base, tmp_path, max_step_tokens=96) as client:
        alone = told(client, client.submit("alone", prompt, **asked))
        for i in range(5):
            client.submit(f"other-{i}", prompt_of(20 + 30 * i, i + 1), owner=f"other-{i}", **asked)
        assert told(client, client.submit("among", prompt, **asked)) == alone


# -- how many at once


def scoring(floor: Floor, owner: str, prompt: int) -> Sequence:
    sequence = Sequence.of(
        Request(f"{owner}-{prompt}", prompt_of(prompt), Sampling(max_tokens=2, prompt_logprobs=0), owner=owner)
    )
    floor.scheduler.add(sequence)
    return sequence


def test_a_step_scores_few_rows_and_leaves_the_others_its_tokens() -> None:
    floor = Floor(max_batch=8, max_step_tokens=512)
    sequences = [scoring(floor, owner, prompt) for owner, prompt in (("A", 300), ("A", 100), ("B", 40), ("C", 1))]
    plain = floor.submit("D", prompt=500, count=2)
    rows: list[int] = []
    while any(s.unscored for s in sequences):
        work = floor.scheduler.schedule()
        rows.append(sum(len(w.scores) for w in work))
        for w in work:
            scored = [Token(w.sequence.tokens[place + 1]) for place in w.scores]
            floor.scheduler.advance(w, 7 if w.samples else None, scored)
            if w.sequence.produced == 2:
                floor.scheduler.remove(w.sequence)
        if len(rows) == 2:
            assert plain.produced, "it was not held up"
    assert max(rows) == SCORED_ROWS
    assert sum(rows) == sum(len(s.request.prompt) - 1 for s in sequences)
    assert [[t.id for t in s.scored] for s in sequences] == [s.request.prompt[1:] for s in sequences]
