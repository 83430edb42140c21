"""The block file: what is written comes back, what is not whole is told, and a full disk leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from adapterhub.errors import BlockDamaged
from adapterhub.swap.block import PAGE, Block, BlockMeta, block_path, read_block, read_header, write_block
from adapterhub.swap.layout import Layout, Target

LAYOUT = Layout((Target("model.q_proj", 6, 10), Target("model.k_proj", 6, 4), Target("model.o_proj", 10, 6)))


def make_block(
    *, seed: int = 0, rank: int = 3, dtype: torch.dtype = torch.bfloat16, source: dict[str, torch.Tensor] | None = None
) -> Block:
    count = len(LAYOUT.targets)
    meta = BlockMeta(
        fingerprint="f" * 64,
        rank=rank,
        layout=LAYOUT,
        ranks=(rank,) * count,
        scales=(1 / 3,) * count,
        config={"peft_type": "LORA", "r": rank, "note": 'ü "quoted"'},
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(seed)
    return Block(meta, torch.randn(LAYOUT.numel(rank), generator=generator).to(dtype), source)


ORIGINALS = {"a": torch.arange(7.0), "b": torch.ones(2, 3, dtype=torch.float16)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [None, ORIGINALS])
def test_what_was_written_comes_back(
    tmp_path: Path, dtype: torch.dtype, source: dict[str, torch.Tensor] | None
) -> None:
    block = make_block(dtype=dtype, source=source)
    path = write_block(block, tmp_path)
    assert path == block_path(tmp_path, block.digest)
    back = read_block(path)
    assert back.meta == block.meta
    assert torch.equal(back.payload, block.payload)
    assert back.digest == block.digest
    assert (back.source is None) == (source is None)
    for name, tensor in (source or {}).items():
        assert back.source is not None
        assert torch.equal(back.source[name], tensor)
    assert list(tmp_path.iterdir()) == [path]


def test_blocks_that_are_alike_keep_their_layout_once(tmp_path: Path) -> None:
    one, other, wider = (write_block(make_block(seed=i, rank=rank), tmp_path) for i, rank in enumerate((3, 3, 4)))
    first, second, third = (read_block(path).meta for path in (one, other, wider))
    assert first.layout is second.layout
    assert first.scales is second.scales
    assert (first.ranks, third.ranks) == ((3, 3, 3), (4, 4, 4))


@pytest.mark.parametrize("source", [None, ORIGINALS])
def test_the_file_is_a_safetensors_file(tmp_path: Path, source: dict[str, torch.Tensor] | None) -> None:
    block = make_block(source=source)
    with safe_open(write_block(block, tmp_path), framework="pt") as file:
        assert set(file.keys()) == ({"block"} if source is None else {"block", "source"})
        assert torch.equal(file.get_tensor("block"), block.payload)
        assert file.metadata()["digest"] == block.digest


def test_the_payload_starts_on_a_page_and_lies_in_one_piece(tmp_path: Path) -> None:
    block = make_block(source=ORIGINALS)
    path = write_block(block, tmp_path)
    with path.open("rb") as file:
        at = read_header(file, path).payload_at
    assert at % PAGE == 0
    assert path.read_bytes()[at : at + block.meta.nbytes] == block.payload.view(torch.uint8).numpy().tobytes()


def test_the_digest_names_meta_payload_and_originals() -> None:
    block = make_block()
    others = [
        make_block(seed=1),
        Block(dataclasses.replace(block.meta, fingerprint="0" * 64), block.payload),
        Block(dataclasses.replace(block.meta, scales=(0.5,) * 3), block.payload),
        Block(block.meta, block.payload, ORIGINALS),
        Block(block.meta, block.payload, {**ORIGINALS, "a": torch.ones(7)}),
    ]
    assert len({b.digest for b in [block, *others]}) == 1 + len(others)
    assert make_block().digest == block.digest


def test_writing_a_damaged_block_again_mends_it(tmp_path: Path) -> None:
    path = write_block(make_block(), tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BlockDamaged):
        read_block(path)
    assert write_block(make_block(), tmp_path) == path
    assert torch.equal(read_block(path).payload, make_block().payload)


# -- damage


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(BlockDamaged, match="No such file") as caught:
        read_block(tmp_path / "0123.block")
    assert str(tmp_path) not in caught.value.message, "the message is shown to users"


@pytest.mark.parametrize("source", [None, ORIGINALS])
def test_a_file_cut_off_anywhere_is_damage(tmp_path: Path, source: dict[str, torch.Tensor] | None) -> None:
    path = write_block(make_block(source=source), tmp_path)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 500, PAGE - 1, PAGE, PAGE + 1, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(BlockDamaged, match="Import or train it again"):
            read_block(path)


def test_a_file_with_more_at_its_end_is_damage(tmp_path: Path) -> None:
    path = write_block(make_block(), tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BlockDamaged):
        read_block(path)


@settings(max_examples=400)
@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), in_payload=st.booleans())
def test_a_flipped_byte_is_damage_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, where: float, mask: int, in_payload: bool
) -> None:
    directory = tmp_path_factory.getbasetemp() / "flips"
    directory.mkdir(exist_ok=True)
    block = make_block(source=ORIGINALS)
    path = write_block(block, directory)
    content = bytearray(path.read_bytes())
    begin, end = (PAGE, len(content)) if in_payload else (0, 1600)
    content[begin + int(where * (end - begin))] ^= mask
    path.write_bytes(content)
    try:
        back = read_block(path)
    except BlockDamaged:
        return
    assert not in_payload
    assert back.meta == block.meta
    assert torch.equal(back.payload, block.payload)
    assert back.source is not None
    assert all(torch.equal(back.source[k], v) for k, v in ORIGINALS.items())


def test_another_block_in_its_place_is_damage(tmp_path: Path) -> None:
    path = write_block(make_block(), tmp_path)
    shutil.copy(write_block(make_block(seed=1), tmp_path), path)
    with pytest.raises(BlockDamaged, match="digest"):
        read_block(path)


def test_other_originals_than_it_was_written_with_are_damage(tmp_path: Path) -> None:
    one = write_block(make_block(source={"a": torch.zeros(4)}), tmp_path)
    other = write_block(make_block(source={"a": torch.ones(4)}), tmp_path)
    assert one != other
    one.write_bytes(one.read_bytes()[:-1] + other.read_bytes()[-1:])
    with pytest.raises(BlockDamaged, match="imported from"):
        read_block(one)


def rewrite_header(path: Path, change: object) -> None:
    """Replaces the JSON header by `change(header)`, padded to the size it had."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length]))  # type: ignore[operator]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    assert len(text) <= length
    path.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])


def _without(header: dict, *keys: str) -> dict:
    *outer, last = keys
    place = header
    for key in outer:
        place = place[key]
    del place[last]
    return header


def _with_meta(header: dict, **changes: object) -> dict:
    meta = {**json.loads(header["__metadata__"]["meta"]), **changes}
    header["__metadata__"]["meta"] = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    return header


LIES = {
    "a larger payload": lambda h: {**h, "block": {**h["block"], "data_offsets": [0, 10_000_000]}},
    "a smaller payload": lambda h: {**h, "block": {**h["block"], "data_offsets": [0, 10]}},
    "a payload elsewhere": lambda h: {**h, "block": {**h["block"], "data_offsets": [2, 290]}},
    "offsets that are no numbers": lambda h: {**h, "block": {**h["block"], "data_offsets": ["0", "288"]}},
    "offsets that are missing": lambda h: {**h, "block": {**h["block"], "data_offsets": []}},
    "another rank": lambda h: _with_meta(h, rank=4),
    "a huge rank": lambda h: _with_meta(h, rank=10**15),
    "an unknown dtype": lambda h: _with_meta(h, dtype="I64"),
    "targets cut short": lambda h: _with_meta(h, targets=[["model.q_proj", 6]]),
    "no targets": lambda h: _with_meta(h, targets=[]),
    "another scale": lambda h: _with_meta(h, targets=[["model.q_proj", 6, 10, 3, 9.0]]),
    "another format": lambda h: {**h, "__metadata__": {**h["__metadata__"], "format": "adapterhub.block.v9"}},
    "no metadata": lambda h: _without(h, "__metadata__"),
    "no digest": lambda h: _without(h, "__metadata__", "digest"),
    "no digest of the originals": lambda h: _without(h, "__metadata__", "source_digest"),
    "no meta": lambda h: _without(h, "__metadata__", "meta"),
    "no block": lambda h: _without(h, "block"),
    "a list": lambda h: [],
    "something that is not JSON": lambda h: b"{",
    "something that is not text": lambda h: b"\xff\xfe",
    "very deep JSON": lambda h: b"[" * 1500,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_damage(tmp_path: Path, lie: str) -> None:
    path = write_block(make_block(), tmp_path)
    rewrite_header(path, LIES[lie])
    with pytest.raises(BlockDamaged):
        read_block(path)


@pytest.mark.parametrize("length", [0, 5000, 2**40, 2**64 - 1])
def test_a_header_that_claims_another_length_is_damage(tmp_path: Path, length: int) -> None:
    path = write_block(make_block(), tmp_path)
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(BlockDamaged):
        read_block(path)


# -- a full disk


FULL_DISK = """
import resource, sys
from pathlib import Path
from adapterhub.errors import StorageFull
from tests.test_block import make_block
from adapterhub.swap.block import write_block
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write_block(make_block(), Path(sys.argv[1]))
except StorageFull as error:
    print(error.message)
"""


@pytest.mark.parametrize("limit", [1, PAGE, PAGE + 10])
def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path: Path, limit: int) -> None:
    """The system itself refuses to let the file grow beyond `limit` bytes."""
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)], capture_output=True, text=True, check=True
    )
    assert "no room on the server's disk" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_block(make_block(), tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
