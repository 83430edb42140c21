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
import shutil
import subprocess
import tempfile
from enum import IntEnum
from functools import cache
from pathlib import Path

from adapterhub.config import cache_dir

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


@cache
def library() -> ctypes.CDLL | None:
    """The built library, or None where it cannot be built; the reason is logged once."""
    try:
        return _declare(ctypes.CDLL(str(_built())))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("Native kernels are off, which makes serving on a CPU several times slower: %s", detail)
        return None


@cache
def best_isa() -> Isa:
    """What this processor can do."""
    built = library()
    assert built is not None
    return Isa(built.adapterhub_best_isa())


def _built() -> Path:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler found ({', '.join(_COMPILERS)}). Install one, such as the package g++.")
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=_BUILD_SECONDS).stdout
    key = hashlib.sha256(repr((version, _FLAGS)).encode())
    for source in sorted(SOURCE.glob("*.h")) + sorted(SOURCE.glob("*.cpp")):
        key.update(source.read_bytes())
    path = cache_dir() / "native" / f"adapterhub-{key.hexdigest()[:24]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as partial:
            made = Path(partial) / path.name
            command = [compiler, *_FLAGS, "-o", str(made), str(SOURCE / "decoder.cpp")]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)
            made.rename(path)
    return path


def _declare(built: ctypes.CDLL) -> ctypes.CDLL:
    integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    for name, result, arguments in (
        ("best_isa", integer, []),
        ("decoder", pointer, [integer, integer]),
        ("decoder_free", None, [pointer]),
        ("step", None, [pointer, pointer, pointer]),
        ("linear", None, [integer, pointer, pointer, integer, pointer]),
        ("expand", None, [pointer, integer, integer, pointer]),
        ("lora", None, [integer, pointer, pointer, integer, integer, pointer, integer, pointer, integer]),
        ("attention", None, [integer] * 5 + [number] + [pointer] * 6 + [integer, integer, pointer]),
    ):
        function = getattr(built, f"adapterhub_{name}")
        function.restype, function.argtypes = result, arguments
    return built
