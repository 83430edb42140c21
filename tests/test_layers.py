"""Which way the arrows between the folders go, read from the files themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adapterhub

ROOT = Path(adapterhub.__file__).parent
LAYERS = ["core", "swap", "base", "train", "api", "cli"]  # a lower one never imports an upper one
# What each layer may import besides the standard library and those below it.
PACKAGES = {
    "core": set(),
    "swap": {"fsspec", "numpy", "regex", "safetensors", "sortedcontainers", "sqlite_utils", "torch"},
    "base": {"jinja2", "llguidance", "numpy", "pynvml", "tokenizers", "torch", "transformers", "triton"},
    "train": {"numpy", "safetensors", "sqlite_utils", "torch"},
}
FILES = sorted(ROOT.rglob("*.py"))


def layer_of(module: str) -> str:
    """`adapterhub.swap.block` -> swap; modules outside of the folders are core, but for the command line's."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in LAYERS else "cli" if part == "__main__" else "core"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; `from a import b` counts as `a.b` when that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = ROOT.parent / Path(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_a_lower_layer_never_imports_an_upper_one(path: Path) -> None:
    own = LAYERS.index(layer_of(module_of(path)))
    upper = {m for m in imports_of(path) if m.split(".")[0] == "adapterhub" and LAYERS.index(layer_of(m)) > own}
    assert not upper, f"{module_of(path)} imports {upper}"


@pytest.mark.parametrize("layer", PACKAGES)
def test_a_layer_needs_only_the_packages_it_is_meant_to(layer: str) -> None:
    used = {
        module.split(".")[0]
        for path in FILES
        if layer_of(module_of(path)) == layer
        for module in imports_of(path)
        if module.split(".")[0] not in {"adapterhub", *sys.stdlib_module_names}
    }
    assert used <= PACKAGES[layer]


def test_every_layer_is_there_and_says_what_it_is() -> None:
    for layer in LAYERS[1:]:
        assert ast.get_docstring(ast.parse((ROOT / layer / "__init__.py").read_text())), layer


def test_what_decides_knows_neither_torch_nor_the_database() -> None:
    decide = [*(ROOT / "swap" / "policies").glob("*.py")]
    decide += [ROOT / "swap" / f"{name}.py" for name in ("allocator", "windows", "room", "space", "residency", "ref")]
    for path in decide:
        packages = {m.split(".")[0] for m in imports_of(path)} - sys.stdlib_module_names
        assert packages <= {"adapterhub", "sortedcontainers"}, path
        inner = {m for m in imports_of(path) if m.startswith("adapterhub.")}
        allowed = {module_of(p) for p in decide} | {"adapterhub.errors", "adapterhub.swap.policies"}
        assert inner <= allowed, path


WITHOUT_WEB = """
import pkgutil, sys
for name in ("fastapi", "starlette", "uvicorn", "python_multipart"):
    sys.modules[name] = None  # importing it raises ImportError
import importlib
for package in ("adapterhub.swap", "adapterhub.base", "adapterhub.train"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_swap_base_and_train_import_without_a_web_framework() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_WEB], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert {"adapterhub.swap.tiers", "adapterhub.base.engine", "adapterhub.train.cotrainer"} <= set(run.stdout.split())


COMMAND_LINE = """
import importlib, pkgutil, sys
from adapterhub import cli
print(*sys.modules)
for module in pkgutil.iter_modules(cli.__path__, cli.__name__ + "."):
    importlib.import_module(module.name)
print(*sys.modules)
"""


def test_the_command_line_imports_nothing_heavy_before_a_command_needs_it() -> None:
    run = subprocess.run([sys.executable, "-c", COMMAND_LINE], capture_output=True, text=True, check=True)
    started, described = map(set, map(str.split, run.stdout.splitlines()))
    assert {"adapterhub.cli.adapters", "adapterhub.cli.policy", "adapterhub.cli.keys"} <= described - started
    heavy = {"torch", "transformers", "numpy", "sqlite_utils", "fastapi", "httpx", "importlib.metadata"}
    assert not described & heavy
