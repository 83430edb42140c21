"""Random adapters written straight into a data directory before its server starts: thousands in a minute."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from unittest import mock

from random_blocks import random_block

from adapterhub.api.hub import ADMIN_OWNER
from adapterhub.config import Config
from adapterhub.swap.database import Database
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.registry import Registry, Version
from benchmarks.server import base, chosen

_SIZE = 0.02  # the deviation of the numbers: enough to change an answer
_TOGETHER = 500  # adapters in one transaction


def publish(data: Path, indices: Iterable[int], ranks: Sequence[int], targets: Sequence[str] = ()) -> list[Version]:
    """Adapters of the server's admin, on the linears of these names; the one of index i has the rank
    ranks[i % len(ranks)].

    The files are synced together at the end instead of one by one: nobody needs them if this process dies.
    """
    config = Config(data_dir=data)
    database = Database(config.database)
    registry = Registry(database, DiskTier(config.blobs_dir))
    layout, made, left = chosen(targets), [], list(indices)
    with mock.patch("os.fsync"):
        while left:
            with database.transaction():
                for i in left[:_TOGETHER]:
                    block = random_block(base(), layout, ranks[i % len(ranks)], i, _SIZE)
                    made.append(registry.publish(ADMIN_OWNER, f"a{i}", block, base().name, "import"))
            left = left[_TOGETHER:]
    database.close()
    os.sync()
    return made
