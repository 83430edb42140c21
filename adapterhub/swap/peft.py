"""PEFT adapters (`adapter_config.json` + `adapter_model.safetensors`) to blocks and back.

`encode` folds each linear's LoRA scale into B (alpha / r, or alpha / sqrt(r) with rsLoRA, with PEFT's rank and alpha
patterns), pads smaller ranks with zeros and casts to the pool's dtype. `decode` undoes that. Where undoing it would not
give back the very same tensors, the block keeps the originals, so that export is lossless whatever came in.

What a block cannot express is refused by name, never dropped: DoRA, biases, saved modules, embeddings and so on. Pickle
is never read.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import regex
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from adapterhub.errors import InvalidAdapter, UnsupportedAdapter, WrongBase
from adapterhub.swap.block import Block, BlockMeta
from adapterhub.swap.layout import Layout

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FINGERPRINT_KEY = "adapterhub_base"  # in the metadata of weights that were exported here

MAX_RANK = 256
_PREFIX = "base_model.model."
_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_MAX_CONFIG = 1024**2  # bytes; it is kept in the header of the block
_MAX_NAME = 1000  # characters of a tensor's name
_LARGEST = 1e9  # of a rank or an alpha
# What a user's pattern may be made of. Counted repetitions and recursion would let a few bytes take all of the memory.
_PATTERN = regex.compile(r"(?:[\w.*+?^$|)\[\]\\-]|\((?!\?)|\(\?:){1,256}")
_PATTERN_SECONDS = 5.0  # for all the keys of a pattern over all module names

# Keys of adapter_config.json that do not change what the saved tensors mean, or that `_check_config` looks at itself.
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip
# Initialisations that leave the base as it is; the others (pissa, olora, corda, loftq, ...) change it beforehand.
_PLAIN_INITS = {True, False, "gaussian", "eva", "orthogonal", None}
_NAMES = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA biases",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trained token embeddings",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
}


def encode(config: Mapping[str, Any], weights: bytes, base: Layout, fingerprint: str, dtype: torch.dtype) -> Block:
    """A PEFT adapter as a block for the base whose linears are `base`.

    Raises InvalidAdapter, UnsupportedAdapter or WrongBase; the message names the tensor or the key.
    """
    _check_config(config)
    tensors, metadata = _read_weights(weights)
    origin = metadata.get(FINGERPRINT_KEY)
    if origin not in (None, fingerprint):
        raise WrongBase(f"This adapter was exported for base {origin[:12]}; this server runs base {fingerprint[:12]}.")
    pairs = _pair_up(tensors, base)
    layout = base.subset(pairs)
    ranks = _ranks(config, {t.name: pairs[t.name][0].shape[0] for t in layout.targets})
    scales = _scales(config, ranks)
    meta = BlockMeta(
        fingerprint=fingerprint,
        rank=max(ranks.values()),
        layout=layout,
        ranks=tuple(ranks.values()),
        scales=tuple(scales.values()),
        config=dict(config),
        dtype=dtype,
    )
    payload = torch.zeros(layout.numel(meta.rank), dtype=dtype)
    for target, factors in layout.all_factors(payload, meta.rank):
        a, b = pairs[target.name]
        factors.a[: ranks[target.name]] = a
        factors.b[: ranks[target.name]] = b.float().mul(scales[target.name]).T
    if not payload.isfinite().all():
        raise InvalidAdapter(f"With its scale folded in, this adapter does not fit into {dtype}: numbers overflow.")
    block = Block(meta, payload)
    return block if _same(decode(block)[1], tensors) else Block(meta, payload, source=tensors)


def decode(block: Block) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A block as PEFT's configuration and tensors: those it was imported from, bit for bit."""
    meta = block.meta
    if block.source is not None:
        return dict(meta.config), dict(block.source)
    tensors = {}
    pairs = zip(meta.layout.all_factors(block.payload, meta.rank), meta.ranks, meta.scales, strict=True)
    for (target, factors), rank, scale in pairs:
        b = factors.b[:rank].T if scale == 1 else factors.b[:rank].T.float().div(scale).to(meta.dtype)
        tensors[f"{_PREFIX}{target.name}.lora_A.weight"] = factors.a[:rank].contiguous()
        tensors[f"{_PREFIX}{target.name}.lora_B.weight"] = b.contiguous()
    return dict(meta.config), tensors


def export_files(block: Block) -> dict[str, bytes]:
    """The two files of a PEFT directory."""
    config, tensors = decode(block)
    metadata = {"format": "pt", FINGERPRINT_KEY: block.meta.fingerprint}
    return {
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS_FILE: save_safetensors(tensors, metadata=metadata),
    }


def read_config(text: bytes) -> dict[str, Any]:
    """Parses adapter_config.json. Raises InvalidAdapter."""
    if len(text) > _MAX_CONFIG:
        raise InvalidAdapter(f"{CONFIG_FILE} has {len(text)} bytes; at most {_MAX_CONFIG} are read.")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapter(f"{CONFIG_FILE} must be a JSON object, not a {type(config).__name__}.")
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(f"peft_type is {kind!r}; only LORA adapters can be served.", param="peft_type")
    for key, name in _NAMES.items():
        if config.get(key):
            raise UnsupportedAdapter(f"This adapter uses {name} ({key}), which cannot be served.", param=key)
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapter(f"This adapter trains biases (bias={config['bias']!r}); only 'none' can be served.")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or init not in _PLAIN_INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights={init!r} trains against a changed base. Convert it to a plain LoRA first (PEFT: "
            "save_pretrained with path_initial_model_for_weight_conversion).",
            param="init_lora_weights",
        )
    for key, value in config.items():
        if value and key not in _UNDERSTOOD:
            raise UnsupportedAdapter(f"{CONFIG_FILE} sets {key}, which is not known here and may matter.", param=key)
    for key in ("alpha_pattern", "rank_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(_is_number(v) for v in pattern.values()):
            raise InvalidAdapter(f"{key} must map module names to numbers.", param=key)
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key)) or config[key] <= 0:
            raise InvalidAdapter(f"{CONFIG_FILE} needs a positive {key}, not {config.get(key)!r}.", param=key)


def _read_weights(weights: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        tensors = load_safetensors(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        if weights[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            raise InvalidAdapter(
                "The weights are a pickle (a .bin or .pt file), which is never read, since it can run code. Save the "
                "adapter with save_pretrained(..., safe_serialization=True) and send adapter_model.safetensors."
            ) from error
        raise InvalidAdapter(f"The weights are not a safetensors file: {error}") from error
    names = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")], object_pairs_hook=list)
    header = dict(names)
    if len(header) < len(names):
        raise InvalidAdapter("The weights name a tensor twice: which of the two is meant cannot be known.")
    return tensors, dict(header.get("__metadata__") or [])


def _pair_up(tensors: Mapping[str, torch.Tensor], base: Layout) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> (A, B), every tensor accounted for, checked in shape, dtype and value."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if len(key) > _MAX_NAME:
            raise InvalidAdapter(f"The name of a tensor has {len(key)} characters; at most {_MAX_NAME} are read.")
        match = regex.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            raise UnsupportedAdapter(f"Tensor {key!r} is not a LoRA factor of a linear layer and cannot be served.")
        if tensor.dtype not in _DTYPES:
            raise InvalidAdapter(f"Tensor {key!r} is {tensor.dtype}; it must be float32, float16 or bfloat16.")
        if tensor.ndim > 2:
            raise InvalidAdapter(f"Tensor {key!r} has {tensor.ndim} dimensions; a LoRA factor has 2.")
        if not tensor.isfinite().all():
            raise InvalidAdapter(f"Tensor {key!r} has NaN or infinite values. Train the adapter again.")
        side = sides.setdefault(match[1], {})
        if match[2] in side:
            raise InvalidAdapter(f"Module {match[1]!r} has more than one lora_{match[2]}.")
        side[match[2]] = tensor
    if not sides:
        raise InvalidAdapter("The weights hold no tensors.")
    return {name: _check_pair(name, side, base) for name, side in sides.items()}


def _check_pair(name: str, side: Mapping[str, torch.Tensor], base: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    target = base.by_name.get(name)
    if target is None:
        raise WrongBase(f"The base has no linear layer {name!r} that an adapter can change. Is it for another base?")
    if side.keys() != {"A", "B"}:
        raise InvalidAdapter(f"Module {name!r} has only lora_{next(iter(side))}; both A and B are needed.")
    a, b = side["A"], side["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise InvalidAdapter(f"Module {name!r}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit together.")
    if (a.shape[1], b.shape[0]) != (target.n_in, target.n_out):
        raise WrongBase(
            f"Module {name!r} of the base maps {target.n_in} to {target.n_out}; the adapter's maps {a.shape[1]} to "
            f"{b.shape[0]}. It was made for another base."
        )
    return a, b


def _ranks(config: Mapping[str, Any], found: Mapping[str, int]) -> dict[str, int]:
    """Module name -> rank: what the tensors have, which must be what the configuration says."""
    expected = _pattern_values(config.get("rank_pattern") or {}, config["r"], found)
    for name, rank in found.items():
        if not 1 <= rank <= MAX_RANK:
            raise InvalidAdapter(f"Module {name!r} has rank {rank}; ranks from 1 to {MAX_RANK} can be served.")
        if expected[name] != rank:
            raise InvalidAdapter(f"Module {name!r} has rank {rank}, but {CONFIG_FILE} has {expected[name]}.", param="r")
    return dict(found)


def _scales(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Module name -> what its delta is multiplied with."""
    alphas = _pattern_values(config.get("alpha_pattern") or {}, config["lora_alpha"], ranks)
    return {name: alphas[name] / (math.sqrt(r) if config.get("use_rslora") else r) for name, r in ranks.items()}


def _pattern_values(pattern: Mapping[str, float], default: float, names: Iterable[str]) -> dict[str, float]:
    """PEFT's rule: the value of the first key that matches the end of the module's name, as a regular expression."""
    deadline = time.monotonic() + _PATTERN_SECONDS
    values = dict.fromkeys(names, default)
    for key, value in reversed(list(pattern.items())):  # so that the first has the last word
        if _PATTERN.fullmatch(key) is None:
            raise InvalidAdapter(
                f"The pattern {key[:80]!r} cannot be used: it may have up to 256 letters, digits and . * + ? | ( ) [ ] "
                "^ $ \\ -, without counts as in {2} and extensions as in (?...)."
            )
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("the patterns take too long")
            ending = regex.compile(rf"(.*\.)?({key})$")
            for name in values:
                if ending.match(name, timeout=max(deadline - time.monotonic(), 1e-3)):
                    values[name] = value
        except (regex.error, RecursionError, TimeoutError) as error:
            raise InvalidAdapter(f"The pattern {key[:80]!r} cannot be used: {error}") from error
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    def equal(key: str) -> bool:  # in every bit, so that -0.0 is not 0.0
        one, other = left[key], right[key]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))

    return left.keys() == right.keys() and all(map(equal, left))


def no_effect(block: Block) -> Iterable[str]:
    """The targets whose delta is zero for every input: an adapter that is all of these changes nothing."""
    for target, factors in block.meta.layout.all_factors(block.payload, block.meta.rank):
        if not factors.b.any() or not factors.a.any():
            yield target.name
