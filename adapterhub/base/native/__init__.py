"""Native code for CPUs: one decoder step of the Llama family in one call, and its operations for other models.

C++ with a C interface, built when it is first needed with whatever compiler is there, and kept in the user's cache
under a name made of the source, the compiler and the flags. Without a compiler the torch path serves, with one warning.

The instructions are chosen when it runs: AMX, AVX-512 BF16, or portable code that the compiler vectorizes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch

from adapterhub.config import cache_dir
from adapterhub.errors import StorageFull
from adapterhub.swap.files import becoming

log = logging.getLogger(__name__)
SOURCE = Path(__file__).parent
_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fassociative-math", "-fno-signed-zeros", "-w",
]  # fmt: skip
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_SECONDS = 300


class Isa(IntEnum):
    PORTABLE = 0
    AVX512 = 1
    AMX = 2


class _Status(ctypes.c_int):
    """What a function returns that takes memory to work in: 0, or 1 where it had none."""


def _check(status: _Status, function: Any, arguments: Any) -> None:
    """Raises torch.OutOfMemoryError."""
    if status.value:
        raise torch.OutOfMemoryError("There is no memory left for the native code to work in")


@cache
def library() -> ctypes.CDLL | None:
    """The built library, or None where it cannot be built; the reason is logged once."""
    try:
        return _declare(_loaded())
    except (OSError, StorageFull, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("Native kernels are off, which makes serving on a CPU several times slower: %s", detail)
        return None


@cache
def best_isa() -> Isa:
    """What this processor can do."""
    built = library()
    assert built is not None
    return Isa(built.adapterhub_best_isa())


def _loaded() -> ctypes.CDLL:
    compiler = _compiler()
    path = _place(compiler)
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            log.info("%s is damaged (%s), and is built again", path, error)
    _build(compiler, path)
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    """The command: CXX may have arguments, such as the compiler of a launcher."""
    command = shlex.split(os.environ.get("CXX", "")) or list(filter(None, map(shutil.which, _COMPILERS)))[:1]
    if not command:
        raise OSError(f"no C++ compiler found ({', '.join(_COMPILERS)}). Install one, such as the package g++.")
    return command


def _place(compiler: list[str]) -> Path:
    """Where the library that it builds is kept."""
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=_BUILD_SECONDS).stdout
    key = hashlib.sha256(repr((version, _FLAGS)).encode())
    for source in sorted(SOURCE.glob("*.h")) + sorted(SOURCE.glob("*.cpp")):
        key.update(source.read_bytes())
    return cache_dir() / "native" / f"adapterhub-{key.hexdigest()[:24]}.so"


def _build(compiler: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with becoming(path) as partial:
        command = [*compiler, *_FLAGS, "-o", str(partial), *map(str, sorted(SOURCE.glob("*.cpp")))]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)


def _declare(built: ctypes.CDLL) -> ctypes.CDLL:
    integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    for name, result, arguments in (
        ("best_isa", integer, []),
        ("decoder", pointer, [integer, integer]),
        ("decoder_free", None, [pointer]),
        ("step", _Status, [pointer, pointer, pointer]),
        ("linear", _Status, [integer, pointer, pointer, integer, pointer]),
        ("expand", None, [pointer, integer, integer, pointer]),
        ("lora", None, [integer, pointer, pointer, integer, integer, pointer, integer, pointer, integer]),
        ("attention", _Status, [integer] * 5 + [number] + [pointer] * 6 + [integer, integer, pointer]),
        ("learner", pointer, [integer, integer]),
        ("learner_free", None, [pointer]),
        ("learner_memory", ctypes.c_int64, [pointer, pointer]),
        ("learn", _Status, [pointer, pointer, pointer, integer, integer]),
    ):
        function = getattr(built, f"adapterhub_{name}")
        function.restype, function.argtypes = result, arguments
        if result is _Status:
            function.errcheck = _check
    return built
