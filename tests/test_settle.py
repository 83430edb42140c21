"""A base's weights in one piece of memory."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from adapterhub.base.quantize import Precision, QuantizedLinear, quantize
from adapterhub.base.settle import settle
from adapterhub.swap.memory import HUGE_PAGE, streaming_memory
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_settling_changes_where_the_weights_lie_and_nothing_else(family: str) -> None:
    model = tiny_model(family)
    model.lm_head = QuantizedLinear(quantize(torch.randn(64, 64), Precision.INT4), None)
    before = copy.deepcopy(model).state_dict(keep_vars=True)
    settle(model)
    after = model.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len({tensor.untyped_storage().data_ptr() for tensor in model.parameters()}) == 1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_linears_that_read_the_same_input_lie_side_by_side(family: str) -> None:
    model = tiny_model(family)
    settle(model)
    attention = model.model.layers[0].self_attn
    weights = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
    for one, following in pairwise(weights):
        assert following.data_ptr() == one.data_ptr() + one.nbytes


def test_tied_weights_stay_tied() -> None:
    config = copy.deepcopy(FAMILIES["llama"])
    config.tie_word_embeddings = True
    model = tiny_model(config)
    settle(model)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("nbytes", [1, 4096, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_streaming_memory_can_be_written_from_end_to_end(nbytes: int) -> None:
    memory = streaming_memory(nbytes)
    memory.fill_(7)
    assert memory.shape == (nbytes,)
    assert memory.data_ptr() % HUGE_PAGE == 0
    assert bool((memory == 7).all())
