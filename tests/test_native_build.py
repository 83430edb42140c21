"""The native library's way from its sources to this process, and serving where there is none."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapterhub.base import native
from adapterhub.base.native import library
from tests.tiny import encoded, full_logits, peft_model, prompt_of, saved, serving, serving_twin, stored, tiny_model

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Within a test the library is looked for as in a new process; after it, this process has its own again."""
    monkeypatch.delenv("CXX", raising=False)
    caplog.set_level(logging.INFO, native.__name__)
    library.cache_clear()
    yield
    monkeypatch.undo()
    library.cache_clear()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("family", ["llama", "gemma"])  # its whole step is native; its LoRA op and attention
@pytest.mark.usefixtures("asked_anew")
def test_without_a_compiler_the_torch_path_serves_with_one_warning(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    model = tiny_model(family).bfloat16()
    adapted = peft_model(model).bfloat16()
    base = serving_twin(model)
    ref = stored(encoded(saved(adapted, tmp_path / "peft"), base), tmp_path / "blobs")
    with serving(base, tmp_path) as client:
        for length in (5, 40):
            for oracle, adapter in ((model, None), (adapted, ref)):
                check(oracle, prompt_of(length), client.ask(prompt_of(length), adapter))
    assert warnings(caplog) == [
        "Native kernels are off, which makes serving on a CPU several times slower: no C++ compiler found (c++, g++, "
        "clang++). Install one, such as the package g++."
    ]


def check(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> None:
    """Greedy, as far as bf16 can tell: how much that moves a logit, the model's own forward says."""
    both = (copy.deepcopy(model).float(), model)
    exact, rounded = (full_logits(m, prompt + answer)[len(prompt) - 1 : -1].float() for m in both)
    chosen = exact.gather(1, torch.tensor(answer)[:, None])
    assert (exact.amax(1, keepdim=True) - chosen <= 4 * 2**0.5 * (rounded - exact).std()).all()


@needs_compiler
@pytest.mark.usefixtures("asked_anew")
def test_what_a_power_cut_left_of_the_library_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    best = native.best_isa()
    library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = native._place(native._compiler())
    path.parent.mkdir(parents=True)
    path.touch()
    built = library()
    assert built is not None
    assert built.adapterhub_best_isa() == best
    assert list(path.parent.iterdir()) == [path]
    assert warnings(caplog) == []


@needs_compiler
@pytest.mark.usefixtures("asked_anew")
def test_the_compiler_may_be_named_with_arguments(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "env c++")
    assert library() is not None
    assert warnings(caplog) == []


@pytest.mark.usefixtures("asked_anew")
def test_a_compiler_that_fails_is_told_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "sh -c 'test $0 = --version || { echo no room for it >&2; exit 1; }'")
    assert library() is None
    [warning] = warnings(caplog)
    assert warning.endswith("no room for it\n")
    assert list((tmp_path / "adapterhub" / "native").iterdir()) == []
