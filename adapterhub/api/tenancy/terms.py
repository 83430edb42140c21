"""The words that keys, usage and quotas go by, apart from their tables: who only names them needs no database."""

from __future__ import annotations

from enum import StrEnum

PROJECT = "default"  # of a key that is made without one
EVERYBODY = "*"  # whoever has no quota of that kind of their own


class Scope(StrEnum):
    """What a key may do."""

    INFER = "infer"  # ask models
    TRAIN = "train"  # upload, train, import, and change or delete what there is
    READ = "read"  # see and download what there is
    ADMIN = "admin"  # all under /admin


EVERYDAY = frozenset({Scope.INFER, Scope.TRAIN, Scope.READ})


class Group(StrEnum):
    """What a report of usage can tell apart."""

    DAY = "day"
    OWNER = "owner"
    PROJECT = "project"
    KEY = "key"
    ADAPTER = "adapter"
