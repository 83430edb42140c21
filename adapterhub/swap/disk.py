"""The disk below the tiers in memory: where a block's file is, and reading it whole and checked, or failing clearly."""

from __future__ import annotations

from pathlib import Path

import torch

from adapterhub.errors import WrongBase
from adapterhub.swap.block import BlockMeta, block_path, check_digest, damaged, read_header, read_payload
from adapterhub.swap.ref import AdapterRef, Tier


class DiskTier:
    """The block files of one directory. `tier_of` is for the engine's thread and never waits; `path` and `read` are for
    reading threads."""

    def __init__(self, blobs: Path) -> None:
        self.blobs = blobs
        self._verified: set[str] = set()  # digests that were right, once per file and start

    def tier_of(self, digest: str) -> Tier:
        """Where a read would find the block."""
        return Tier.DISK

    def path(self, ref: AdapterRef) -> Path:
        return block_path(self.blobs, ref.digest)

    def read(self, ref: AdapterRef, out: torch.Tensor, fingerprint: str) -> BlockMeta:
        """Reads the payload into `out`, a contiguous CPU tensor of the block's size: one read, no copy in between.

        Raises BlockDamaged, or WrongBase when the block does not belong to the base of that fingerprint.
        """
        path = self.path(ref)
        try:
            file = path.open("rb", buffering=0)
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from error
        with file:
            header = read_header(file, path)
            if header.meta.fingerprint != fingerprint:
                raise WrongBase(
                    f"This adapter was made for base {header.meta.fingerprint[:12]}; this server runs base "
                    f"{fingerprint[:12]}. Start the server with the other base, or train the adapter again."
                )
            if header.meta.dtype != out.dtype or header.meta.nbytes != ref.nbytes:
                raise damaged(path, f"it holds {header.meta.nbytes} bytes of {header.meta.dtype}")
            read_payload(file, path, header, out)
        if ref.digest not in self._verified:
            check_digest(path, header, out, ref.digest)
            self._verified.add(ref.digest)
        return header.meta
