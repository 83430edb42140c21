"""Tiny random models, adapters made by PEFT, and an engine to serve them: the real thing, small."""

from __future__ import annotations

import copy
import secrets
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from adapterhub.base.engine import Engine
from adapterhub.base.grammar import Grammar
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base, prepare_base
from adapterhub.base.request import Output, Request, Sampling
from adapterhub.base.runner import Runner
from adapterhub.base.scheduler import Sequence as Running
from adapterhub.base.scheduler import Work
from adapterhub.config import Config
from adapterhub.swap import peft
from adapterhub.swap.block import Block, write_block
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.pool import Pool
from adapterhub.swap.ref import AdapterRef
from adapterhub.swap.tiers import Tiers
from adapterhub.train.dataset import DataSet, Example, Kind

CPU = torch.device("cpu")
VOCABULARY = 160
WINDOW = 12  # of the families with a sliding window
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gemma": GemmaConfig(**GROUPED, head_dim=16),
    "gemma2": Gemma2Config(
        **GROUPED, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=20.0
    ),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "phi": PhiConfig(**SHAPE, partial_rotary_factor=0.5),
}


def tiny_model(family: str | PreTrainedConfig = "llama", *, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model. Its weights are larger than an initialisation's, so that attention looks somewhere and every
    bias and norm matters."""
    config = copy.deepcopy(FAMILIES[family] if isinstance(family, str) else family)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            parameter.add_(noise * 0.1) if parameter.ndim == 1 else parameter.copy_(noise * 0.2)
    model.tie_weights()
    return model


def tiny_base(family: str | PreTrainedConfig = "llama", *, seed: int = 0) -> Base:
    return serving_twin(tiny_model(family, seed=seed))


def serving_twin(model: PreTrainedModel) -> Base:
    """A base with the weights of `model`, which stays as it is."""
    return prepare_base("tiny", copy.deepcopy(model), None, CPU)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


# -- adapters


def peft_model(model: PreTrainedModel, *, seed: int = 0, size: float = 0.3, **config: Any) -> PeftModel:
    """PEFT's own model around a copy of `model`, with a random adapter whose B is not zero."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, size, generator=generator))
    return wrapped


def saved(wrapped: PeftModel, directory: Path) -> tuple[bytes, bytes]:
    """adapter_config.json and adapter_model.safetensors, as PEFT's `save_pretrained` writes them."""
    wrapped.save_pretrained(directory)
    return (directory / peft.CONFIG_FILE).read_bytes(), (directory / peft.WEIGHTS_FILE).read_bytes()


def encoded(files: tuple[bytes, bytes], base: Base) -> Block:
    config, weights = files
    return peft.encode(peft.read_config(config), weights, base.layout, base.fingerprint, base.dtype)


def stored(block: Block, blobs: Path) -> AdapterRef:
    """Writes a block where an engine with these `blobs` finds it."""
    blobs.mkdir(parents=True, exist_ok=True)
    write_block(block, blobs)
    return AdapterRef(block.digest[:8], block.digest, block.meta.nbytes)


def make_ref(model: PreTrainedModel, base: Base, directory: Path, *, seed: int = 0, **config: Any) -> AdapterRef:
    """A random adapter made by PEFT, imported and stored in `directory / "blobs"`."""
    files = saved(peft_model(model, seed=seed, **config), directory / f"peft-{seed}")
    return stored(encoded(files, base), directory / "blobs")


# -- an engine


class Client:
    """An engine, and everything it answered, in order."""

    def __init__(self, base: Base, config: Config, disk: DiskTier | None = None) -> None:
        self._heard: list[Output] = []
        self._news = threading.Condition()
        self.engine = Engine(base, config, self._hear, disk=disk)

    def _hear(self, outputs: list[Output]) -> None:
        with self._news:
            self._heard += outputs
            self._news.notify_all()

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        adapter: AdapterRef | None = None,
        *,
        owner: str = "",
        grammar: Grammar | None = None,
        **sampling: Any,
    ) -> str:
        """Greedy, unless told otherwise. Returns `name`."""
        fields = {"temperature": 0.0, "max_tokens": 8, **sampling}
        self.engine.submit(Request(name, list(prompt), Sampling(**fields), adapter, owner, grammar))
        return name

    def heard(self, name: str | None = None) -> list[Output]:
        """What came so far, of one request or of all."""
        with self._news:
            return [o for o in self._heard if name in (None, o.request)]

    def wait_for(self, name: str, count: int = 10**9) -> list[Output]:
        """The outputs of a request, once there are `count` or it has ended."""
        with self._news:
            done = self._news.wait_for(
                lambda: (
                    len(found := [o for o in self._heard if o.request == name]) >= count or (found and found[-1].last)
                ),
                timeout=60,
            )
        assert done, f"{name} does not get on: {self.heard(name)}"
        return self.heard(name)

    def tokens(self, name: str) -> list[int]:
        """The tokens of a request that must not fail."""
        outputs = self.wait_for(name)
        assert outputs[-1].error is None, outputs[-1].error
        return [o.token.id for o in outputs if o.token is not None]

    def error(self, name: str) -> Any:
        """The error of a request that must fail."""
        error = self.wait_for(name)[-1].error
        assert error is not None, f"{name} was answered"
        return error

    def ask(self, prompt: Sequence[int], adapter: AdapterRef | None = None, **sampling: Any) -> list[int]:
        """Submits and waits."""
        return self.tokens(self.submit(f"ask-{secrets.token_hex(4)}", prompt, adapter, **sampling))

    def check_integrity(self) -> None:
        self.engine.check_integrity().result(timeout=60)


def kv_bytes(base: Base, blocks: int) -> int:
    return blocks * 16 * sum(s.numel for s in base.kv_shapes.values()) * base.dtype.itemsize


@contextmanager
def serving(base: Base, directory: Path, *, disk: DiskTier | None = None, **config: Any) -> Iterator[Client]:
    """A started engine whose blocks lie in `directory / "blobs"`, or in `disk`. Checks at the end that nothing has
    leaked."""
    (directory / "blobs").mkdir(exist_ok=True)
    fields = {"kv_bytes": kv_bytes(base, 64), "device_bytes": 1024**2, "ram_bytes": 0, **config}
    client = Client(base, Config(data_dir=directory, **fields), disk)
    client.engine.start()
    try:
        yield client
        if client.engine.alive:
            client.check_integrity()
    finally:
        client.engine.stop()


# -- forwards by hand


class Machine:
    """What the engine's thread drives, driven by hand: blocks through the tiers into the pool, and forwards."""

    def __init__(self, base: Base, directory: Path) -> None:
        self.base = base
        self.kv = KVCache(self.base.kv_shapes, kv_bytes(self.base, 64), self.base.dtype, CPU)
        self._arrived = threading.Event()
        self.tiers = Tiers(
            Pool(1024**2, self.base.dtype, CPU),
            DiskTier(directory / "blobs"),
            self.base.fingerprint,
            self.base.layout,
            ram_bytes=0,
            load_threads=1,
            wake=self._arrived.set,
        )

    def sequence(self, prompt: list[int], ref: AdapterRef | None) -> Running:
        sequence = Running.of(Request("", prompt, adapter=ref))
        sequence.blocks = self.kv.blocks.allocate(self.kv.blocks_for(len(prompt))) or []
        if ref is not None:
            sequence.hold = self.tiers.acquire(ref)
            assert sequence.hold is not None
            while not sequence.ready:
                assert self._arrived.wait(10)
                self._arrived.clear()
                self.tiers.poll()
                assert sequence.hold.error is None, sequence.hold.error
        return sequence

    def forward(self, *work: Work) -> list[torch.Tensor]:
        """One forward; the logits of all tokens of each work."""
        with torch.no_grad():
            runner = Runner(self.base, self.kv, self.tiers.pool)
            batch = runner.batch(runner.forward(list(work)))
            logits = self.base.logits(batch, torch.arange(len(batch.tokens)))
        for w in work:
            w.sequence.computed += w.tokens
        return [logits[span.rows] for span in batch.spans]

    def release(self, *sequences: Running) -> None:
        for sequence in sequences:
            self.kv.blocks.release(sequence.blocks)
            if sequence.hold is not None:
                self.tiers.release(sequence.hold)
        self.kv.blocks.check_integrity([])
        self.tiers.check_integrity()

    def logits(self, prompt: list[int], ref: AdapterRef | None) -> torch.Tensor:
        """[len(prompt), vocabulary], of one sequence alone."""
        sequence = self.sequence(prompt, ref)
        [logits] = self.forward(Work(sequence, len(prompt)))
        self.release(sequence)
        return logits


# -- oracles


def full_logits(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """[len(tokens), vocabulary], by the model's own forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' `generate`."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def data_set(items: Sequence[tuple[Example, ...]]) -> DataSet:
    """In memory, as far as anybody can tell: its file has no name for as long as it is mapped."""
    with tempfile.TemporaryDirectory() as directory:
        return DataSet.of(Kind.DPO if len(items[0]) == 2 else Kind.SUPERVISED, items, Path(directory), "train")


def to_learn(texts: Iterable[Sequence[int]]) -> DataSet:
    """Texts of which every token is learned."""
    return data_set([(Example(np.array(t, np.int32), np.ones(len(t), np.bool_)),) for t in texts])
