"""Greedy answers of the embedded base, native beside torch: the same tokens, or two whose logits were a near tie.

bf16 moves every logit a little, and two logits against each other by about sqrt(2) of that. How much it is, torch's own
bf16 forward says, measured against the fp32 forward at the very same place. Within four such deviations either token
is a right answer; the native path has to be that near at every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adapterhub.base import runner
from adapterhub.base.batch import Batch, Segment, Span
from adapterhub.base.model import Base, load_base
from adapterhub.base.native import library, ops
from adapterhub.config import Config
from adapterhub.swap.block import Block, BlockMeta
from adapterhub.swap.layout import Factors
from tests.tiny import serving, stored

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
TOKENS = 48
ALLOWED = 4  # standard deviations of what bf16 does to the difference of two logits
ASKED: list[tuple[str, int | None]] = [  # a prompt, and the rank of its own random adapter
    ("The history of the city of London begins with", None),
    ("The history of the city of London begins with", 16),
    ("def fibonacci(n):\n", None),
    ("Dear Sir or Madam,\n\nI am writing to", 8),
    ("Once upon a time, in a village by the sea,", 64),
    ("The three most important discoveries in physics are", None),
    ("To bake a loaf of bread you need", 1),
    ("Q: What is the capital of France?\nA:", 16),
    ("1, 1, 2, 3, 5, 8, 13,", None),
    ("import json\nimport os\n\n\nclass Config:\n", 32),
    ("It was the best of times, it was the worst of times, it was", 3),
    ("<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n", 24),
]


@dataclass(frozen=True)
class Adapter:
    """A block's factors, as a forward takes them."""

    factors: dict[str, Factors]


@dataclass(frozen=True)
class Answered:
    """One prompt, and its greedy answer by either path."""

    text: str
    prompt: list[int]
    block: Block | None
    native: list[int]
    plain: list[int]

    @property
    def parted(self) -> int | None:
        """Where the answers differ first."""
        return next((i for i in range(TOKENS) if self.native[i] != self.plain[i]), None)


class Judge:
    """The embedded base in bf16, as it is served, and in fp32."""

    def __init__(self, directory: Path) -> None:
        self.served = load_base(Config(data_dir=directory, device="cpu", dtype="bfloat16"))
        self.exact = load_base(Config(data_dir=directory, device="cpu", dtype="float32"))

    def gaps(self, of: Answered, answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token of an answer: how far every logit [vocabulary] is below the best one in fp32, and how far a
        token's may be."""
        true, rounded = (logits(base, of, answer) for base in (self.exact, self.served))
        return true.amax(1, keepdim=True) - true, ALLOWED * 2**0.5 * (rounded - true).std(1)


def logits(base: Base, of: Answered, answer: list[int]) -> torch.Tensor:
    """[len(answer), vocabulary] from which each token of the answer was chosen, in torch, in one forward."""
    tokens = of.prompt + answer[:-1]
    segments = []
    if of.block is not None:
        factors = base.layout.all_factors(of.block.payload.to(base.dtype), of.block.meta.rank)
        segments = [Segment(0, len(tokens), Adapter({target.name: f for target, f in factors}))]
    batch = Batch(torch.tensor(tokens), torch.arange(len(tokens)), [Span(0, len(tokens), len(tokens))], segments)
    with torch.no_grad():
        return base.logits(batch, torch.arange(len(of.prompt) - 1, len(tokens))).float()


def random_block(base: Base, rank: int) -> Block:
    """On all linears, and of a trained one's size: it changes what is said, and leaves it language."""
    layout = base.layout
    count = len(layout.targets)
    meta = BlockMeta(base.fingerprint, rank, layout, (rank,) * count, (1.0,) * count, {"rank": rank}, base.dtype)
    numbers = torch.randn(layout.numel(rank), generator=torch.Generator().manual_seed(rank))
    return Block(meta, (numbers * 0.09 / rank**0.25).to(base.dtype))


def answers(base: Base, directory: Path, prompts: list[list[int]], blocks: list[Block | None]) -> list[list[int]]:
    """All asked at once, and so answered in one batch."""
    refs = [block and stored(block, directory / "blobs") for block in blocks]
    with serving(base, directory, device_bytes=None, kv_bytes=None) as client:
        names = [
            client.submit(f"{i}", prompt, ref, max_tokens=TOKENS, ignore_eos=True)
            for i, (prompt, ref) in enumerate(zip(prompts, refs, strict=True))
        ]
        return [client.tokens(name) for name in names]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def answered(judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> list[Answered]:
    base, directory = judge.served, tmp_path_factory.mktemp("answers")
    prompts = [base.tokenizer.encode(text) for text, _ in ASKED]
    blocks = [None if rank is None else random_block(base, rank) for _, rank in ASKED]
    native = answers(base, directory, prompts, blocks)
    with pytest.MonkeyPatch.context() as patch:  # what a machine without a compiler serves with
        patch.setattr(runner, "supports", lambda _: False)
        patch.setattr(ops, "usable", lambda _: False)
        plain = answers(base, directory, prompts, blocks)
    texts = [text for text, _ in ASKED]
    return [Answered(*each) for each in zip(texts, prompts, blocks, native, plain, strict=True)]


def test_native_answers_are_torchs_up_to_a_near_tie(judge: Judge, answered: list[Answered]) -> None:
    for one in answered:
        if (at := one.parted) is None:
            continue
        gaps, allowed = judge.gaps(one, one.native[: at + 1])
        for path, token in (("native", one.native[at]), ("torch", one.plain[at])):
            assert gaps[at, token] <= allowed[at], (
                f"{one.text!r}: token {at} is {one.native[at]} natively and {one.plain[at]} in torch. In fp32 the one "
                f"of {path} is {gaps[at, token]:.3f} below the best logit, and rounding explains {allowed[at]:.3f}"
            )


def test_every_native_token_is_the_fp32_models_choice_or_nearly(judge: Judge, answered: list[Answered]) -> None:
    best = 0
    for one in answered:
        gaps, allowed = judge.gaps(one, one.native)
        chosen = gaps[range(TOKENS), one.native]
        worst = int((chosen / allowed).argmax())
        assert chosen[worst] <= allowed[worst], (
            f"{one.text!r}: the native token {worst}, {one.native[worst]}, is {chosen[worst]:.3f} below fp32's best "
            f"logit, and rounding explains {allowed[worst]:.3f}"
        )
        best += int((chosen == 0).sum())
    assert best >= 0.95 * TOKENS * len(answered)  # near ties are rare
