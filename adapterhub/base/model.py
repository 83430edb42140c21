"""Loads the base once and gets it ready to serve many adapters: attention taken over, linears multiplexed, probed."""

from __future__ import annotations

import hashlib
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from adapterhub.base.batch import Batch, Slot, Span
from adapterhub.base.embedded import base_name, base_path
from adapterhub.base.inject import (
    groups_of,
    inputs_of_linears,
    merge,
    multiplex,
    quantize_linears,
    take_over_attention,
)
from adapterhub.base.kv import KVShape, ShapeProbe
from adapterhub.base.quantize import Precision
from adapterhub.base.settle import settle
from adapterhub.base.triton import usable
from adapterhub.config import Config
from adapterhub.errors import BadRequest
from adapterhub.swap.layout import Layout

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PROBE_TOKENS = 5
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """The resident model, and what the rest needs to know of it. Only the engine's thread may run `model`."""

    name: str
    model: PreTrainedModel
    tokenizer: Any  # transformers' fast tokenizer
    layout: Layout  # every linear an adapter can target
    groups: list[list[str]]  # of those, neighbours that read the same input: q, k, v; gate, up
    slot: Slot
    kv_shapes: dict[int, KVShape]
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    context: int  # tokens of prompt and answer together
    end_tokens: frozenset[int]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))

    @property
    def vocabulary(self) -> int:
        """How many logits a token has, which may be more than the tokenizer knows tokens."""
        return self.model.config.get_text_config().vocab_size

    @property
    def width(self) -> int:
        """Numbers of a token between two layers."""
        return self.model.config.get_text_config().hidden_size

    def logits(self, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        """One forward; logits [len(rows), vocabulary] of the rows asked for."""
        with self.slot.running(batch):
            out = self.model(
                input_ids=batch.tokens.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=rows,
            )
        return out.logits[0]


def load_base(config: Config) -> Base:
    """Loads `config.base`. Raises BadRequest, saying what to do, when it cannot be served."""
    name = base_name(config.base, config.base_name)
    path = base_path(config.base)
    device = device_of(config.device)
    try:
        disable_progress_bar()
        dtype = _dtype(config.dtype, AutoConfig.from_pretrained(path))
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"{config.base!r} cannot be loaded as a base: {error}\nGive --base a transformers directory with a causal "
            "language model and its tokenizer, or a hub name."
        ) from error
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return prepare_base(name, model, tokenizer, device, _precision(config.quantize))


def load_bases(config: Config) -> list[Base]:
    """`config.base` once for each of `config.devices`, or for `config.device` alone. Raises BadRequest."""
    devices = config.devices or (config.device,)
    for name in devices:
        device_of(name)  # so that all are known to be there before the first is loaded
    return [load_base(replace(config, device=name)) for name in devices]


def prepare_base(
    name: str, model: PreTrainedModel, tokenizer: Any, device: torch.device, quantized: Precision | None = None
) -> Base:
    """Turns a loaded model, in place, into a base that serves."""
    text = model.config.get_text_config()  # of a model that also sees, the part that speaks
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise BadRequest(f"{type(model).__name__} attends in chunks, which is not supported. Serve another base.")
    model.requires_grad_(False).eval().to(device)
    slot = take_over_attention(model)
    probe = _probe(model, slot, device)
    layout = multiplex(model, probe.linears, slot)
    fingerprint = fingerprint_of(model)  # of the weights as they were, so that adapters serve on either
    if quantized is not None:
        quantize_linears(model, quantized)
    elif usable(device):
        merge(model, probe.groups)
    if device.type == "cpu":
        settle(model)
    ends = model.generation_config.eos_token_id if model.generation_config else None
    if ends is None:
        ends = text.eos_token_id
    return Base(
        name=name,
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        groups=probe.groups,
        slot=slot,
        kv_shapes=probe.kv_shapes,
        fingerprint=fingerprint,
        device=device,
        dtype=model.dtype,
        context=_context(text),
        end_tokens=frozenset([ends] if isinstance(ends, int) else ends or []),
    )


@dataclass(frozen=True)
class _Probe:
    linears: list[str]
    groups: list[list[str]]
    kv_shapes: dict[int, KVShape]


def _probe(model: PreTrainedModel, slot: Slot, device: torch.device) -> _Probe:
    """One short forward, to see which linears read one row per token, and what each layer's attention keeps.

    Raises BadRequest for a base whose layers keep state elsewhere (recurrent ones), which could not be served.
    """
    head = model.get_output_embeddings()

    def reads_tokens(linear: nn.Linear, x: torch.Tensor) -> bool:
        return linear is not head and x.numel() == _PROBE_TOKENS * x.shape[-1]

    tokens = torch.arange(_PROBE_TOKENS, device=device)
    kept = ShapeProbe()
    batch = Batch(tokens, tokens, [Span(0, _PROBE_TOKENS, _PROBE_TOKENS)], [], kept)
    ids = tokens.unsqueeze(0)
    with slot.running(batch):
        forward = partial(model, input_ids=ids, position_ids=ids, use_cache=False)
        inputs = inputs_of_linears(model, reads_tokens, forward)
    layers = model.config.get_text_config().num_hidden_layers
    if len(kept.shapes) != layers:
        raise BadRequest(
            f"{type(model).__name__} has {layers} layers, of which only {len(kept.shapes)} keep their state in "
            "attention. Such a base cannot be served; choose a transformer with attention in every layer."
        )
    return _Probe(list(inputs), groups_of(inputs), kept.shapes)


def _context(config: Any) -> int:
    """The longest sequence in tokens. LongRoPE turns every sequence of a forward another way once one of them is longer
    than the original context, so what one user sends would change what the others get: such a base stays below that."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return min(config.max_position_embeddings, rope["original_max_position_embeddings"])
    return config.max_position_embeddings


def _precision(text: str | None) -> Precision | None:
    if text is None:
        return None
    try:
        return Precision(text)
    except ValueError as error:
        raise BadRequest(f"--quantize {text!r} is not one of {', '.join(Precision)}.") from error


def device_of(text: str) -> torch.device:
    """The device that `--device` names: of a GPU, always with its number. Raises BadRequest."""
    if text == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise BadRequest(f"--device {text!r} is not a device; use auto, cpu or cuda:N.") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise BadRequest(f"There is no {text}: this machine has no CUDA device that torch can use. Give cpu instead.")
    if (index := device.index or 0) >= (count := torch.cuda.device_count()):
        raise BadRequest(f"There is no {text}: torch finds cuda:0 to cuda:{count - 1}. Give one of those.")
    return torch.device("cuda", index)


def _dtype(text: str, config: Any) -> torch.dtype:
    if text != "auto":
        if text not in _DTYPES:
            raise BadRequest(f"--dtype {text!r} is not one of auto, {', '.join(_DTYPES)}.")
        return _DTYPES[text]
    saved = getattr(config, "dtype", None)
    name = saved if isinstance(saved, str) else str(saved).removeprefix("torch.")
    return _DTYPES.get(name, torch.bfloat16)


def fingerprint_of(model: nn.Module) -> str:
    """Names the base by its weights: shapes, and a sample of each parameter's values as bfloat16, so that the same
    checkpoint has the same fingerprint in whatever precision it is loaded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].to(torch.bfloat16).cpu().contiguous().view(torch.uint8)
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
