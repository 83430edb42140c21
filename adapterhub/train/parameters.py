"""A job's parameters: one flat fp32 block with one flat gradient, and the copy of it that a forward uses."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from adapterhub.swap.block import Block
from adapterhub.swap.layout import Factors, Layout


class Parameters:
    """The factors of every target, all A's before all B's, so that each half is one tensor to the optimizer.

    The forward uses `factors`: views into a copy that is made anew by `refresh` after each optimizer step, and is the
    block as it would be served: in the base's dtype, in the layout's order, with the LoRA scale folded into B. The
    backward adds to `gradients`: fp32 views into one flat gradient.
    """

    def __init__(self, layout: Layout, rank: int, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        self.layout, self.rank, self.scale = layout, rank, scale
        self._middle = rank * sum(t.n_in for t in layout.targets)
        size = layout.numel(rank)
        self.block = torch.zeros(size, device=device)
        self.gradient = torch.zeros(size, device=device)
        self._working = torch.zeros(size, device=device, dtype=dtype)
        self.factors: Mapping[str, Factors] = {t.name: f for t, f in layout.all_factors(self._working, rank)}
        self.gradients: Mapping[str, Factors] = self._views(self.gradient)
        self._masters, self._workings = _lists(self._views(self.block)), _lists(self.factors)
        self.halves = [self._half(self.block, self.gradient, i) for i in (0, 1)]

    def start_fresh(self, seed: int) -> None:
        """The usual start of LoRA: Kaiming for A, zero for B."""
        generator = torch.Generator().manual_seed(seed)
        for factors in self._views(self.block).values():
            bound = 1 / math.sqrt(factors.a.shape[1])
            factors.a.copy_(torch.empty(factors.a.shape).uniform_(-bound, bound, generator=generator))
        self.refresh()

    def start_from(self, initial: Block) -> None:
        """Goes on from a block of the same layout and rank."""
        views = self._views(self.block)
        for target, factors in self.layout.all_factors(initial.payload, self.rank):
            views[target.name].a.copy_(factors.a)
            views[target.name].b.copy_(factors.b.float() / self.scale)
        self.refresh()

    def refresh(self) -> None:
        """After `block` has changed."""
        (a, b), (working_a, working_b) = self._masters, self._workings
        torch._foreach_copy_(working_a, a)  # on a GPU a few launches for all linears
        torch._foreach_copy_(working_b, torch._foreach_mul(b, self.scale))

    def forget_gradients(self) -> None:
        self.gradient.zero_()

    def finish_gradient(self, max_norm: float, count: int) -> float:
        """Turns what the backward has added up of `count` losses into the gradient of `block` for their mean, clipped;
        returns its norm before that, which is not finite when a number in it is not."""
        self.gradient.div_(count)
        self.gradient[self._middle :].mul_(self.scale)  # the backward saw B with the scale folded in
        norm = float(self.gradient.norm())
        if norm > max_norm:
            self.gradient.mul_(max_norm / (norm + 1e-6))
        return norm

    def folded(self) -> torch.Tensor:
        """A copy of the flat block as it is served, on the CPU."""
        return self._working.to("cpu", copy=True)

    def _half(self, block: torch.Tensor, gradient: torch.Tensor, which: int) -> torch.nn.Parameter:
        part = slice(self._middle) if which == 0 else slice(self._middle, None)
        half = torch.nn.Parameter(block[part])
        half.grad = gradient[part]
        return half

    def _views(self, flat: torch.Tensor) -> dict[str, Factors]:
        views, a_at, b_at = {}, 0, self._middle
        for target in self.layout.targets:
            a_end, b_end = a_at + self.rank * target.n_in, b_at + self.rank * target.n_out
            views[target.name] = Factors(
                flat[a_at:a_end].view(self.rank, target.n_in), flat[b_at:b_end].view(self.rank, target.n_out)
            )
            a_at, b_at = a_end, b_end
        return views


def _lists(views: Mapping[str, Factors]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """All A's and all B's."""
    return [factors.a for factors in views.values()], [factors.b for factors in views.values()]
