"""AdapterHub: one resident base model, one LoRA adapter per user, swapped in per request."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: the command line starts without the packages' metadata."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("adapterhub")
    except PackageNotFoundError:  # run from a checkout on PYTHONPATH, as the GPU check does
        return "0.0.0+checkout"
