"""Brings the object store in line with the rows, in a thread of its own: deletes what no row names any more, uploads
what only the disk has (from before there was a store, or from another one). A store that does not answer holds up
nobody; what is left to do is done when it answers again, after a restart, too.
"""

from __future__ import annotations

import logging
import threading

from adapterhub.errors import HubError
from adapterhub.swap.blobs import Named
from adapterhub.swap.database import Database
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.objects import Objects, State
from adapterhub.swap.store import Store

log = logging.getLogger(__name__)
_SECONDS = 30.0  # between two looks at what is left to do, and at what was unused for too long


class Mirror:
    """`settle` is what the thread does, once, whenever there is something to do."""

    def __init__(self, database: Database, objects: Objects, disk: DiskTier, store: Store) -> None:
        self._database = database
        self._objects = objects
        self._disk = disk
        self._store = store
        self._lost: set[str] = set()  # named, but neither here nor there; said once
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="adapterhub-mirror", daemon=True)

    def start(self) -> None:
        """Raises Unavailable when a store that is new to this server cannot be made."""
        if not self._objects.any():
            self._store.create()
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True  # before the event, which the thread clears before it looks
        self._objects.to_do.set()
        if self._thread.is_alive():
            self._thread.join()

    def settle(self) -> None:
        """Raises Unavailable when the store does not answer; the rest is left for the next time."""
        for digest in self._store.partials():
            with self._disk.holding(digest):
                self._store.remove_partials(digest)
        for digest in self._objects.unnamed():
            if self._stopping:
                return
            with self._disk.holding(digest):  # a publish of the same block waits, or has named it by now
                if not self._named(digest):
                    self._store.delete(digest)
                    self._objects.deleted(digest)
        self._upload()

    def _upload(self) -> None:
        unsafe = [(digest, owner) for digest, owner in self._objects.unsafe() if digest not in self._lost]
        if not unsafe:
            return
        there = {found.digest: found.nbytes for found in self._store.list()}
        for digest, owner in unsafe:
            if self._stopping:
                return
            with self._disk.holding(digest):
                if not self._named(digest):
                    continue
                path = self._disk.files.path(digest)
                here = path.stat().st_size if path.exists() else None
                if here is None and digest not in there:
                    self._lost.add(digest)
                    log.error("block %s of %s is neither in %s nor in the store", digest[:12], owner, path.parent)
                    continue
                if here is not None and there.get(digest) != here:
                    self._objects.set(digest, State.UPLOADING)
                    self._disk.upload(digest)
                self._objects.set(digest, State.STORED)
                self._disk.files.settle([Named(digest, owner, safe=True)])

    def _named(self, digest: str) -> bool:
        return self._database.row("select 1 from versions where digest = ? limit 1", (digest,)) is not None

    def _loop(self) -> None:
        while not self._stopping:
            self._objects.to_do.clear()  # before the look: what comes now is seen, or sets it again
            try:
                self.settle()
            except HubError as error:
                log.warning("the store is not settled yet: %s", error)
            except Exception:
                log.exception("the store is not settled yet")
            self._disk.files.obey()
            self._objects.to_do.wait(_SECONDS)
