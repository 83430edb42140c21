"""The engine, started for real on a device, against PEFT on tiny random models of several families.

PEFT is the oracle in fp32, with the very weights that are served. A token is right when it is PEFT's choice after the
same tokens, or ties with it: within `TIE` of the best logit, which rounding alone can explain. Two answers that differ
can then differ at a tie only, so that "mixed" and "alone" need no other comparison.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from adapterhub.base.model import Base, prepare_base
from adapterhub.errors import HubError
from adapterhub.swap import peft
from adapterhub.swap.ref import AdapterRef
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.news import News, Progress, Trained
from adapterhub.train.plan import make_plan
from adapterhub.train.run import Run
from gpu.report import Check
from tests.tiny import (
    Client,
    encoded,
    kv_bytes,
    peft_model,
    prompt_of,
    saved,
    serving,
    stored,
    tiny_model,
    to_learn,
)

FAMILIES = ("llama", "qwen2", "mistral", "gemma2")
DTYPES = (torch.float32, torch.bfloat16)
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # another user's token is often off by more than 1
LENGTHS = (1, 2, 12, 17, 40, 70)  # of prompts: up to several steps, and to several windows of those that have one
QUICK_LENGTHS = (1, 17, 70)
ROUNDS = 3
TOKENS = 10  # of an answer
ADAPTERS: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 7, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj"]},
    {"r": 2, "use_rslora": True, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    {"r": 5, "target_modules": ["v_proj", "o_proj", "up_proj"]},
]


@dataclass
class Zoo:
    """A base on the device with users who each have an adapter, but for the first; and PEFT's models of the same."""

    model: PreTrainedModel  # on the device, in fp32
    base: Base
    refs: list[AdapterRef | None]
    oracles: list[Any]
    directory: Path

    @property
    def adapters(self) -> list[AdapterRef]:
        return [ref for ref in self.refs if ref is not None]


MakeZoo = Callable[[], AbstractContextManager[Zoo]]


@dataclass
class Verdict:
    """How many tokens were PEFT's own, how many nearly tied with them, and by how much the worst was off."""

    tie: float
    gaps: list[float] = field(default_factory=list)

    def judge(self, oracle: Any, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Adds, for each token of the answer, how far its logit was below the oracle's best one."""
        ids = torch.tensor([[*prompt, *answer]], device=oracle.device)
        with torch.no_grad():
            logits = oracle(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1)
        self.gaps += (logits.amax(-1) - chosen).tolist()

    @property
    def ok(self) -> bool:
        return all(gap <= self.tie for gap in self.gaps)  # NaN is none

    def __str__(self) -> str:
        near = [gap for gap in self.gaps if 0 < gap <= self.tie]
        wrong = len(self.gaps) - self.gaps.count(0) - len(near)
        return (
            f"{len(self.gaps)} tokens, {len(near)} of them near ties (within {max(near, default=0):.1g}), {wrong} wrong"
        )


def checks(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[str], Check]]]:
    """Each check's name, and what does the check of that name."""
    lengths = QUICK_LENGTHS if quick else LENGTHS
    for family, dtype in product(FAMILIES, DTYPES):
        name = f"{family}, {str(dtype).removeprefix('torch.')}"
        zoo = partial(make_zoo, family, dtype, device)
        yield f"{name}: mixed equals alone equals PEFT", partial(check_serving, zoo, lengths)
        if family == "llama":
            yield f"{name}: trains beside serving", partial(check_training, zoo)


@contextmanager
def make_zoo(family: str, dtype: torch.dtype, device: torch.device) -> Iterator[Zoo]:
    """On disk only for as long as the block runs."""
    rounded = tiny_model(family).to(dtype)
    base = prepare_base("tiny", copy.deepcopy(rounded), None, device)
    model = rounded.float()
    with tempfile.TemporaryDirectory() as path:
        zoo = Zoo(model, base, [None], [], Path(path))
        for seed, config in enumerate(ADAPTERS):
            wrapped = peft_model(model, seed=seed, size=0.2, **config)
            block = encoded(saved(wrapped, zoo.directory / f"peft-{seed}"), base)
            zoo.refs.append(stored(block, zoo.directory / "blobs"))
            zoo.oracles.append(wrapped.to(device))
        zoo.oracles.insert(0, model.to(device))
        yield zoo


# -- serving


def check_serving(make: MakeZoo, lengths: Sequence[int], name: str) -> Check:
    """Every user alone; then all of them at once, several times over, in too little room, while adapters are evicted
    and requests are cancelled."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    with make() as zoo:
        cases = [(user, i) for user in range(len(zoo.refs)) for i in range(len(prompts))]
        with serving(zoo.base, zoo.directory) as client:
            alone = {(u, i): client.ask(prompts[i], zoo.refs[u], max_tokens=TOKENS) for u, i in cases}
        with serving(zoo.base, zoo.directory, **_too_little_room(zoo)) as client:
            mixed = list(_all_at_once(client, zoo, prompts, cases))
            tiers = client.engine.stats().result(60)["tiers"]
    verdict = Verdict(TIE[zoo.base.dtype])
    for (user, i), answer in [*alone.items(), *mixed]:
        verdict.judge(zoo.oracles[user], prompts[i], answer)
    found = (tiers["device"]["hits"], tiers["ram"]["hits"], tiers["disk"]["loads"])
    evictions = tiers["device"]["evictions"]
    same = sum(answer == alone[case] for case, answer in mixed)
    detail = (
        f"{verdict}; {same} of {len(mixed)} mixed answers are those of alone; adapters were on the device, "
        f"in RAM and on disk {', '.join(map(str, found))} times; {evictions} evictions"
    )
    return Check(name, verdict.ok and all(found) and evictions > 0, detail)


def _too_little_room(zoo: Zoo) -> dict[str, Any]:
    sizes = sorted(ref.nbytes for ref in zoo.adapters)
    return {
        "device_bytes": sum(sizes[-2:]) + 1024,
        "ram_bytes": 2 * sum(sizes[-2:]),  # pinned memory comes in powers of two
        "kv_bytes": kv_bytes(zoo.base, 12),
        "max_batch": 6,
        "max_step_tokens": 24,
    }


def _all_at_once(
    client: Client, zoo: Zoo, prompts: list[list[int]], cases: list[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Yields the answers to all cases, asked several times in any order."""
    choose = random.Random(0)
    for turn in range(ROUNDS):
        names = {}
        for user, i in choose.sample(cases, len(cases)):
            # an owner of its own, so that what earlier rounds left in the KV cache is not shared
            owner = f"{user}, {turn}"
            name = f"{user}-{i}-{turn}"
            names[user, i] = client.submit(name, prompts[i], zoo.refs[user], owner=owner, max_tokens=TOKENS)
            if choose.random() < 0.2:
                client.engine.evict(choose.choice(zoo.adapters).digest)
            if choose.random() < 0.2:
                gone = f"gone-{name}"
                client.submit(gone, prompts[i], choose.choice(zoo.adapters), max_tokens=100)
                client.engine.cancel(gone)
        for (user, i), name in names.items():
            yield (user, i), client.tokens(name)
        client.check_integrity()


# -- training


def check_training(make: MakeZoo, name: str) -> Check:
    """A job beside serving: the loss falls, what is served stays right, and the published block serves as in PEFT."""
    prompt, steps = prompt_of(30), 30
    data = to_learn(prompt_of(12, seed) for seed in range(100, 104))
    asked_for = {"n_epochs": steps, "batch_size": 4, "rank": 4, "learning_rate": 2e-2}
    news: list[News] = []
    with make() as zoo:
        verdict = Verdict(TIE[zoo.base.dtype])
        with serving(zoo.base, zoo.directory) as client:
            trainer = CoTrainer(zoo.base, client.engine.wake)
            client.engine.set_idle_work(trainer)
            plan = make_plan(asked_for, 7, len(data), zoo.base.layout, width=zoo.base.width)
            trainer.add(Run(zoo.base, plan, data, None, news.append))
            for asked in count():
                if news and isinstance(news[-1], Trained | HubError):
                    break
                user = asked % len(zoo.refs)
                answer = client.ask(prompt, zoo.refs[user], owner=f"{asked}", max_tokens=TOKENS)
                verdict.judge(zoo.oracles[user], prompt, answer)
            if isinstance(news[-1], HubError):
                raise news[-1]
            assert isinstance(news[-1], Trained)
            block = news[-1].block
            answer = client.ask(prompt, stored(block, zoo.directory / "blobs"), max_tokens=TOKENS)
        for file, content in peft.export_files(block).items():
            (zoo.directory / file).write_bytes(content)
        verdict.judge(PeftModel.from_pretrained(copy.deepcopy(zoo.model), zoo.directory).eval(), prompt, answer)
    losses = [n.loss for n in news if isinstance(n, Progress)]
    detail = f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {steps} steps, beside {asked} requests; {verdict}"
    return Check(name, losses[-1] < 0.5 * losses[0] and verdict.ok, detail)
