"""What every test shares: no network, two threads, tiny bases that are made once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
import torch
from hypothesis import settings

from adapterhub.base.model import Base
from tests.homes import client, home  # noqa: F401  (fixtures)
from tests.serving import adapter, base_directory, base_model, other_adapter, server, user  # noqa: F401  (fixtures)
from tests.tiny import tiny_base

torch.set_num_threads(2)
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def llama() -> Base:
    """A tiny Llama with grouped key heads, prepared to serve. No test changes it."""
    return tiny_base("llama")
