"""The block file: one version of one adapter on disk.

It is a valid safetensors file. Its first tensor, `block`, is the payload, starting on a page boundary, so that a
swap-in is one positioned read into the memory it is used from. The metadata say which base it belongs to, the targets,
the rank, and the PEFT configuration to hand back. An imported adapter that 16 bits or the folded scale would not give
back bit for bit also keeps its original tensors, after the payload; serving never reads them.

The digest covers metadata, payload and originals; the file is named by it. Source of the container format: safetensors
(an 8-byte little-endian length, a JSON header that may be padded with blanks, then the tensors).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from adapterhub.errors import BlockDamaged
from adapterhub.swap.files import write_durably
from adapterhub.swap.layout import Layout, Target

FORMAT = "adapterhub.block.v1"
SUFFIX = ".block"
PAGE = 4096
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 32 * 1024**2
_CHUNK = 1024**2
_ALIKE = 64  # different layouts, with their ranks and scales, that are kept


@dataclass(frozen=True)
class BlockMeta:
    """What a block file says of itself, besides its numbers."""

    fingerprint: str  # of the base it belongs to
    rank: int  # the largest of its modules; smaller ones are padded with zeros
    layout: Layout
    ranks: tuple[int, ...]  # each target's own rank, in the layout's order
    scales: tuple[float, ...]  # what was folded into each B
    config: dict[str, Any]  # PEFT's adapter_config.json
    dtype: torch.dtype
    owner: str = ""  # whose it is: the same numbers of two owners are two blocks; none in old files

    @property
    def nbytes(self) -> int:
        return self.layout.numel(self.rank) * self.dtype.itemsize

    @property
    def json(self) -> str:
        """The canonical text that the digest covers. Not kept: there are as many of these as blocks in memory."""
        targets = [
            [t.name, t.n_in, t.n_out, rank, scale]
            for t, rank, scale in zip(self.layout.targets, self.ranks, self.scales, strict=True)
        ]
        fields = {
            "base": self.fingerprint,
            "config": self.config,
            "dtype": DTYPE_NAMES[self.dtype],
            "rank": self.rank,
            "targets": targets,
        }
        if self.owner:
            fields["owner"] = self.owner
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> BlockMeta:
        fields = json.loads(text)
        layout, ranks, scales = _parse_targets(json.dumps(fields["targets"]))
        return cls(
            fingerprint=fields["base"],
            rank=fields["rank"],
            layout=layout,
            ranks=ranks,
            scales=scales,
            config=fields["config"],
            dtype=DTYPES[fields["dtype"]],
            owner=fields.get("owner", ""),
        )


@lru_cache(_ALIKE)
def _parse_targets(text: str) -> tuple[Layout, tuple[int, ...], tuple[float, ...]]:
    """Layout, ranks and scales; of blocks that are alike in these, as those of thousands of adapters are, they are in
    memory once."""
    targets = json.loads(text)
    layout = Layout(tuple(Target(name, n_in, n_out) for name, n_in, n_out, _, _ in targets))
    return layout, tuple(t[3] for t in targets), tuple(t[4] for t in targets)


@dataclass(frozen=True)
class Block:
    """An adapter in memory: what it says of itself and its flat payload [rank * width]; `source` holds the tensors
    it was imported from where the payload alone would not give them back."""

    meta: BlockMeta
    payload: torch.Tensor
    source: Mapping[str, torch.Tensor] | None = None

    def of_owner(self, owner: str) -> Block:
        """The same as `owner`'s, with a digest of its own: by one that it shared with another owner's, and by where the
        block then is, each could tell that somebody has the very same adapter."""
        return replace(self, meta=replace(self.meta, owner=owner))

    @cached_property
    def source_bytes(self) -> bytes:
        return save_safetensors(dict(self.source)) if self.source else b""

    @cached_property
    def digest(self) -> str:
        return _digest(self.meta, self.payload, hashlib.sha256(self.source_bytes).hexdigest())


@dataclass(frozen=True)
class BlockHeader:
    """An open look at a block file: enough to read its payload straight into place."""

    meta: BlockMeta
    digest: str
    payload_at: int  # bytes from the start of the file
    source_at: int | None
    source_digest: str


def write_block(block: Block, directory: Path) -> Path:
    """Writes `block` as `directory/<digest>.block`, synced before it has its name. Returns the path.

    A file of that name is replaced: it holds the same block, unless it was damaged, and then this mends it.
    Raises StorageFull when there is no room; nothing is left behind then.
    """
    path = block_path(directory, block.digest)
    write_durably(path, *block_chunks(block))
    return path


def block_chunks(block: Block) -> tuple[bytes | memoryview, ...]:
    """What a block's file consists of, one after the other."""
    payload, source = _bytes(block.payload), block.source_bytes
    tensors: dict[str, Any] = {
        "block": {
            "dtype": DTYPE_NAMES[block.meta.dtype],
            "shape": [block.payload.numel()],
            "data_offsets": [0, len(payload)],
        }
    }
    if source:
        end = len(payload) + len(source)
        tensors["source"] = {"dtype": "U8", "shape": [len(source)], "data_offsets": [len(payload), end]}
    metadata = {
        "format": FORMAT,
        "digest": block.digest,
        "meta": block.meta.json,
        "source_digest": hashlib.sha256(source).hexdigest(),
    }
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    header += b" " * (-(8 + len(header)) % PAGE)
    return len(header).to_bytes(8, "little"), header, payload, source


def block_path(directory: Path, digest: str) -> Path:
    return directory / f"{digest}{SUFFIX}"


def read_header(file: BinaryIO, path: Path) -> BlockHeader:
    """Reads and checks the header of an open block file. Raises BlockDamaged."""
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"its header claims {length} bytes")
        header = json.loads(os.pread(file.fileno(), length, 8))
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}, not {FORMAT!r}")
        meta = BlockMeta.parse(metadata["meta"])
        begin, end = header["block"]["data_offsets"]
        if (begin, end) != (0, meta.nbytes):
            raise ValueError(f"its payload has {end - begin} bytes where its layout needs {meta.nbytes}")
        source = header.get("source")
        whole = source["data_offsets"][1] if source else end
        if size != 8 + length + whole:
            raise ValueError(f"it has {size} bytes instead of {8 + length + whole}")
        source_at = 8 + length + end if source else None
        return BlockHeader(meta, metadata["digest"], 8 + length, source_at, metadata["source_digest"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged(path, f"its header is not whole ({error})") from error


def read_payload(file: BinaryIO, path: Path, header: BlockHeader, out: torch.Tensor) -> None:
    """Reads the payload into `out`, a contiguous CPU tensor of the block's size: one read, no copy in between."""
    view = memoryview(_bytes(out))
    done = 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], header.payload_at + done)
        if count == 0:
            raise damaged(path, "it ends in the middle of its payload")
        done += count


def check_digest(path: Path, header: BlockHeader, payload: torch.Tensor, named: str) -> None:
    """Raises BlockDamaged unless the numbers are the ones that the file's name and header promise."""
    found = _digest(header.meta, payload, header.source_digest)
    if not found == header.digest == named:
        raise _other_digest(path, found)


def read_block(path: Path) -> Block:
    """The whole file, checked: meta, payload, and the source tensors where it keeps them. Raises BlockDamaged."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    with file:
        return read_open_block(file, path)


def read_open_block(file: BinaryIO, path: Path) -> Block:
    """`read_block` of a file that is open already, `path` being its name."""
    header = read_header(file, path)
    payload = torch.empty(header.meta.layout.numel(header.meta.rank), dtype=header.meta.dtype)
    read_payload(file, path, header, payload)
    check_digest(path, header, payload, path.stem)
    source = None
    if header.source_at is not None:
        file.seek(header.source_at)
        stored = file.read()
        if hashlib.sha256(stored).hexdigest() != header.source_digest:
            raise _other_source(path)
        source = load_safetensors(stored)
    return Block(header.meta, payload, source)


def verify_block(file: BinaryIO, path: Path) -> None:
    """Raises BlockDamaged unless all of an open file is what its name, `path`, promises; holds little of it at once."""
    header = read_header(file, path)
    digest = _start_digest(header.meta, header.source_digest)
    file.seek(header.payload_at)
    left = header.meta.nbytes
    while left and (chunk := file.read(min(left, _CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    if not digest.hexdigest() == header.digest == path.stem:
        raise _other_digest(path, digest.hexdigest())
    if header.source_at is not None:
        source = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            source.update(chunk)
        if source.hexdigest() != header.source_digest:
            raise _other_source(path)


def damaged(path: Path, reason: str) -> BlockDamaged:
    return BlockDamaged(
        f"The stored adapter {path.stem[:12]} cannot be read: {reason}. Import or train it again; other adapters are "
        "not affected."
    )


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _other_digest(path: Path, found: str) -> BlockDamaged:
    return damaged(path, f"its digest is {found[:12]}, not {path.stem[:12]}")


def _other_source(path: Path) -> BlockDamaged:
    return damaged(path, "the tensors it was imported from do not match their digest")


def _digest(meta: BlockMeta, payload: torch.Tensor, source_digest: str) -> str:
    digest = _start_digest(meta, source_digest)
    digest.update(_bytes(payload))
    return digest.hexdigest()


def _start_digest(meta: BlockMeta, source_digest: str) -> hashlib._Hash:
    return hashlib.sha256(f"{meta.json}\n{source_digest}\n".encode())
