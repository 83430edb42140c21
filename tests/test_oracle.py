"""Mixed equals alone equals PEFT equals transformers' generate, on tiny random models of many families.

The oracles run on the model as transformers and PEFT have it; what is tested runs on a copy that was prepared to serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from adapterhub.base.model import Base
from adapterhub.base.scheduler import Work
from adapterhub.errors import BadRequest
from adapterhub.swap.ref import AdapterRef
from tests.tiny import (
    FAMILIES,
    GROUPED,
    SHAPE,
    VOCABULARY,
    WINDOW,
    Machine,
    encoded,
    full_logits,
    greedy,
    peft_model,
    prompt_of,
    saved,
    serving,
    serving_twin,
    stored,
    tiny_model,
)

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
LENGTHS = (1, 2, WINDOW, 31, 70)  # one token, a window, more than a step, more than several
STEP = 24  # tokens of a step in these tests


@dataclass
class Zoo:
    """A base with four users: no adapter (None), and three adapters of different ranks and targets."""

    base: Base
    oracles: list[Any]  # transformers' or PEFT's models
    refs: list[AdapterRef | None]
    directory: Path


def make_zoo(family: str | PreTrainedConfig, directory: Path, *, within: str = "") -> Zoo:
    """The adapters target linears whose name contains `within`."""
    model = tiny_model(family)
    base = serving_twin(model)
    linears = list(dict.fromkeys(t.name.rpartition(".")[2] for t in base.layout.targets if within in t.name))
    adapters: list[dict[str, Any]] = [
        {"r": 4, "target_modules": linears},
        {"r": 7, "lora_alpha": 5, "target_modules": linears[:2]},
        {"r": 1, "lora_alpha": 2, "use_rslora": True, "target_modules": linears[-1:], "layers_to_transform": [1]},
    ]
    zoo = Zoo(base, [model], [None], directory)
    for seed, config in enumerate(adapters):
        wrapped = peft_model(model, seed=seed, size=0.2, **config)
        zoo.oracles.append(wrapped)
        zoo.refs.append(stored(encoded(saved(wrapped, directory / f"peft-{seed}"), base), directory / "blobs"))
    return zoo


@pytest.fixture(scope="module", params=FAMILIES)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def machine(zoo: Zoo) -> Iterator[Machine]:
    machine = Machine(zoo.base, zoo.directory)
    yield machine
    machine.tiers.close()


def test_logits_of_each_adapter_alone_are_pefts(zoo: Zoo, machine: Machine) -> None:
    prompt = prompt_of(33)
    outcomes = []
    for oracle, ref in zip(zoo.oracles, zoo.refs, strict=True):
        outcomes.append(machine.logits(prompt, ref))
        torch.testing.assert_close(outcomes[-1], full_logits(oracle, prompt), **CLOSE)
    for i, one in enumerate(outcomes):  # and the adapters do change something
        assert all((one - other).abs().max() > 0.1 for other in outcomes[:i])


def test_logits_of_a_mixed_batch_are_those_of_each_alone(zoo: Zoo, machine: Machine) -> None:
    """Every user twice and out of order, with prompts of every length, and two of them in the middle of a prompt."""
    users = [3, 0, 1, 2, 1, 0, 3, 2]
    prompts = [prompt_of(length, seed) for seed, length in enumerate((33, 1, 20, 2, 47, 13, 5, 28))]
    sequences = [machine.sequence(p, zoo.refs[u]) for u, p in zip(users, prompts, strict=True)]
    begun = [machine.forward(Work(s, 9))[0] if s in (sequences[2], sequences[4]) else None for s in sequences]
    mixed = machine.forward(*(Work(s, s.pending) for s in sequences))
    for user, prompt, before, after in zip(users, prompts, begun, mixed, strict=True):
        whole = after if before is None else torch.cat([before, after])
        torch.testing.assert_close(whole, full_logits(zoo.oracles[user], prompt), **CLOSE)
    machine.release(*sequences)


def test_logits_do_not_depend_on_how_a_prompt_is_cut_into_chunks(zoo: Zoo, machine: Machine) -> None:
    prompt = prompt_of(30)
    expected = full_logits(zoo.oracles[1], prompt)
    for cuts in ((1,) * 30, (17, 1, 12), (16, 14), (29, 1)):
        sequence = machine.sequence(prompt, zoo.refs[1])
        chunks = [machine.forward(Work(sequence, count))[0] for count in cuts]
        torch.testing.assert_close(torch.cat(chunks), expected, **CLOSE)
        machine.release(sequence)


def test_the_engine_continues_as_generate_does_with_all_users_at_once(zoo: Zoo) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    with serving(zoo.base, zoo.directory, max_step_tokens=STEP, max_batch=6) as client:
        names = {
            (user, i): client.submit(f"{user}-{i}", prompt, ref, max_tokens=10)
            for i, prompt in enumerate(prompts)
            for user, ref in enumerate(zoo.refs)
        }
        for (user, i), name in names.items():
            assert client.tokens(name) == greedy(zoo.oracles[user], prompts[i], 10), (user, LENGTHS[i])


MORE: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(
        **GROUPED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, decoder_sparse_step=1
    ),
    "deepseek_v3": DeepseekV3Config(
        **SHAPE,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_group=1,
        topk_group=1,
    ),
    "gemma3": Gemma3TextConfig(
        **GROUPED, head_dim=16, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "dynamic rope": LlamaConfig(
        **GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    ),
}


@pytest.mark.parametrize("family", MORE)
def test_other_families_serve_right_too(family: str, tmp_path: Path) -> None:
    zoo = make_zoo(MORE[family], tmp_path, within="attn")  # PEFT takes an expert's gate_proj for a bare parameter
    prompt = prompt_of(45)
    with serving(zoo.base, tmp_path, max_step_tokens=STEP) as client:
        names = [client.submit(str(user), prompt, ref) for user, ref in enumerate(zoo.refs)]
        for oracle, name in zip(zoo.oracles, names, strict=True):
            assert client.tokens(name) == greedy(oracle, prompt, 8)


def test_a_multimodal_config_around_a_text_model_is_understood() -> None:
    from transformers import Gemma3Config, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = tiny_model(Gemma3Config(text_config=MORE["gemma3"].to_dict(), vision_config=vision, mm_tokens_per_image=4))
    base = serving_twin(model)
    assert base.context == 256
    assert not any("vision" in t.name for t in base.layout.targets)


# -- bases that cannot be served

REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "a recurrent model": (
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
        "2 layers, of which only 0 keep their state in attention",
    ),
    "a hybrid": (
        JambaConfig(**GROUPED, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4),
        "2 layers, of which only 1 keep their state in attention",
    ),
    "attention of its own": (
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "only 0 keep their state in attention",
    ),
    "attention sinks": (GptOssConfig(**GROUPED, num_local_experts=4, head_dim=8), "s_aux"),
    "chunked attention": (
        Llama4TextConfig(**GROUPED, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=16),
        "attends in chunks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_that_would_be_served_wrong_is_refused(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(BadRequest, match=message):
        serving_twin(tiny_model(config))


def test_a_longrope_base_stays_within_the_context_in_which_users_do_not_change_each_other() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **GROUPED, original_max_position_embeddings=64, rope_parameters={**rope, "original_max_position_embeddings": 64}
    )
    assert serving_twin(tiny_model(config)).context == 64


# -- what a base says of itself


def test_the_fingerprint_names_the_weights_whatever_their_precision() -> None:
    def fingerprint(model: PreTrainedModel) -> str:
        return serving_twin(model).fingerprint

    assert fingerprint(tiny_model("llama")) == fingerprint(tiny_model("llama"))
    assert fingerprint(tiny_model("llama")) == fingerprint(tiny_model("llama").bfloat16())
    assert fingerprint(tiny_model("llama")) != fingerprint(tiny_model("llama", seed=1))


def test_linears_that_read_the_same_input_are_neighbours(llama: Base) -> None:
    names = [t.name.rpartition(".")[2] for t in llama.layout.targets]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] * 2


def test_preparing_changes_no_parameter_and_no_name() -> None:
    model = tiny_model("llama")
    base = serving_twin(model)
    before, after = dict(model.named_parameters()), dict(base.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
