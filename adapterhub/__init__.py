"""AdapterHub: one resident base model, one LoRA adapter per user, swapped in per request."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("adapterhub")
except PackageNotFoundError:  # run from a checkout on PYTHONPATH, as the GPU check does
    __version__ = "0.0.0+checkout"
