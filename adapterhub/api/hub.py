"""Everything a running server consists of, put together once and taken apart in order. No globals."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from adapterhub.api.devices import Devices
from adapterhub.api.erase import Eraser
from adapterhub.api.metrics import Metrics
from adapterhub.api.steering import Steering, with_saved
from adapterhub.api.storing import Storing
from adapterhub.api.tenancy.erasures import Erasures
from adapterhub.api.tenancy.keys import KeyStore
from adapterhub.api.tenancy.meter import Meter
from adapterhub.api.tenancy.once import Once
from adapterhub.api.tenancy.quotas import Limits, Quotas
from adapterhub.api.tenancy.rates import Rates
from adapterhub.api.tenancy.room import Room
from adapterhub.api.tenancy.underway import Changing, Underway
from adapterhub.api.tenancy.usage import Usage
from adapterhub.api.tracing import Tracing
from adapterhub.base.fleet import Fleet
from adapterhub.base.grammar import Grammars
from adapterhub.base.model import Base
from adapterhub.base.request import Output
from adapterhub.base.request import Request as EngineRequest
from adapterhub.base.text import TextCodec
from adapterhub.config import DISK_BYTES, Config
from adapterhub.errors import BadRequest, HubError, Unavailable
from adapterhub.swap.catalog import Catalog
from adapterhub.swap.database import Database
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.files import lock_directory
from adapterhub.swap.mirror import Mirror
from adapterhub.swap.objects import server_id
from adapterhub.swap.pins import PinnedBy
from adapterhub.swap.ref import Use
from adapterhub.swap.registry import Registry, Version
from adapterhub.swap.settings import Settings
from adapterhub.swap.store import Store
from adapterhub.swap.threads import settle
from adapterhub.swap.trace import Recorder
from adapterhub.swap.uses import Uses
from adapterhub.train.conductor import Conductor
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.files import FileStore
from adapterhub.train.jobs import JobStore, Status
from adapterhub.train.publish import Publisher
from adapterhub.train.starter import Starter
from adapterhub.train.uploads import UploadStore
from adapterhub.train.validator import Validator
from adapterhub.train.worker import Worker
from adapterhub.train.workspace import Workspaces

log = logging.getLogger(__name__)
Result = TypeVar("Result")
ADMIN_OWNER = "admin"
_GRACE_SECONDS = 5.0  # for what waits for the store when the server is told to stop


class Hub:
    """Opens the data directory, and an engine on each of `bases`, the same one loaded on several devices, or on one.

    Raises BadRequest when another server has the directory open."""

    def __init__(self, config: Config, *bases: Base) -> None:
        lock = lock_directory(config.data_dir)
        if lock is None:
            raise BadRequest(f"Another server is using {config.data_dir}. Stop it, or give --data-dir.")
        self._lock = lock
        self.base = base = bases[0]
        self.codec = TextCodec(base.tokenizer)
        self.grammars = Grammars(base.tokenizer, base.end_tokens, base.vocabulary)
        self.database = Database(config.database)
        settings = Settings(self.database)
        self.config = config = with_saved(config, settings)
        self.keys = KeyStore(self.database)
        self.underway = Underway(self.keys)
        self.changes = Changing()
        self.erasures = Erasures(self.database, self.keys)
        self.quotas = Quotas(self.database, _limits(config))
        self.rates = Rates(self.database, self.quotas)
        self.room = Room(self.database, self.quotas)
        self.usage = Usage(self.database)
        self.once = Once(self.database)
        self.files = FileStore(self.database, config.uploads_dir)
        self.uploads = UploadStore(self.database, self.files, config.parts_dir)
        self.meter = Meter(self.usage, (self.keys.save_uses, self.rates.save, self._expire, self.database.ballast.take))
        store = None
        if config.store is not None:
            store = Store.open(config.store, server_id(self.database), config.data_dir)
        rules = settings.rules()
        self.disk = DiskTier(config.blobs_dir, DISK_BYTES if config.disk_bytes is None else config.disk_bytes, store)
        self.disk.set_rules(rules.disk)
        self.registry = Registry(self.database, self.disk, self._keep_in_memory)
        self.mirror = Mirror(self.database, self.registry.objects, self.disk, store) if store else None
        self.catalog = Catalog(self.database, self.registry)
        self.jobs = JobStore(self.database)
        self._streams: dict[str, asyncio.Queue[Output]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.trace = Recorder(config.trace_dir)
        self.uses = Uses()
        self.engine = Fleet(bases, config, self._deliver, disk=self.disk, rules=rules, on_use=self._note_use)
        self.devices = Devices(dict(zip(self.engine.names, (b.device for b in bases), strict=True)))
        self.metrics = Metrics(base.name, self.devices, self.engine.stats, self._count_jobs)
        self.tracing = Tracing.from_environment()
        self.steering = Steering(self.engine, self.disk, settings)
        self.trainers = self._trainers()
        self.storing = Storing()
        self.worker = self._worker()
        self.eraser = Eraser(self)

    def start(self) -> None:
        """Within the event loop that will serve."""
        self._loop = asyncio.get_running_loop()
        removed = self.files.clean_up() + self.uploads.clean_up() + self.registry.clean_up()
        if removed:
            log.info("removed %d files that an interrupted write had left", removed)
        self.operators_key = self._admin_key()
        self.database.ballast.take()
        if self.config.metrics_port is not None:
            self.metrics.listen(self.config.metrics_port)
        self.trace.start()
        self.meter.start()
        if self.mirror is not None:
            self.mirror.start()
        self.engine.start()
        self.eraser.go_on()
        self.worker.start()

    def stop(self) -> None:
        letting_go = threading.Timer(_GRACE_SECONDS, self.disk.close)
        letting_go.start()
        self.worker.stop()
        self.engine.stop()
        self.metrics.close()
        self.tracing.close()
        self.trace.close()
        self.meter.stop()
        self.grammars.close()
        if self.mirror is not None:
            self.mirror.stop()
        self.storing.close(2 * _GRACE_SECONDS)
        letting_go.cancel()
        self.disk.close()
        self.database.close()
        os.close(self._lock)

    async def run(self, request: EngineRequest, key: str) -> AsyncGenerator[Output]:
        """The outputs of one request as they come. Leaving the iteration early cancels it, and so does revoking the
        `key`, an id, on whose behalf it runs.

        Raises ContextLengthExceeded, Unauthorized, or whatever the request failed with.
        """
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._streams[request.id] = outputs

        def end(error: HubError) -> None:
            self.engine.cancel(request.id)
            outputs.put_nowait(Output(request.id, error=error))

        done = False
        try:
            if not self.engine.alive:
                raise Unavailable("The engine is not running; the server needs a restart.")
            with self.underway.on_behalf(key, end):
                self.engine.submit(request)
                while not done:
                    output = await outputs.get()
                    done = output.last
                    if output.error is not None:
                        raise output.error
                    yield output
        finally:
            del self._streams[request.id]
            if not done:
                self.engine.cancel(request.id)

    def cut_off(self) -> None:
        """Ends whatever answers are under way, which are told why."""
        for request, outputs in self._streams.items():
            outputs.put_nowait(Output(request, error=Unavailable("The server is stopping. Ask again in a moment.")))

    async def in_store(self, act: Callable[[], Result]) -> Result:
        """Does what may wait for the object store, where there is one. Raises StoreUnavailable, when too many wait."""
        if self.disk.store is None:
            return await run_in_threadpool(act)
        return await self.storing.run(act)

    def on_loop(self, act: Callable[[], Result]) -> Result:
        """Has the event loop do something, and waits for it; for other threads."""
        assert self._loop is not None
        done: Future[Result] = Future()
        self._loop.call_soon_threadsafe(settle, done, act)
        return done.result()

    def expect(self, owner: str) -> None:
        """They are back after a pause: what they used last is brought to the device before they ask for it."""
        last = self.uses.latest(owner)
        version = None if last is None else self.registry.current_beside(owner, last)
        if version is not None:
            self.engine.prefetch(version.ref)

    def forget(self, versions: Iterable[Version]) -> None:
        """Takes deleted versions off the device and out of RAM; what still runs on them runs to its end."""
        for version in versions:
            self.engine.evict(version.digest)
            self.uses.forget(version.owner, {version.id})
            self.meter.released(version.owner, version.name, version.nbytes, version.created_at)

    def pin(self, adapter: str, by: PinnedBy) -> None:
        """Keeps an adapter in memory, by its id, once it is there. Raises BadRequest when pins would hold too much."""
        devices = [d for d in self.engine.stats().result()["devices"] if d["alive"]]
        smallest = min(device["tiers"]["device"]["budget_bytes"] for device in devices)  # it may be on any of them
        self.registry.pins.pin(adapter, by, smallest)

    def _trainers(self) -> list[CoTrainer]:
        """One for each device, whose spare time it has."""
        trainers = []
        for engine in self.engine.engines:
            trainers.append(CoTrainer(engine.base, engine.wake))
            engine.set_idle_work(trainers[-1])
            trainers[-1].try_out()
        return trainers

    def _worker(self) -> Worker:
        config, workspaces = self.config, Workspaces(self.config.jobs_dir)
        publisher = Publisher(
            self.database,
            self.registry,
            self.files,
            self.jobs,
            self.base.name,
            hint=self.engine.prefetch,
            forget=self.forget,
            room=self.room,
        )
        validator = Validator(
            self.engine,
            self.codec,
            self.database,
            self.registry,
            self.files,
            self.jobs,
            workspaces,
            self.room,
            [trainer.costs for trainer in self.trainers],
        )
        starter = Starter(self.registry, self.jobs, workspaces)
        conductor = Conductor(
            self.trainers,
            self.jobs,
            workspaces,
            starter,
            publisher,
            places=config.train_jobs,
            owner_places=config.owner_jobs,
        )
        return Worker(validator, conductor)

    def _keep_in_memory(self, digest: str, pinned: bool) -> None:
        """In memory, for as long as some adapter pins it."""
        self.engine.pin(digest, pinned)

    def _expire(self) -> None:
        """Removes what was to be kept until now."""
        self.once.expire()
        self.uploads.expire()
        for file in self.files.expire():
            self.meter.released(file.owner, None, file.bytes, file.created_at)

    def _note_use(self, use: Use) -> None:
        """On an engine's thread; on one at a time."""
        self.trace.record(use)
        self.uses.note(use)
        self.metrics.used(use)

    def _deliver(self, outputs: list[Output]) -> None:
        """On an engine's thread: hands a step's outputs to the event loop in one call."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, outputs)

    def _spread(self, outputs: list[Output]) -> None:
        for output in outputs:
            if (stream := self._streams.get(output.request)) is not None:
                stream.put_nowait(output)

    def _count_jobs(self) -> dict[str, int]:
        """By state."""
        rows = self.database.rows("select status, count(*) as n from jobs group by status")
        return {status.value: 0 for status in Status} | {row["status"]: row["n"] for row in rows}

    def _admin_key(self) -> str:
        """The operator's, in a file that only they can read; made on a first start."""
        path = self.config.admin_key_file
        path.touch(mode=0o600)
        if not path.read_text().strip():
            path.write_text(self.keys.create(ADMIN_OWNER, admin=True) + "\n")
        return path.read_text().strip()


def of_request(request: Request) -> Hub:
    return request.app.state.hub


TheHub = Annotated[Hub, Depends(of_request)]


@asynccontextmanager
async def opened(config: Config, *bases: Base) -> AsyncIterator[Hub]:
    hub = Hub(config, *bases)
    hub.start()
    watch = asyncio.create_task(hub.underway.watch())
    try:
        yield hub
    finally:
        watch.cancel()
        await asyncio.to_thread(hub.stop)


def _limits(config: Config) -> Limits:
    return Limits(
        adapters=config.owner_adapters,
        bytes=config.owner_bytes,
        jobs=config.owner_queue,
        requests_per_minute=config.owner_requests_per_minute,
        tokens_per_minute=config.owner_tokens_per_minute,
    )
