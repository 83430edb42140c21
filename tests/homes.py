"""A tiny base with two adapters, each also as its own library runs it, and a running engine for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from adapterhub.base.model import Base
from adapterhub.swap.ref import AdapterRef
from tests.tiny import Client, encoded, peft_model, saved, serving, serving_twin, stored, tiny_model


@dataclass
class Home:
    """`oracles` and `refs` are of the adapters; `model` is the base as its library runs it."""

    model: PreTrainedModel
    base: Base
    oracles: list[Any]
    refs: list[AdapterRef]
    directory: Path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    directory = tmp_path_factory.mktemp("home")
    model = tiny_model("llama")
    home = Home(model, serving_twin(model), [], [], directory)
    for seed in range(2):
        wrapped = peft_model(model, seed=seed, size=0.2)
        home.oracles.append(wrapped)
        home.refs.append(stored(encoded(saved(wrapped, directory / f"peft-{seed}"), home.base), directory / "blobs"))
    return home


@pytest.fixture
def client(home: Home) -> Iterator[Client]:
    with serving(home.base, home.directory) as client:
        yield client
