"""PEFT adapters to blocks and back. Those that are taken come from PEFT's own `save_pretrained` and return bit for bit;
what a block cannot hold is refused by its name."""

from __future__ import annotations

import contextlib
import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save
from transformers import PreTrainedModel

from adapterhub.base.model import Base
from adapterhub.errors import HubError, InvalidAdapter, UnsupportedAdapter, WrongBase
from adapterhub.swap import peft
from adapterhub.swap.block import Block, read_block, write_block
from tests.tiny import peft_model, saved, serving_twin, tiny_model

Files = tuple[bytes, bytes]
Q = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model: PreTrainedModel) -> Base:
    return serving_twin(model)


@pytest.fixture(scope="module")
def good(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A sound adapter on all of the attention's linears, to be spoilt in one respect."""
    wrapped = peft_model(model, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return saved(wrapped, tmp_path_factory.mktemp("good"))


def encode(files: Files, base: Base, dtype: torch.dtype = torch.float32) -> Block:
    config, weights = files
    return peft.encode(peft.read_config(config), weights, base.layout, base.fingerprint, dtype)


def assert_same_tensors(left: bytes, right: bytes) -> None:
    one, other = load(left), load(right)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), other[key].view(torch.uint8)), key


def assert_lossless(files: Files, base: Base, dtype: torch.dtype, directory: Path) -> Block:
    """In, onto the disk, back and out."""
    block = read_block(write_block(encode(files, base, dtype), directory))
    exported = peft.export_files(block)
    assert json.loads(exported[peft.CONFIG_FILE]) == json.loads(files[0])
    assert_same_tensors(exported[peft.WEIGHTS_FILE], files[1])
    return block


def assert_same_deltas(block: Block, wrapped: PeftModel) -> None:
    """The block's factors multiply to what PEFT would merge into each weight."""
    seen = set()
    for target, factors in block.meta.layout.all_factors(block.payload, block.meta.rank):
        layer = wrapped.base_model.model.get_submodule(target.name)
        torch.testing.assert_close(factors.b.T @ factors.a, layer.get_delta_weight("default"), atol=1e-5, rtol=1e-5)
        seen.add(target.name)
    assert seen == {n for n, m in wrapped.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd alpha": {"lora_alpha": 7, "r": 3},
    "scale of one": {"lora_alpha": 4, "r": 4},
    "fractional alpha": {"lora_alpha": 0.3},
    "rank of one": {"r": 1},
    "rsLoRA": {"use_rslora": True, "r": 3},
    "one target": {"target_modules": ["v_proj"]},
    "some targets": {"target_modules": ["q_proj", "down_proj"]},
    "targets by regex": {"target_modules": r".*layers\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "ranks by name": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
    "ranks by regex": {"rank_pattern": {"k_proj": 1, r"layers\.0\..*_proj": 6}, "r": 5},
    "alphas by name": {"alpha_pattern": {"v_proj": 9, "model.layers.0.mlp.gate_proj": 1}},
    "alphas by regex": {"alpha_pattern": {r".*\.[0-9]+\.self_attn\.(q|k)_proj": 32, "^model.layers.1.mlp.up_proj": 5}},
    "first pattern wins": {"alpha_pattern": {"q_proj": 30, "self_attn.q_proj": 3}, "rank_pattern": {"q_proj": 2}},
    "all at once": {"use_rslora": True, "alpha_pattern": {"q_proj": 11}, "rank_pattern": {"q_proj": 3}, "r": 7},
    "gaussian init": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_comes_back_as_peft_saved_it(case: str, model: PreTrainedModel, base: Base, tmp_path: Path) -> None:
    wrapped = peft_model(model, **CONFIGS[case])
    block = assert_lossless(saved(wrapped, tmp_path / "peft"), base, torch.float32, tmp_path)
    assert_same_deltas(block, wrapped)


@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_comes_back_whatever_dtype_it_has_and_is_served_in(
    trained: torch.dtype, served: torch.dtype, model: PreTrainedModel, base: Base, tmp_path: Path
) -> None:
    wrapped = peft_model(model, r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"])
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(trained)
    block = assert_lossless(saved(wrapped, tmp_path / "peft"), base, served, tmp_path)
    assert block.payload.dtype == served


def test_originals_are_kept_only_where_the_payload_would_not_give_them_back(good: Files, base: Base) -> None:
    half = save({name: tensor.bfloat16() for name, tensor in load(good[1]).items()})
    even = json.dumps({**json.loads(good[0]), "lora_alpha": 16}).encode()
    assert encode((even, half), base, torch.bfloat16).source is None
    assert encode((even, good[1]), base, torch.float32).source is None
    assert encode((even, good[1]), base, torch.bfloat16).source is not None


def test_smaller_ranks_are_padded_with_zeros(model: PreTrainedModel, base: Base, tmp_path: Path) -> None:
    wrapped = peft_model(model, r=2, rank_pattern={"down_proj": 5}, target_modules=["q_proj", "down_proj"])
    block = encode(saved(wrapped, tmp_path), base)
    assert block.meta.rank == 5
    assert block.meta.ranks == (2, 5, 2, 5)
    for (_, factors), rank in zip(block.meta.layout.all_factors(block.payload, 5), block.meta.ranks, strict=True):
        assert factors.a[:rank].any(1).all()
        assert not factors.a[rank:].any()
        assert not factors.b[rank:].any()


def test_negative_zeros_come_back(good: Files, base: Base, tmp_path: Path) -> None:
    tensors = load(good[1])
    tensors[B] = -torch.zeros_like(tensors[B])
    assert_lossless((good[0], save(tensors)), base, torch.float32, tmp_path)


@pytest.mark.parametrize(
    "rename", [lambda n: n.removeprefix("base_model.model."), lambda n: n.replace(".w", ".default.w")]
)
def test_names_without_pefts_prefix_or_with_the_adapters_name_are_understood(
    rename: Any, good: Files, base: Base, tmp_path: Path
) -> None:
    weights = save({rename(name): tensor for name, tensor in load(good[1]).items()})
    block = assert_lossless((good[0], weights), base, torch.float32, tmp_path)
    assert torch.equal(block.payload, encode(good, base).payload)


def test_the_length_of_a_header_is_not_mistaken_for_a_pickle(good: Files, base: Base) -> None:
    """A safetensors file begins with its header's length; 640, 1152 and 1408 begin as a pickle does."""
    for length in (640, 1152, 1408):
        pair = {name: tensor for name, tensor in load(good[1]).items() if Q in name}
        bare = int.from_bytes(save(pair, metadata={"pad": ""})[:8], "little")
        weights = save(pair, metadata={"pad": " " * (length - bare)})
        assert weights[:2] == length.to_bytes(2, "little")
        assert encode((good[0], weights), base).meta.layout.by_name.keys() == {Q}


def test_an_export_can_be_imported_again_and_loads_in_peft(
    model: PreTrainedModel, good: Files, base: Base, tmp_path: Path
) -> None:
    exported = peft.export_files(encode(good, base))
    again = encode((exported[peft.CONFIG_FILE], exported[peft.WEIGHTS_FILE]), base)
    assert again.digest == encode(good, base).digest
    for name, content in exported.items():
        (tmp_path / name).write_bytes(content)
    assert_same_deltas(again, PeftModel.from_pretrained(tiny_model("llama"), tmp_path))


# -- refusals of what PEFT can make and a block cannot hold

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "LoRA biases": ({"lora_bias": True, "target_modules": ["q_proj"]}, "LoRA biases"),
    "biases of the base": ({"bias": "all"}, "biases .*bias='all'"),
    "modules to save": ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
    "trained tokens": ({"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}, "token embeddings"),
    "activated LoRA": ({"alora_invocation_tokens": [5, 6]}, "activated LoRA"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer replication"),
}


@pytest.mark.filterwarnings(
    "ignore:`lora_bias=True` was passed but",
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:Adapter 'default'. 2 LoRA tensor",
)
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_block_cannot_hold_is_refused_by_name(
    case: str, model: PreTrainedModel, base: Base, tmp_path: Path
) -> None:
    config, message = REFUSED[case]
    files = saved(peft_model(model, **config), tmp_path)
    with pytest.raises(UnsupportedAdapter, match=message):
        encode(files, base)


# -- refusals of what is malformed


def with_config(files: Files, **changes: Any) -> Files:
    return json.dumps({**json.loads(files[0]), **changes}).encode(), files[1]


def with_tensor(files: Files, name: str, tensor: torch.Tensor | None) -> Files:
    tensors = {**load(files[1]), name: tensor}
    return files[0], save({n: t for n, t in tensors.items() if t is not None})


def filled(value: float, shape: tuple[int, ...] = (4, 32)) -> torch.Tensor:
    tensor = torch.ones(shape)
    tensor[0, 0] = value
    return tensor


MALFORMED: dict[str, tuple[Any, type[HubError], str]] = {
    "another method": (lambda f: with_config(f, peft_type="LOHA"), UnsupportedAdapter, "'LOHA'"),
    "no method": (lambda f: with_config(f, peft_type=None), UnsupportedAdapter, "peft_type"),
    "an unknown key": (lambda f: with_config(f, use_magic=True), UnsupportedAdapter, "use_magic"),
    "bare parameters": (lambda f: with_config(f, target_parameters=["w"]), UnsupportedAdapter, "target_parameters"),
    "an unknown init": (lambda f: with_config(f, init_lora_weights=["x"]), UnsupportedAdapter, "init_lora_weights"),
    "no rank": (lambda f: with_config(f, r=None), InvalidAdapter, "positive r"),
    "a negative rank": (lambda f: with_config(f, r=-1), InvalidAdapter, "positive r, not -1"),
    "an alpha of zero": (lambda f: with_config(f, lora_alpha=0), InvalidAdapter, "positive lora_alpha"),
    "an alpha that is text": (lambda f: with_config(f, lora_alpha="16"), InvalidAdapter, "lora_alpha, not '16'"),
    "an alpha beyond all floats": (lambda f: with_config(f, lora_alpha=10**400), InvalidAdapter, "positive lora_alpha"),
    "an infinite alpha": (lambda f: with_config(f, lora_alpha=float("inf")), InvalidAdapter, "positive lora_alpha"),
    "a pattern that is a list": (lambda f: with_config(f, rank_pattern=["q"]), InvalidAdapter, "rank_pattern"),
    "a pattern to text": (lambda f: with_config(f, alpha_pattern={"q": "x"}), InvalidAdapter, "alpha_pattern"),
    "a pattern that does not parse": (lambda f: with_config(f, alpha_pattern={"[": 1}), InvalidAdapter, r"'\['"),
    "a pattern that recurses": (lambda f: with_config(f, alpha_pattern={"(?R)": 1}), InvalidAdapter, r"\(\?R\)"),
    "another rank": (lambda f: with_config(f, r=8), InvalidAdapter, f"'{Q}' has rank 4, but .* has 8"),
    "another rank for one": (lambda f: with_config(f, rank_pattern={"k_proj": 2}), InvalidAdapter, "k_proj.* rank 4"),
    "a pickle": (lambda f: (f[0], pickle.dumps({"a": 1})), InvalidAdapter, "pickle"),
    "an archive of pickles": (lambda f: (f[0], b"PK\x03\x04" + bytes(100)), InvalidAdapter, "pickle"),
    "something else": (lambda f: (f[0], b"GGUF" + bytes(100)), InvalidAdapter, "not a safetensors file"),
    "nothing": (lambda f: (f[0], b""), InvalidAdapter, "not a safetensors file"),
    "half a file": (lambda f: (f[0], f[1][: len(f[1]) // 2]), InvalidAdapter, "not a safetensors file"),
    "half a header": (lambda f: (f[0], f[1][:100]), InvalidAdapter, "not a safetensors file"),
    "no tensors": (lambda f: (f[0], save({})), InvalidAdapter, "no tensors"),
    "a NaN": (lambda f: with_tensor(f, A, filled(float("nan"))), InvalidAdapter, f"{A}' has NaN or infinite"),
    "an infinity": (lambda f: with_tensor(f, A, filled(float("-inf"))), InvalidAdapter, f"{A}' has NaN or infinite"),
    "whole numbers": (lambda f: with_tensor(f, A, torch.ones(4, 32, dtype=torch.int32)), InvalidAdapter, "int32"),
    "another width": (lambda f: with_tensor(f, A, filled(1, (4, 31))), WrongBase, f"'{Q}' of the base maps 32 to 32"),
    "another height": (lambda f: with_tensor(f, B, filled(1, (33, 4))), WrongBase, f"'{Q}' of the base maps 32 to 32"),
    "another module": (
        lambda f: with_tensor(f, "base_model.model.h.9.lora_A.weight", filled(1)), WrongBase, "'h.9'"
    ),
    "a tensor that is no factor": (lambda f: with_tensor(f, "extra", filled(1)), UnsupportedAdapter, "'extra'"),
    "A without B": (lambda f: with_tensor(f, B, None), InvalidAdapter, f"'{Q}' has only lora_A"),
    "B without A": (lambda f: with_tensor(f, A, None), InvalidAdapter, f"'{Q}' has only lora_B"),
    "A twice": (
        lambda f: with_tensor(f, A.removeprefix("base_model.model."), filled(1)), InvalidAdapter, "more than one lora_A"
    ),
    "A and B of different ranks": (lambda f: with_tensor(f, B, filled(1, (32, 5))), InvalidAdapter, "do not fit"),
    "a flat A": (lambda f: with_tensor(f, A, torch.ones(128)), InvalidAdapter, "do not fit"),
    "ranks of zero": (
        lambda f: with_tensor(with_tensor(f, A, torch.ones(0, 32)), B, torch.ones(32, 0)), InvalidAdapter, "rank 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_malformed_is_refused_and_the_place_named(case: str, good: Files, base: Base) -> None:
    spoil, error, message = MALFORMED[case]
    with pytest.raises(error, match=message) as caught:
        encode(spoil(good), base)
    assert type(caught.value) is error


@pytest.mark.parametrize(("text", "message"), [(b"{", "not JSON"), (b"\xff", "not JSON"), (b"[1]", "not a list")])
def test_a_config_that_is_not_a_json_object_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InvalidAdapter, match=message):
        peft.read_config(text)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a": ' * 100_000])
def test_a_very_deep_config_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidAdapter, match="not JSON"):
        peft.read_config(text)


def test_a_config_too_large_for_a_blocks_header_is_refused() -> None:
    with pytest.raises(InvalidAdapter, match="at most"):
        peft.read_config(b'{"a": "' + b"x" * 2**20 + b'"}')


def test_an_adapter_exported_for_another_base_is_refused(good: Files, base: Base) -> None:
    weights = save(load(good[1]), metadata={peft.FINGERPRINT_KEY: "0123456789abcdef"})
    with pytest.raises(WrongBase, match="0123456789ab"):
        encode((good[0], weights), base)


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float16, 4e5), (torch.bfloat16, 1e9)])
def test_numbers_that_overflow_with_their_scale_folded_in_are_refused(
    dtype: torch.dtype, alpha: float, good: Files, base: Base
) -> None:
    large = torch.full((32, 4), 1e31 if dtype is torch.bfloat16 else 1.0)
    with pytest.raises(InvalidAdapter, match=f"does not fit into {dtype}"):
        encode(with_tensor(with_config(good, lora_alpha=alpha), B, large), base, dtype)


BOMBS = {
    "backtracking": "(.*)" * 8 + r"\3\4\5\6\7\8\9[^j]",
    "counted": "((a{65535}){65535}){65535}",
    "nested": "(" * 120 + "a" + ")*" * 120,
    "long": "a?" * 100_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_regex_bomb_ends_quickly(bomb: str, good: Files, base: Base) -> None:
    started = time.monotonic()
    with contextlib.suppress(InvalidAdapter):
        encode(with_config(good, alpha_pattern={BOMBS[bomb]: 1}), base)
    assert time.monotonic() - started < 15


# -- what has no effect


def test_no_effect_names_the_modules_whose_delta_is_zero(good: Files, base: Base) -> None:
    zero_b = with_tensor(good, B, torch.zeros(32, 4))
    assert list(peft.no_effect(encode(good, base))) == []
    assert list(peft.no_effect(encode(zero_b, base))) == [Q]
    assert list(peft.no_effect(encode(with_tensor(good, A, torch.zeros(4, 32)), base))) == [Q]


def test_a_fresh_adapter_of_pefts_has_no_effect(model: PreTrainedModel, base: Base, tmp_path: Path) -> None:
    wrapped = peft_model(model, target_modules=["q_proj"])
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    block = encode(saved(wrapped, tmp_path), base)
    assert list(peft.no_effect(block)) == [t.name for t in block.meta.layout.targets]
