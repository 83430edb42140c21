"""The object store: whole block files by digest, behind fsspec (`s3://`, `gs://`, `az://`, `file://`, ...).

A block is the object `PREFIX/SERVER/<digest>.block`, SERVER being the id in that server's database: servers that are
given the same prefix never see, and so never delete, each other's objects. Credentials, endpoints and timeouts are the
driver's to read, from its own environment or from fsspec's configuration files. What comes back is checked by whoever
asked for it (`swap/disk.py`): a store may be cut off, slow, or wrong.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from adapterhub.errors import BadRequest, HubError, StorageFull, Unavailable
from adapterhub.swap.block import SUFFIX
from adapterhub.swap.files import FULL, PARTIAL, stream_durably
from adapterhub.swap.threads import settle

log = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK = 1024**2
PAUSES = (0.1, 0.4, 1.6)  # seconds between attempts, each times 0.5 to 1.5; then it is Unavailable
PATIENCE_SECONDS = 60.0  # for a driver that gives no sign, and a second more for each so many bytes on their way:
_SLOWEST_BYTES = 256 * 1024
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
MOST_ASTRAY = 64  # attempts that hang: as long as there are so many, a store is asked once in its patience
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)


class StoreUnavailable(Unavailable):
    code = "store_unavailable"

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": "5"}


class StoredObject(NamedTuple):
    digest: str
    nbytes: int


class Store:
    """Safe to use from any thread, as fsspec's drivers are.

    Every method may raise StoreUnavailable, after a few attempts, when the store cannot be reached or refuses, or when
    its driver hangs. What was given up on may still happen: while an upload may, its object is not deleted. A deletion
    is never given up on, as it might come after the object has been uploaded anew; it ends with `close` at the latest.
    """

    def __init__(
        self,
        fs: fsspec.AbstractFileSystem,
        prefix: str,
        url: str = "",
        pauses: tuple[float, ...] = PAUSES,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """Blocks go under `prefix`, a path of `fs`. `url` is what operators know the store by."""
        self.url = url or f"{fs.protocol}:{prefix}"
        self._fs = fs
        self._prefix = prefix.rstrip("/")
        self._pauses, self._patience = pauses, patience
        self._astray: dict[Future[Any], str] = {}  # attempts that were given up on but have not ended; of which digests
        self._given_up = 0.0  # when the last one was, by `time.monotonic`
        self._closed: Future[None] = Future()
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
        self._flat = not protocols.isdisjoint(_EXTRAS)  # it has no directories

    @classmethod
    def open(cls, url: str, server: str, outside: Path) -> Store:
        """Reaches nothing yet. Raises BadRequest for a URL that is none, a driver that is not installed, or a directory
        within `outside`, the server's own."""
        fs, path = _connect(url)
        if isinstance(fs, LocalFileSystem) and Path(path).resolve().is_relative_to(outside.resolve()):
            raise BadRequest(f"The store {url} lies in the server's own data directory. Choose a place outside of it.")
        return cls(fs, f"{path.rstrip('/')}/{server}", url.rstrip("/"))

    def create(self) -> None:
        """Makes the directory for the blocks, where a store has directories. Where it is missing later, the store is
        gone, such as a file system that is not mounted, and not merely empty."""
        if isinstance(self._fs, LocalFileSystem):
            self._try("creation", "", lambda: self._fs.makedirs(self._prefix, exist_ok=True))

    def put(self, digest: str, path: Path) -> None:
        """Uploads the file. When it returns, the store holds all of it.

        Raises StorageFull when the store has no room.
        """
        size = path.stat().st_size

        def upload() -> None:
            if isinstance(self._fs, LocalFileSystem):  # which would neither sync nor rename
                stream_durably(Path(self._key(digest)), _chunks(path))
            else:
                self._put_file(path, digest)
            if (found := self._size(digest)) != size:
                raise OSError(errno.EIO, f"it says that the object has {found} bytes instead of {size}")

        self._try("upload", digest, upload, size)

    def get(self, digest: str, partial: Path, nbytes: int) -> bool:
        """Downloads the object, of about so many bytes, as the file `partial`; False when there is none. Raises
        StorageFull when this machine's disk is full."""

        def download() -> bool:
            try:
                self._fs.get_file(self._key(digest), str(partial))
            except FileNotFoundError:
                self._check_there()
                return False
            return True

        return self._try("download", digest, download, nbytes)

    def size(self, digest: str) -> int | None:
        """Bytes of the object, as the store says; None when there is none."""
        return self._try("look-up", digest, lambda: self._size(digest))

    def delete(self, digest: str) -> None:
        """Deletes the object. One that is not there is none to delete."""

        def remove() -> None:
            if digest in self._astray.copy().values():
                raise _Hangs("an upload that was given up on may still come")
            try:
                self._fs.rm_file(self._key(digest))
            except FileNotFoundError:
                self._check_there()

        self._try("deletion", digest, remove, None)

    def list(self) -> list[StoredObject]:
        """Every block of this server's; anything else under its prefix is not looked at."""
        return self._try("listing", "", lambda: [*self._list()])

    def partials(self) -> set[str]:
        """Digests of which uploads that were cut off, or are under way, have left something, where an object is not
        whole or absent by itself."""
        if isinstance(self._fs, LocalFileSystem):
            return {path.name.partition(SUFFIX)[0] for path in Path(self._prefix).glob(f"*{PARTIAL}")}
        return set()

    def remove_partials(self, digest: str) -> None:
        """For whoever holds the digest, so that nobody uploads it."""
        for path in Path(self._prefix).glob(f"{digest}{SUFFIX}.*{PARTIAL}"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Whoever waits for the store is told that the server stops; so is whoever asks later."""
        with suppress(InvalidStateError):  # it was closed before
            self._closed.set_result(None)

    def _key(self, digest: str) -> str:
        return f"{self._prefix}/{digest}{SUFFIX}"

    def _check_there(self) -> None:
        """An object is missing: whether it is that alone."""
        if isinstance(self._fs, LocalFileSystem) and not Path(self._prefix).is_dir():
            raise NotADirectoryError(f"{self._prefix} is not there")

    def _put_file(self, path: Path, digest: str) -> None:
        try:
            self._fs.put_file(str(path), self._key(digest))
        except FileNotFoundError:
            if self._flat:  # then it is the bucket that is missing, and not ours to make
                raise
            self._fs.makedirs(self._prefix, exist_ok=True)
            self._fs.put_file(str(path), self._key(digest))

    def _size(self, digest: str) -> int | None:
        try:
            return int(self._fs.info(self._key(digest))["size"])
        except FileNotFoundError:
            self._check_there()
            return None

    def _list(self) -> Iterator[StoredObject]:
        try:
            found = self._fs.ls(self._prefix, detail=True)
        except FileNotFoundError:
            self._check_there()
            return
        for entry in found:
            name = str(entry["name"]).rpartition("/")[2]
            if entry["type"] == "file" and name.endswith(SUFFIX):
                yield StoredObject(name.removesuffix(SUFFIX), int(entry["size"]))

    def _try(self, what: str, digest: str, act: Callable[[], T], nbytes: int | None = 0) -> T:
        """`nbytes` are on their way, for which it takes its time; None: for ever."""
        for pause in (*self._pauses, None):
            try:
                return self._apart(act, digest, nbytes)
            except HubError:
                raise
            except Exception as error:  # whatever a driver raises; each has its own
                if isinstance(error, OSError) and error.errno in FULL:
                    raise StorageFull(f"There is no room for the {what} of this adapter. Tell the operator.") from error
                log.warning("store %s: %s of %s failed: %r", self.url, what, digest[:12] or "blocks", error)
                if pause is None or isinstance(error, (_Hangs, *_LASTING)):
                    raise StoreUnavailable(
                        f"The object store that keeps this server's adapters does not answer: its {what} failed with "
                        f"{type(error).__name__}. Try again in a minute; if it goes on, tell the operator."
                    ) from error
            time.sleep(pause * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _apart(self, act: Callable[[], T], digest: str, nbytes: int | None) -> T:
        """Waits for `act` on a thread of its own, which is left to itself when it hangs or the store is closed."""
        if len(self._astray) >= MOST_ASTRAY and time.monotonic() - self._given_up < self._patience:
            raise _Hangs(f"{len(self._astray)} attempts hang already")
        done: Future[T] = Future()
        if not self._closed.done():
            threading.Thread(target=settle, args=(done, act), name="adapterhub-store", daemon=True).start()
            either: list[Future[Any]] = [done, self._closed]
            patience = None if nbytes is None else self._patience + nbytes / _SLOWEST_BYTES
            wait(either, patience, FIRST_COMPLETED)
        if done.done():
            return done.result()
        if self._closed.done():
            raise Unavailable("The server is shutting down; try again.")
        self._given_up = time.monotonic()
        self._astray[done] = digest
        done.add_done_callback(self._astray.pop)
        raise _Hangs(f"no answer for {patience:.0f} s")


class _Hangs(TimeoutError):
    """An attempt was given up on; another would hang as well."""


def _connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    protocol, separator, rest = url.partition("://")
    if not separator or not rest.strip("/"):
        raise BadRequest(f"{url!r} is not a store. Write s3://BUCKET/PREFIX, file:///DIRECTORY or another fsspec URL.")
    try:
        # listings and objects change beneath a driver's caches
        return fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'adapterhub[{extra}]'" if extra else str(error)
        raise BadRequest(f"{protocol}:// needs a driver that is not installed: {error}. Do: {how}") from error
    except Exception as error:  # an unknown protocol, or whatever a driver has against the URL
        raise BadRequest(f"The store {url} cannot be used: {error}.") from error


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
