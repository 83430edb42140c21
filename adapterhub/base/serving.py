"""Steps of serving: what the scheduler chooses, one forward, and what comes of it for each request.

A step that fails fails its own requests. One that finds no memory is taken back, and what comes next has less to
compute, or more memory (`scarcity.py`); its requests notice nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from adapterhub.base.idle import Demand, PieceAbandoned, SpareTime
from adapterhub.base.kv import KVCache
from adapterhub.base.lost import DeviceLost, check_device, out_of_memory, told_briefly
from adapterhub.base.model import Base
from adapterhub.base.occupancy import Occupancy
from adapterhub.base.request import Finish, Origin, Output, Token
from adapterhub.base.runner import Outcome, Runner
from adapterhub.base.scarcity import Relief, Scarcity
from adapterhub.base.scheduler import Scheduler, Sequence, Work
from adapterhub.config import Config, format_bytes
from adapterhub.errors import HubError, OutOfMemory, ServerFault
from adapterhub.swap.ref import Tier, Use
from adapterhub.swap.tiers import Tiers

log = logging.getLogger(__name__)
_POOL_SHARE = 1 / 8  # of the pool, that is given back at a time


class Serving:
    """Only the engine's thread may call this. `on_output` and `on_use` are the engine's."""

    def __init__(
        self,
        base: Base,
        kv: KVCache,
        tiers: Tiers,
        config: Config,
        spare: SpareTime,
        occupancy: Occupancy,
        on_output: Callable[[list[Output]], None],
        on_use: Callable[[Use], None] | None,
    ) -> None:
        self.scheduler = Scheduler(kv, config.max_batch, config.max_step_tokens)
        self.runner = Runner(base, kv, tiers.pool)
        self.scarcity = Scarcity(self.scheduler.max_step_tokens, config.max_batch)
        self._base, self._kv, self._tiers = base, kv, tiers
        self._spare, self._occupancy = spare, occupancy
        self._on_output, self._on_use = on_output, on_use
        self._steps = self._tokens = self._refused = 0

    @property
    def demand(self) -> Demand:
        """Who waits for the store, which may never answer, does not wait for the device."""
        running = self.scheduler.running
        first = any(s.produced == 0 for s in running) or any(
            s.hold is None or not s.hold.away for s in self.scheduler.waiting()
        )
        return {"running": bool(running), "first": first}

    @property
    def only_waits(self) -> bool:
        """Whether no step could be made before another adapter is there."""
        ahead = self.scheduler.look_ahead()
        return not self.scheduler.running and not any(s.hold is None or s.hold.ready for s in ahead)

    def warm_up(self) -> None:
        """Before the first request, so that nobody waits while kernels are compiled for them. What finds no memory is
        left for when it is needed. Raises what keeps the device from computing at all."""
        tokens = self.scheduler.max_step_tokens
        try:
            self.runner.warm_up(self.scheduler.max_batch, tokens)
        except Exception as error:
            if not out_of_memory(error):
                raise
            log.warning("getting ready, %s ran out of memory (%s)", self._base.device, told_briefly(error))
        else:
            return
        self.scarcity.failed(tokens, piece=False)
        self.runner.give_back()
        self.scarcity.rest()

    def step(self, *, piece: bool = False) -> bool:
        """One step; False if there was nothing to do. `piece`: within a piece of training, of which PieceAbandoned is
        raised when its memory is needed."""
        work = self.scheduler.schedule()
        if not work:
            self.scarcity.rest()
            return False
        self._spare.begin_step()
        try:
            outcomes = self.runner.run(work)
        except Exception as error:  # the step's requests fail; the others, and the thread, go on
            if not out_of_memory(error):
                log.exception("a step failed")
                self.fail([w.sequence for w in work], ServerFault(f"The model failed on this request: {error}"))
                check_device(self._base.device)
                return True
            reason = told_briefly(error)
        else:
            self._ended_well(work)
            self._note(outcomes)
            return True
        # the error is gone, and with it the memory that its frames held
        self._make_room(work, reason, piece=piece)
        return True

    def fail(self, sequences: list[Sequence], error: HubError) -> None:
        self.end(sequences)
        if sequences:
            self._on_output([Output(s.request.id, error=error) for s in sequences])

    def end(self, sequences: list[Sequence]) -> None:
        """Nothing more comes of them, and nobody is told."""
        self._occupancy.leave(s.request for s in sequences)
        for sequence in sequences:
            self.scheduler.remove(sequence)
            if sequence.hold is not None:
                self._tiers.release(sequence.hold)
                sequence.hold = None

    def lose(self, error: HubError) -> None:
        """The device is lost with all that is on it: everybody is told, and nothing is put in order any more."""
        self._on_output([Output(s.request.id, error=error) for s in self.scheduler.find(lambda _: True)])

    def check_integrity(self) -> None:
        """Raises AssertionError if a KV block, a pin or an extent has leaked."""
        self.scheduler.check_integrity()
        self._tiers.check_integrity(sum(1 for s in self.scheduler.find(lambda s: s.hold is not None)))

    def stats(self) -> dict[str, Any]:
        """Counts are since the start: `out_of_memory` of steps that were taken back, `refused` of requests that failed
        for lack of memory. `step_tokens`: how many a step may have now."""
        return {
            "running": len(self.scheduler.running),
            "waiting": self.scheduler.num_waiting,
            "kv_blocks": self._kv.blocks.total,
            "kv_blocks_free": self._kv.blocks.free,
            "sought_tokens": self.scheduler.sought_tokens,
            "shared_tokens": self.scheduler.shared_tokens,
            "steps": self._steps,
            "tokens": self._tokens,
            "step_tokens": self.scheduler.step_tokens,
            "out_of_memory": self.scarcity.failures,
            "refused": self._refused,
            "training": self._spare.stats(),
        }

    # -- what comes of a step

    def _note(self, outcomes: list[Outcome]) -> None:
        outputs: list[Output] = []
        ended: list[Sequence] = []
        for work, token, diverged, scored in outcomes:
            sequence = work.sequence
            self.scheduler.advance(work, token.id if token else None, scored)
            if diverged:
                fault: HubError | None = sequence.matcher.error if sequence.matcher is not None else None
                fault = fault or ServerFault("The model's numbers are not finite for this request.", code="not_finite")
                outputs.append(Output(sequence.request.id, error=fault))
            elif token is not None or not sequence.pending:
                outputs.append(self._output(sequence, token))
            if outputs and outputs[-1].request == sequence.request.id and outputs[-1].last:
                ended.append(sequence)
        self.end(ended)
        self._steps += 1
        self._tokens += sum(o.token is not None for o in outputs)
        self._spare.end_step(streams=any(o.token and o.origin is None for o in outputs))
        if outputs:
            self._on_output(outputs)

    def _output(self, sequence: Sequence, token: Token | None) -> Output:
        """`token` None: none was asked for, and the prompt is through."""
        sampling, finish = sequence.request.sampling, None
        # with a grammar, an end that is to be ignored comes only where nothing else may
        if token and token.id in self._base.end_tokens and (not sampling.ignore_eos or sequence.matcher is not None):
            finish = Finish.STOP
        elif sequence.produced >= sampling.max_tokens:
            finish = Finish.LENGTH
        if sequence.produced > 1:
            return Output(sequence.request.id, token, finish)
        return Output(sequence.request.id, token, finish, origin=self._origin(sequence), prompt=tuple(sequence.scored))

    def _origin(self, sequence: Sequence) -> Origin:
        """Where the adapter was when its request came; noted as a use."""
        hold, adapter = sequence.hold, sequence.request.adapter
        tier, load_ms = (hold.tier, hold.load_ms) if hold else (Tier.BASE, 0.0)
        if self._on_use is not None and adapter is not None:
            version, digest, nbytes, owner, _ = adapter
            self._on_use(Use(time.time(), version, digest, owner, nbytes, tier, load_ms))
        return Origin(tier, load_ms, 1e3 * (sequence.begun - sequence.arrived), sequence.found or 0)

    # -- when there is no memory

    def _ended_well(self, work: list[Work]) -> None:
        self.scarcity.went_well(_tokens(work))
        self.scheduler.step_tokens = self.scarcity.allowance.tokens
        self.runner.may_capture(self.scarcity.may_capture)

    def _make_room(self, work: list[Work], reason: str, *, piece: bool) -> None:
        self.scheduler.take_back(work)
        check_device(self._base.device)
        tokens = _tokens(work)
        relief = self.scarcity.failed(tokens, piece=piece)
        if relief is Relief.POOL and not self._shrink_pool():
            relief = self.scarcity.pool_is_spent(tokens)
        log.warning("a step of %d tokens ran out of memory; %s gives way (%s)", tokens, relief.name.lower(), reason)
        match relief:
            case Relief.PIECE:
                raise PieceAbandoned("serving needs its memory")
            case Relief.CACHES:
                self.runner.give_back()
            case Relief.TOKENS:
                self.scheduler.step_tokens = self.scarcity.allowance.tokens
            case Relief.REQUEST:
                self._refused += len(work)
                self.fail([w.sequence for w in work], OutOfMemory(_NO_MEMORY))

    def _shrink_pool(self) -> bool:
        """False when there is nothing that it could give now."""
        before = self._tiers.pool.capacity
        try:
            given = self._tiers.give_back(int(before * _POOL_SHARE))
        except torch.OutOfMemoryError as error:  # and the pool is lost
            raise DeviceLost(f"{self._base.device}: {error}") from error
        if given:
            log.warning(
                "the pool of adapters on %s gives %s back, and keeps %s. Set --device-bytes or --kv-bytes lower.",
                self._base.device,
                format_bytes(given),
                format_bytes(before - given),
            )
        return given > 0


_NO_MEMORY = (
    "The device has no memory left for this request, although everything else was tried. Try again in a while, with a "
    "shorter prompt; the operator can lower --kv-bytes or --device-bytes."
)


def _tokens(work: list[Work]) -> int:
    return sum(w.tokens for w in work)
