"""The engine: one thread that owns the device, serves requests in one continuous batch, and trains when there is time.

Other threads reach it through its inbox; what comes back is handed to `on_output`, a step at a time. A turn of the
thread is: the inbox, deadlines, adapters on their way (`ahead.py`), and then a piece of training (`idle.py`) or a step
of serving (`serving.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from adapterhub.base.ahead import Ahead
from adapterhub.base.budgets import Budgets, allot
from adapterhub.base.idle import IdleWork, PieceAbandoned, SpareTime
from adapterhub.base.inbox import Inbox, shutting_down
from adapterhub.base.lost import DeviceLost, check_device, device_failed
from adapterhub.base.model import Base
from adapterhub.base.native.model import supports
from adapterhub.base.occupancy import Occupancy
from adapterhub.base.placement import Seat
from adapterhub.base.request import Output, Request
from adapterhub.base.scheduler import Sequence
from adapterhub.base.serving import Serving
from adapterhub.base.share import Share
from adapterhub.config import Config
from adapterhub.errors import ContextLengthExceeded, DeadlineExceeded, Unavailable
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.policies import Rules
from adapterhub.swap.ref import AdapterRef, Tier, Use
from adapterhub.swap.residency import Plan
from adapterhub.swap.threads import settle
from adapterhub.swap.tiers import Tiers

log = logging.getLogger(__name__)
_SWEEP_SECONDS = 1.0  # how often deadlines are looked at; more often where they are shorter than that


class Engine:
    """`on_output` is called on the engine's thread with the outputs of one step, `on_use` once for each request that an
    adapter answers, when its first token is there. Neither may block."""

    def __init__(
        self,
        base: Base,
        config: Config,
        on_output: Callable[[list[Output]], None],
        *,
        disk: DiskTier | None = None,
        rules: Rules | None = None,
        on_use: Callable[[Use], None] | None = None,
    ) -> None:
        """`disk` is where blocks come from, by default the directory of `config`."""
        self.base = base
        self._budgets, self.kv, pool = allot(config, base)
        self.context = min(base.context, self.kv.capacity)  # tokens of one request, prompt and answer
        self._inbox = Inbox()
        self.tiers = Tiers(
            pool,
            disk or DiskTier(config.blobs_dir),
            base.fingerprint,
            base.layout,
            ram_bytes=self._budgets.ram,
            load_threads=config.load_threads,
            wake=lambda: self._inbox.put(lambda: None),
            rules=rules,
        )
        # the native step has threads of its own; torch's would keep the cores busy for the little that is left
        threads = 1 if supports(base) else None
        self._spare = SpareTime(Share(config.train_latency_slo, config.train_micro_tokens), threads)
        self.occupancy = Occupancy(config.max_batch + config.max_waiting)
        self._serving = Serving(
            base, self.kv, self.tiers, config, self._spare, self.occupancy, on_output=on_output, on_use=on_use
        )
        self._scheduler = self._serving.scheduler
        self._ahead = Ahead(self._scheduler, self.tiers)
        self._request_seconds = config.request_seconds
        self._sweep_seconds = min(_SWEEP_SECONDS, config.request_seconds)
        self._next_sweep = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="adapterhub-engine", daemon=True)

    # -- for any thread

    def start(self) -> None:
        self._thread.start()

    def warm_up(self) -> Future[None]:
        """Gets everything ready that the first requests would wait for. Fails with what keeps them from an answer."""
        return self._inbox.ask(self._serving.warm_up)

    def stop(self) -> None:
        """Ends the thread; what was under way fails with Unavailable."""

        def stop() -> None:
            self._stopping = True

        if self._thread.is_alive():
            self._inbox.put(stop)
            self._thread.join()
        self.tiers.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """It takes no more requests."""
        return self._inbox.ended

    @property
    def budgets(self) -> Budgets:
        """As they are now: the pool becomes smaller when the device has too little memory."""
        return self._budgets._replace(device=self.tiers.pool.capacity)

    def seat(self, adapter: AdapterRef | None, *, warm: bool) -> Seat | None:
        """How a request for `adapter` would find this engine at this moment; None once it has ended. A few look-ups."""
        if self.ended:
            return None
        used = self.tiers.contents.residency.allocator.used_bytes
        if adapter is None:
            return Seat(self.occupancy.requests, used, warm=warm)
        near = self.tiers.nearest(adapter.digest)
        holds = near is Tier.DEVICE or self.occupancy.wants(adapter.digest)
        return Seat(self.occupancy.requests, used, holds, near is Tier.RAM, warm)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ContextLengthExceeded when it could never be answered whole, TooManyRequests when
        the queue is full, and Unavailable when the engine has stopped."""
        self.check_length(len(request.prompt), request.sampling.max_tokens)
        self._inbox.check_open()  # what has ended is not full
        self.occupancy.enter(request)
        arrived = time.monotonic()
        try:
            self._inbox.post(lambda: self._scheduler.add(Sequence.of(request, arrived)))
        except Unavailable:
            self.occupancy.leave([request])
            raise

    def check_length(self, prompt: int, max_tokens: int, param: str | None = None) -> None:
        """Raises ContextLengthExceeded, for the request's field `param`, when the two together do not fit."""
        if prompt + max_tokens > self.context:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.context} tokens. You asked for {prompt + max_tokens}: "
                f"{prompt} in the prompt and {max_tokens} for the answer. Shorten the prompt or lower max_tokens.",
                param=param,
            )

    def cancel(self, request: str) -> None:
        """Forgets a request; nothing more comes of it."""

        def cancel() -> None:
            if (sequence := self._scheduler.get(request)) is not None:
                self._serving.end([sequence])

        self._inbox.put(cancel)

    def set_idle_work(self, work: IdleWork) -> None:
        """The engine's spare time is `work`'s from now on."""
        self._inbox.put(lambda: self._spare.take(work))

    def wake(self) -> None:
        """The idle work has something to do again."""
        self._inbox.put(self._spare.wake)

    def evict(self, digest: str, tier: Tier | None = None) -> Future[bool]:
        """Takes a block off the device, out of RAM, or both; False when it must wait for the requests that use it."""
        return self._inbox.ask(lambda: self.tiers.evict(digest, tier))

    def pin(self, digest: str, pinned: bool) -> Future[None]:
        """Keeps a block in memory where it is now, or no longer. Those that are loaded later say so themselves."""
        return self._inbox.ask(lambda: self.tiers.pin(digest, pinned))

    def prefetch(self, adapter: AdapterRef) -> None:
        """A hint: the adapter is brought to the device when nothing else is to be read, if there is room without taking
        anything from what is in use or comes next in the queue. Never fails."""
        self._inbox.put(lambda: self._ahead.hint(adapter))

    def set_budgets(self, device: int | None = None, ram: int | None = None) -> Future[None]:
        """Changes the device's and the RAM's budget, in bytes, while requests run; None leaves one as it is.

        What no longer fits is evicted. Fails with BadRequest, and changes nothing, when what is pinned or in use would
        not fit.
        """
        done: Future[None] = Future()

        def finish(changed: Future[None]) -> None:
            if ram is not None and changed.exception() is None:
                self._budgets = self._budgets._replace(ram=ram)
            if not done.done():  # the engine's end came first
                settle(done, changed.result)

        def change() -> None:
            try:
                self.tiers.set_budgets(device, ram).add_done_callback(finish)
            except Exception as error:
                done.set_exception(error)

        self._inbox.promise(done, change)
        return done

    def set_rules(self, rules: Rules) -> Future[None]:
        """For the device and RAM, at once; what they let go of, goes."""
        return self._inbox.ask(lambda: self.tiers.set_rules(rules))

    def plan(self, rules: Rules | None = None, device: int | None = None, ram: int | None = None) -> Future[Plan]:
        """What `set_rules` or `set_budgets` would evict now. Fails with BadRequest as they do."""
        return self._inbox.ask(lambda: self.tiers.plan(rules, device, ram))

    def tiers_of(self, digests: list[str]) -> Future[list[Tier]]:
        return self._inbox.ask(lambda: [self.tiers.tier_of(d) for d in digests])

    def stats(self) -> Future[dict[str, Any]]:
        return self._inbox.ask(lambda: {"tiers": self.tiers.stats(), "engine": self._serving.stats()})

    def erase(self, owner: str) -> Future[int]:
        """Forgets what is kept of an owner's prompts and answers; how many KV blocks that were."""
        return self._inbox.ask(lambda: self.kv.blocks.erase(owner))

    def check_integrity(self) -> Future[None]:
        """Fails with AssertionError if a KV block, a pin or an extent has leaked."""
        return self._inbox.ask(self._serving.check_integrity)

    # -- the engine's thread

    def _loop(self) -> None:
        device = self.base.device
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # kernels are launched on this thread's own
            busy = False
            while not self._stopping:
                busy = self._turn(wait=not busy)
        except BaseException as error:
            log.critical("the engine on %s has ended", device, exc_info=error)
            self._die(device_failed(device))
            if not isinstance(error, DeviceLost):
                raise
            return
        self._inbox.close(shutting_down())
        self._serving.fail(self._scheduler.find(lambda _: True), shutting_down())

    def _die(self, error: Unavailable) -> None:
        """All that this engine has is lost; nothing is put in order any more."""
        self._inbox.lose(error)
        try:
            self._serving.lose(error)
        finally:
            self._spare.lose()

    def _turn(self, wait: bool) -> bool:
        """One turn of the loop. False when there was nothing to do, which only something in the inbox can change, or a
        deadline: the next turn may `wait` for it."""
        try:
            if wait:
                self._sleep()
            self._prepare()
            if self._serving.scarcity.short:  # what found no memory is tried again before training takes any
                return self._serving.step() or self._train()
            return self._train() or self._serving.step()
        except Exception:
            log.exception("the engine met an error outside of a step; it goes on")
            check_device(self.base.device)
            return True

    def _prepare(self) -> None:
        """What comes before a step: what others asked for, deadlines, and adapters on their way."""
        self._inbox.carry_out()
        self._sweep()
        self.tiers.poll(idle=self._serving.only_waits)
        for sequence, error in self._ahead.bring():
            self._serving.fail([sequence], error)

    def _sleep(self) -> None:
        """Until something is in the inbox, or it is time to look at deadlines, or to try idle work again."""
        sweeps = self.occupancy.requests or self.tiers.has_ttl or self._spare.wanted
        self._inbox.wait(self._sweep_seconds if sweeps else None)
        self._spare.slept()

    def _sweep(self) -> None:
        """Ends what is over its deadline, and lets go of adapters that were unused for too long."""
        now = time.monotonic()
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._sweep_seconds
        self.tiers.expire()
        seconds = self._request_seconds
        late = self._scheduler.find(lambda s: now - s.arrived > seconds)
        message = (
            f"The answer was not complete within {seconds:g} seconds. Ask for fewer tokens, or when there is less load."
        )
        self._serving.fail(late, DeadlineExceeded(message))

    def _train(self) -> bool:
        """A piece of training, if it may be now."""
        return self._spare.wanted and self._spare.train(self._give_way, **self._serving.demand)

    def _give_way(self) -> None:
        """Within a piece of training, when somebody asks for something or the piece takes long: serves until training
        may go on, or there is nothing else to do. Raises PieceAbandoned when serving needs the piece's memory."""
        if not self._inbox.waiting and not self._spare.overdue:
            return
        self._spare.interrupt()
        try:
            self._prepare()
            while (
                not self._stopping
                and not self._spare.may_go_on(**self._serving.demand)
                and self._serving.step(piece=True)
            ):
                self._prepare()
        except PieceAbandoned:
            raise
        except Exception:
            log.exception("the engine met an error outside of a step; it goes on")
            check_device(self.base.device)
        self._spare.go_on()
