"""Trains one LoRA on the resident base, in pieces that fit between the steps of serving.

The job owns one flat fp32 block and one flat gradient; the factors that the base's linears see are views into them, so
the optimizer deals with a single tensor, and publishing is a scale, a cast and a write.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from adapterhub.base.batch import Batch, Segment, Span
from adapterhub.base.model import Base
from adapterhub.errors import HubError, ServerFault
from adapterhub.swap.block import Block, BlockMeta
from adapterhub.swap.layout import Factors, Layout
from adapterhub.train.data import Example
from adapterhub.train.plan import Plan, target_layout

_WARMUP = 0.1  # of all steps; then the learning rate falls in a line to a tenth
_MAX_NORM = 1.0
_WEIGHT_DECAY = 0.0


@dataclass(frozen=True)
class Progress:
    """After an optimizer step. Loss and accuracy are means over the learned tokens of its batch."""

    step: int
    total_steps: int
    loss: float
    accuracy: float
    trained_tokens: int
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Trained:
    block: Block
    trained_tokens: int


News = Progress | Trained | HubError


class Parameters:
    """A and B of every target, as views into one flat fp32 block, with gradients that are views into another."""

    def __init__(self, layout: Layout, rank: int, scale: float, seed: int, device: torch.device) -> None:
        self.layout, self.rank, self.scale = layout, rank, scale
        self.block = torch.zeros(layout.numel(rank), device=device)
        self.gradient = torch.zeros_like(self.block)
        generator = torch.Generator().manual_seed(seed)
        self._views: dict[str, Factors] = {}
        gradients = {t.name: g for t, g in layout.all_factors(self.gradient, rank)}
        for target, factors in layout.all_factors(self.block, rank):
            bound = 1 / math.sqrt(target.n_in)  # the usual init of LoRA: Kaiming for A, zero for B
            factors.a.copy_(torch.empty(factors.a.shape).uniform_(-bound, bound, generator=generator))
            view = Factors(factors.a.detach().requires_grad_(), factors.b.detach().requires_grad_())
            view.a.grad, view.b.grad = gradients[target.name]
            self._views[target.name] = view

    def cast(self, dtype: torch.dtype) -> Mapping[str, Factors]:
        """The factors as a forward uses them: in the base's dtype, the scale folded into B, recorded by autograd."""
        return {n: Factors(f.a.to(dtype), (f.b * self.scale).to(dtype)) for n, f in self._views.items()}

    def folded(self, dtype: torch.dtype) -> torch.Tensor:
        """The flat block as it is served."""
        block = self.block.clone()
        for _, factors in self.layout.all_factors(block, self.rank):
            factors.b.mul_(self.scale)
        return block.to(dtype).cpu()


@dataclass(frozen=True)
class _Casts:
    """The adapter of a training forward's one segment."""

    factors: Mapping[str, Factors]


class Trainer:
    """One job as idle work of the engine. `tell` is called on the engine's thread and must not block."""

    def __init__(
        self, base: Base, examples: list[Example], plan: Plan, micro_tokens: int, tell: Callable[[News], None]
    ) -> None:
        self._base, self._examples, self._plan = base, examples, plan
        self._micro_tokens = self._piece_tokens = micro_tokens
        self._tell = tell
        self._cancelled = False
        self._steps = plan.steps(len(examples))
        self._pieces = self._run()

    def cancel(self) -> None:
        """From any thread: the next piece is the last, and nothing more is told."""
        self._cancelled = True

    def step(self, tokens: int) -> int:
        """One micro-step: forward and backward of as many examples as fit into `tokens` and its own limit."""
        if self._cancelled:
            return 0
        self._piece_tokens = min(tokens, self._micro_tokens)
        try:
            return next(self._pieces, 0)
        except Exception as error:
            self._tell(error if isinstance(error, HubError) else ServerFault(f"Training failed: {error}"))
            return 0

    def _run(self) -> Iterator[int]:
        base, plan = self._base, self._plan
        layout = target_layout(plan, base.layout)
        parameters = Parameters(layout, plan.rank, plan.scale, plan.seed, base.device)
        flat = torch.nn.Parameter(parameters.block)
        flat.grad = parameters.gradient
        optimizer = torch.optim.AdamW([flat], lr=plan.learning_rate, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate)
        trained_tokens, busy = 0, 0.0
        for step, batch in enumerate(self._batches(), start=1):
            learned = sum(sum(e.learned[1:]) for e in batch)
            loss, right = 0.0, 0
            for micro in _pack(batch, lambda: self._piece_tokens):
                started = time.perf_counter()
                micro_loss, micro_right = self._backward(parameters, micro, learned)
                loss, right = loss + micro_loss, right + micro_right
                busy += time.perf_counter() - started
                yield sum(len(e.tokens) for e in micro)
            norm = torch.nn.utils.clip_grad_norm_([flat], _MAX_NORM)
            if not math.isfinite(loss) or not norm.isfinite():
                raise ServerFault(
                    f"The loss is not finite at step {step}: the training diverged. Lower learning_rate_multiplier "
                    f"(it was {plan.learning_rate_multiplier:g}).",
                    code="training_diverged",
                )
            optimizer.step()
            schedule.step()
            parameters.gradient.zero_()
            trained_tokens += sum(len(e.tokens) for e in batch)
            rate = trained_tokens / busy
            left = busy / step * (self._steps - step)
            self._tell(Progress(step, self._steps, loss, right / learned, trained_tokens, rate, left))
        self._tell(Trained(self._block(parameters), trained_tokens))

    def _batches(self) -> Iterator[list[Example]]:
        order = random.Random(self._plan.seed)
        left = self._steps
        while True:
            epoch = order.sample(self._examples, len(self._examples))
            for at in range(0, len(epoch), self._plan.batch_size):
                if left == 0:
                    return
                left -= 1
                yield epoch[at : at + self._plan.batch_size]

    def _backward(self, parameters: Parameters, examples: list[Example], learned: int) -> tuple[float, int]:
        """Adds the gradient of the examples' share of the batch's mean loss; returns that share, and how many tokens
        were right."""
        device = self._base.device
        tokens = [t for e in examples for t in e.tokens]
        spans, rows, wanted = [], [], []
        at = 0
        for example in examples:
            spans.append(Span(at, len(example.tokens), len(example.tokens)))
            hits = [i for i in range(1, len(example.tokens)) if example.learned[i]]
            rows += [at + i - 1 for i in hits]
            wanted += [example.tokens[i] for i in hits]
            at += len(example.tokens)
        positions = [p for e in examples for p in range(len(e.tokens))]
        with torch.enable_grad():
            adapter = _Casts(parameters.cast(self._base.dtype))
            batch = Batch(
                tokens=torch.tensor(tokens, device=device),
                positions=torch.tensor(positions, device=device),
                spans=spans,
                segments=[Segment(0, len(tokens), adapter)],
            )
            logits = self._base.logits(batch, torch.tensor(rows, device=device))
            targets = torch.tensor(wanted, device=device)
            loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / learned
            loss.backward()
        return loss.item(), int((logits.detach().argmax(-1) == targets).sum())

    def _learning_rate(self, step: int) -> float:
        warm = max(1, round(self._steps * _WARMUP))
        if step < warm:
            return (step + 1) / warm
        return 1.0 - 0.9 * (step - warm) / max(1, self._steps - warm)

    def _block(self, parameters: Parameters) -> Block:
        base, plan, layout = self._base, self._plan, parameters.layout
        count = len(layout.targets)
        meta = BlockMeta(
            fingerprint=base.fingerprint,
            rank=plan.rank,
            layout=layout,
            ranks=(plan.rank,) * count,
            scales=(plan.scale,) * count,
            config={
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base.name,
                "r": plan.rank,
                "lora_alpha": plan.rank * plan.scale,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": sorted({t.name.rpartition(".")[2] for t in layout.targets}),
                "inference_mode": True,
            },
            dtype=base.dtype,
        )
        block = Block(meta, parameters.folded(base.dtype))
        if not block.payload.isfinite().all():
            raise ServerFault(f"The trained adapter does not fit into {base.dtype}.", code="training_diverged")
        return block


def _pack(batch: list[Example], micro_tokens: Callable[[], int]) -> Iterator[list[Example]]:
    """The batch in order, in micro-batches of up to that many tokens; a longer example is one by itself."""
    pack: list[Example] = []
    size = 0
    for example in batch:
        if pack and size + len(example.tokens) > micro_tokens():
            yield pack
            pack, size = [], 0
        pack.append(example)
        size += len(example.tokens)
    yield pack
