"""The engine: one thread that owns the device, serves requests in one continuous batch, and trains when there is time.

Other threads reach it through its inbox; what comes back is handed to `on_output`, a step at a time. A step is:
`Tiers.poll -> pin what comes next -> Scheduler.schedule -> Runner.run -> outputs -> unpin what has ended`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice
from typing import Any

from adapterhub.base.budgets import Budgets
from adapterhub.base.idle import Demand, IdleWork, SpareTime
from adapterhub.base.inbox import Inbox, shutting_down
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base
from adapterhub.base.request import Finish, Origin, Output, Request, Token
from adapterhub.base.runner import Runner
from adapterhub.base.scheduler import Scheduler, Sequence
from adapterhub.base.share import Share
from adapterhub.config import Config
from adapterhub.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    HubError,
    ServerFault,
    TooManyRequests,
)
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.policies import Rules
from adapterhub.swap.pool import Pool
from adapterhub.swap.ref import AdapterRef, Tier, Use
from adapterhub.swap.residency import Plan
from adapterhub.swap.tiers import Tiers

log = logging.getLogger(__name__)
_SWEEP_SECONDS = 1.0  # how often deadlines are looked at; more often where they are shorter than that
_AHEAD = 3  # times the largest batch: how far into the queue adapters are read ahead
_HINTS = 256  # the oldest are forgotten


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
        self._on_output = on_output
        self._on_use = on_use
        self.budgets = Budgets.of(config, base.device)
        self.kv = KVCache(base.kv_shapes, self.budgets.kv, base.dtype, base.device)
        self.context = min(base.context, self.kv.capacity)  # tokens of one request, prompt and answer
        self.tiers = Tiers(
            Pool(self.budgets.device, base.dtype, base.device),
            disk or DiskTier(config.blobs_dir),
            base.fingerprint,
            base.layout,
            ram_bytes=self.budgets.ram,
            load_threads=config.load_threads,
            wake=lambda: self._inbox.put(lambda: None),
            rules=rules,
        )
        self._runner = Runner(base, self.kv, self.tiers.pool)
        # the native step has threads of its own; torch's would keep the cores busy for the little that is left
        threads = 1 if self._runner.native else None
        self._spare = SpareTime(Share(config.train_latency_slo, config.train_micro_tokens), threads)
        self._scheduler = Scheduler(self.kv, config.max_batch, config.max_step_tokens)
        self._inbox = Inbox()
        self._hints: deque[AdapterRef] = deque(maxlen=_HINTS)  # what somebody may ask for soon
        self._steps = self._tokens = 0
        self._live = 0  # requests that have not ended
        self._max_live = config.max_batch + config.max_waiting
        self._request_seconds = config.request_seconds
        self._sweep_seconds = min(_SWEEP_SECONDS, config.request_seconds)
        self._next_sweep = 0.0
        self._stopping = False
        self._counting = threading.Lock()  # guards `_live`
        self._thread = threading.Thread(target=self._loop, name="adapterhub-engine", daemon=True)

    # -- for any thread

    def start(self) -> None:
        self._thread.start()

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

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ContextLengthExceeded when it could never be answered whole, TooManyRequests when
        the queue is full, and Unavailable when the engine has stopped."""
        self.check_length(len(request.prompt), request.sampling.max_tokens)
        with self._counting:
            if self._live >= self._max_live and not self._inbox.ended:
                raise TooManyRequests("Too many requests are waiting or running. Try again in a second.")
            self._live += 1
        self._inbox.post(lambda: self._scheduler.add(Sequence.of(request)))

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
        self._inbox.put(lambda: self._end(self._scheduler.find(lambda s: s.request.id == request)))

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
        self._inbox.put(lambda: self._hints.append(adapter))

    def set_budgets(self, device: int | None = None, ram: int | None = None) -> Future[None]:
        """Changes the device's and the RAM's budget, in bytes, while requests run; None leaves one as it is.

        What no longer fits is evicted. Fails with BadRequest, and changes nothing, when what is pinned or in use would
        not fit.
        """
        done: Future[None] = Future()

        def finish(changed: Future[None]) -> None:
            if (error := changed.exception()) is not None:
                done.set_exception(error)
            else:
                done.set_result(None)

        def change() -> None:
            try:
                self.tiers.set_budgets(device, ram).add_done_callback(finish)
            except HubError as error:
                done.set_exception(error)

        self._inbox.post(change)
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
        return self._inbox.ask(self._stats)

    def erase(self, owner: str) -> Future[int]:
        """Forgets what is kept of an owner's prompts and answers; how many KV blocks that were."""
        return self._inbox.ask(lambda: self.kv.blocks.erase(owner))

    def check_integrity(self) -> Future[None]:
        """Fails with AssertionError if a KV block, a pin or an extent has leaked."""

        def check() -> None:
            self._scheduler.check_integrity()
            self.tiers.check_integrity(sum(1 for s in self._scheduler.find(lambda s: s.hold is not None)))

        return self._inbox.ask(check)

    # -- the engine's thread

    def _loop(self) -> None:
        busy = False
        while not self._stopping:
            busy = self._turn(wait=not busy)
        self._inbox.close()
        self._fail(self._scheduler.find(lambda _: True), shutting_down())

    def _turn(self, wait: bool) -> bool:
        """One turn of the loop. False when there was nothing to do, which only something in the inbox can change, or a
        deadline: the next turn may `wait` for it."""
        try:
            if wait:
                self._sleep()
            self._prepare()
            return self._train() or self._step()
        except Exception:
            log.exception("the engine met an error outside of a step; it goes on")
            return True

    def _prepare(self) -> None:
        """What comes before a step: what others asked for, deadlines, and adapters on their way."""
        self._inbox.carry_out()
        self._sweep()
        self.tiers.poll()
        if self._pin_ahead():
            self._prefetch()

    def _sleep(self) -> None:
        """Until something is in the inbox, or it is time to look at deadlines, or to try idle work again."""
        sweeps = self._live or self.tiers.has_ttl or self._spare.wanted
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
        self._fail(late, DeadlineExceeded(message))

    def _pin_ahead(self) -> bool:
        """Pins the adapters of the sequences that come next, in order, and starts bringing those that are elsewhere.
        False when there is no room for one of them until others release theirs."""
        room, failed = True, list[tuple[Sequence, HubError]]()
        for sequence in self._scheduler.look_ahead():
            adapter = sequence.request.adapter
            try:
                if adapter is not None and sequence.hold is None:
                    sequence.hold = self.tiers.acquire(adapter)
                    if sequence.hold is None:  # who came first is served first
                        room = False
                        break
                if sequence.hold is not None and sequence.hold.error is not None:
                    raise sequence.hold.error
            except HubError as error:
                failed.append((sequence, error))
        for sequence, why in failed:
            self._fail([sequence], why)
        return room

    def _prefetch(self) -> None:
        """Reads ahead, while the readers have nothing else to do: what is asked for further back in the queue, then
        what was hinted at. It takes nothing from anybody who is in the queue."""
        wanted: dict[str, AdapterRef] = {}
        if self.tiers.readers_idle and self._scheduler.num_waiting:
            batch = self._scheduler.max_batch
            for sequence in islice(self._scheduler.waiting(), batch, _AHEAD * batch):
                if (adapter := sequence.request.adapter) is not None:
                    wanted[adapter.digest] = adapter
        for adapter in wanted.values():
            if not self.tiers.prefetch(adapter, wanted.keys()):
                return
        while self._hints and self.tiers.readers_idle:
            self.tiers.prefetch(self._hints.popleft(), wanted.keys())

    def _train(self) -> bool:
        """A piece of training, if it may be now."""
        return self._spare.wanted and self._spare.train(self._give_way, **self._demand())

    def _demand(self) -> Demand:
        """Who waits for the store, which may never answer, does not wait for the device."""
        running = self._scheduler.running
        first = any(s.produced == 0 for s in running) or any(
            s.hold is None or not s.hold.away for s in self._scheduler.waiting()
        )
        return {"running": bool(running), "first": first}

    def _give_way(self) -> None:
        """Within a piece of training, when somebody asks for something or the piece takes long: serves until training
        may go on, or there is nothing else to do."""
        if not self._inbox.waiting and not self._spare.overdue:
            return
        self._spare.interrupt()
        try:
            self._prepare()
            while not self._stopping and not self._spare.may_go_on(**self._demand()) and self._step():
                self._prepare()
        except Exception:
            log.exception("the engine met an error outside of a step; it goes on")
        self._spare.go_on()

    def _step(self) -> bool:
        """One step of serving; False if there was nothing to do."""
        work = self._scheduler.schedule()
        if not work:
            return False
        self._spare.begin_step()
        try:
            outcomes = self._runner.run(work)
        except Exception as error:  # the step's requests fail; the others, and the thread, go on
            log.exception("a step failed")
            self._fail([w.sequence for w in work], ServerFault(f"The model failed on this request: {error}"))
            return True
        outputs: list[Output] = []
        ended: list[Sequence] = []
        for work_done, token, diverged in outcomes:
            sequence = work_done.sequence
            self._scheduler.advance(work_done, token.id if token else None)
            if diverged:
                fault: HubError | None = sequence.matcher.error if sequence.matcher is not None else None
                fault = fault or ServerFault("The model's numbers are not finite for this request.", code="not_finite")
                outputs.append(Output(sequence.request.id, error=fault))
            elif token is not None:
                outputs.append(self._output(sequence, token))
            if outputs and outputs[-1].request == sequence.request.id and outputs[-1].last:
                ended.append(sequence)
        self._end(ended)
        self._steps += 1
        self._tokens += len(outputs)
        self._spare.end_step(streams=any(o.token and o.origin is None for o in outputs))
        if outputs:
            self._on_output(outputs)
        return True

    def _output(self, sequence: Sequence, token: Token) -> Output:
        sampling, finish = sequence.request.sampling, None
        # with a grammar, an end that is to be ignored comes only where nothing else may
        if token.id in self.base.end_tokens and (not sampling.ignore_eos or sequence.matcher is not None):
            finish = Finish.STOP
        elif sequence.produced >= sampling.max_tokens:
            finish = Finish.LENGTH
        origin = None
        if sequence.produced == 1:
            hold = sequence.hold
            origin = Origin(hold.tier, hold.load_ms) if hold else Origin(Tier.BASE, 0.0)
            self._note_use(sequence.request.adapter, origin)
        return Output(sequence.request.id, token, finish, origin=origin)

    def _note_use(self, adapter: AdapterRef | None, origin: Origin) -> None:
        if self._on_use is not None and adapter is not None:
            version, digest, nbytes, owner, _ = adapter
            self._on_use(Use(time.time(), version, digest, owner, nbytes, origin.tier, origin.load_ms))

    def _fail(self, sequences: list[Sequence], error: HubError) -> None:
        self._end(sequences)
        if sequences:
            self._on_output([Output(s.request.id, error=error) for s in sequences])

    def _end(self, sequences: list[Sequence]) -> None:
        with self._counting:
            self._live -= len(sequences)
        for sequence in sequences:
            self._scheduler.remove(sequence)
            if sequence.hold is not None:
                self.tiers.release(sequence.hold)
                sequence.hold = None

    def _stats(self) -> dict[str, Any]:
        return {
            "tiers": self.tiers.stats(),
            "engine": {
                "running": len(self._scheduler.running),
                "waiting": self._scheduler.num_waiting,
                "kv_blocks": self.kv.blocks.total,
                "kv_blocks_free": self.kv.blocks.free,
                "shared_tokens": self._scheduler.shared_tokens,
                "steps": self._steps,
                "tokens": self._tokens,
                "training": self._spare.stats(),
            },
        }
