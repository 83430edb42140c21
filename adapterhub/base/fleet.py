"""One engine for each device, as one: requests are placed, everything else is asked of all of them.

The engines share nothing but the disk. Where a request goes is decided when it comes, from what each engine has at that
moment (`placement.py`); from then on it belongs to that engine. Each engine has training of its own in its spare time,
on its own base. An engine that has ended takes no part any more: its requests have failed, and the others go on.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from adapterhub.base.budgets import Budgets
from adapterhub.base.engine import Engine
from adapterhub.base.model import Base
from adapterhub.base.placement import margin_of, place
from adapterhub.base.request import Output, Request
from adapterhub.base.totals import totals
from adapterhub.config import Config
from adapterhub.errors import Unavailable
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.policies import Rules
from adapterhub.swap.ref import AdapterRef, Tier, Use
from adapterhub.swap.residency import Plan

T = TypeVar("T")
R = TypeVar("R")
_REMEMBERED = 65536  # owners and adapters, of which is known where they ran last
_NEAREST = (Tier.DEVICE, Tier.RAM, Tier.DISK, Tier.REMOTE)


class Fleet:
    """`on_output` is called on the engines' threads, on several at once; `on_use` on one at a time. Neither may block.

    What is asked of all engines is answered by those that have not ended, and raises Unavailable when all have.
    """

    def __init__(
        self,
        bases: Sequence[Base],
        config: Config,
        on_output: Callable[[list[Output]], None],
        *,
        disk: DiskTier | None = None,
        rules: Rules | None = None,
        on_use: Callable[[Use], None] | None = None,
    ) -> None:
        """The same base once on each device. Budgets are each device's."""
        self.base = bases[0]
        disk = disk or DiskTier(config.blobs_dir)
        self._noting = threading.Lock()

        def note(use: Use) -> None:
            assert on_use is not None
            with self._noting:
                on_use(use)

        used = None if on_use is None else note
        self.engines = [Engine(base, config, on_output, disk=disk, rules=rules, on_use=used) for base in bases]
        self.names = names_of([str(base.device) for base in bases])
        self.context = min(engine.context for engine in self.engines)
        self._margin = margin_of(config.max_batch)
        self._placing = threading.Lock()  # guards `_last`; who comes next sees where the one before went
        self._last: OrderedDict[tuple[str, str | None], int] = OrderedDict()  # owner and digest -> engine

    # -- the engines' lives

    def start(self) -> None:
        """All are warm when it returns. Raises what keeps one of them from serving."""
        for engine in self.engines:
            engine.start()
        for warm in [engine.warm_up() for engine in self.engines]:
            warm.result()

    def stop(self) -> None:
        """Ends all; what was under way fails with Unavailable."""
        for engine in self.engines:
            engine.stop()

    @property
    def alive(self) -> bool:
        """Requests are answered, though perhaps not on all devices."""
        return any(engine.alive for engine in self.engines)

    @property
    def degraded(self) -> bool:
        """Some devices are lost, until a restart."""
        return self.alive and not all(engine.alive for engine in self.engines)

    # -- requests

    def submit(self, request: Request) -> None:
        """Queues a request where it is placed. Raises as `Engine.submit` does."""
        self.check_length(len(request.prompt), request.sampling.max_tokens)
        with self._placing:
            while True:
                index = self._place(request.owner, request.adapter)
                try:
                    self.engines[index].submit(request)
                except Unavailable:
                    if all(engine.ended for engine in self.engines):
                        raise
                    continue  # it has ended just now
                self._remember(request.owner, request.adapter, index)
                return

    def check_length(self, prompt: int, max_tokens: int, param: str | None = None) -> None:
        """Raises ContextLengthExceeded as `Engine.check_length` does: wherever a request goes, it is the same."""
        shortest = min(self.engines, key=lambda engine: engine.context)
        shortest.check_length(prompt, max_tokens, param)

    def cancel(self, request: str) -> None:
        """Forgets a request; nothing more comes of it."""
        for engine in self.engines:
            engine.cancel(request)

    def prefetch(self, adapter: AdapterRef) -> None:
        """A hint to the engine to which a request would go now. Never fails."""
        with self._placing:
            index = self._place(adapter.owner, adapter)
        self.engines[index].prefetch(adapter)

    # -- what is asked of all engines

    def evict(self, digest: str, tier: Tier | None = None) -> Future[bool]:
        """Everywhere; False when it must wait for the requests that use it somewhere."""
        return self._of_all(lambda engine: engine.evict(digest, tier), all)

    def pin(self, digest: str, pinned: bool) -> Future[None]:
        """Keeps a block in memory wherever it is now, or no longer."""
        return self._of_all(lambda engine: engine.pin(digest, pinned), _nothing)

    @property
    def budgets(self) -> Budgets:
        """The first device's: all have the same, but for what was left to be chosen by their memory."""
        return self.engines[0].budgets

    @property
    def kv_tokens(self) -> int:
        """How many tokens fit in all KV caches."""
        return sum(engine.kv.capacity for engine in self.engines)

    def set_budgets(self, device: int | None = None, ram: int | None = None) -> Future[None]:
        """Each device's, in bytes, as `Engine.set_budgets`; what one cannot change, none changes."""
        before = {engine: engine.budgets for engine in self.engines}
        done: Future[None] = Future()
        changing = self._ask(lambda engine: engine.set_budgets(device, ram))

        def settle() -> None:
            failed = [error for future in _living(changing).values() if (error := future.exception()) is not None]
            if not failed:
                done.set_result(None)
                return
            changed = [engine for engine, future in changing.items() if future.exception() is None]
            undone = _asked(changed, lambda e: e.set_budgets(*_former(before[e], device, ram)))
            _when_all(undone.values(), lambda: done.set_exception(failed[0]))

        _when_all(changing.values(), settle)
        return done

    def set_rules(self, rules: Rules) -> Future[None]:
        return self._of_all(lambda engine: engine.set_rules(rules), _nothing)

    def plan(self, rules: Rules | None = None, device: int | None = None, ram: int | None = None) -> Future[Plan]:
        """What would leave some device, or its host tier."""
        return self._of_all(lambda engine: engine.plan(rules, device, ram), _union)

    def tiers_of(self, digests: list[str]) -> Future[list[Tier]]:
        """The nearest tier of any device."""
        return self._of_all(
            lambda engine: engine.tiers_of(digests),
            lambda found: [min(tiers, key=_NEAREST.index) for tiers in zip(*found, strict=True)],
        )

    def stats(self) -> Future[dict[str, Any]]:
        """The sums of all engines, and under `devices` each one's own numbers."""
        asked = self._ask(Engine.stats)
        names = dict(zip(self.engines, self.names, strict=True))

        def told(own: dict[Engine, dict[str, Any]]) -> dict[str, Any]:
            devices = [_own(names[engine], own.get(engine)) for engine in self.engines]
            return {**totals(list(own.values())), "devices": devices}

        return _gathered(asked, told)

    def erase(self, owner: str) -> Future[int]:
        """Forgets what is kept of an owner's prompts and answers; how many KV blocks that were."""
        with self._placing:
            for known in [key for key in self._last if key[0] == owner]:
                del self._last[known]
        return self._of_all(lambda engine: engine.erase(owner), lambda counts: sum(counts))

    def check_integrity(self) -> Future[None]:
        return self._of_all(Engine.check_integrity, _nothing)

    # -- how it is done

    def _place(self, owner: str, adapter: AdapterRef | None) -> int:
        if len(self.engines) == 1:
            return 0
        last = self._last.get(_key(owner, adapter))
        seats = [engine.seat(adapter, warm=last == index) for index, engine in enumerate(self.engines)]
        return place(seats, self._margin) if any(seats) else 0

    def _remember(self, owner: str, adapter: AdapterRef | None, index: int) -> None:
        if len(self.engines) == 1:
            return
        key = _key(owner, adapter)
        self._last[key] = index
        self._last.move_to_end(key)
        if len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)

    def _ask(self, question: Callable[[Engine], Future[T]]) -> dict[Engine, Future[T]]:
        """Raises Unavailable when all engines have ended."""
        return _asked(self.engines, question) or {self.engines[0]: question(self.engines[0])}

    def _of_all(self, question: Callable[[Engine], Future[T]], combine: Callable[[list[T]], R]) -> Future[R]:
        return _gathered(self._ask(question), lambda answers: combine(list(answers.values())))


def names_of(devices: Sequence[str]) -> list[str]:
    """One for each device: its own, or, where several have the same, with a number."""
    count = Counter(devices)
    return [name if count[name] == 1 else f"{name}:{index}" for index, name in enumerate(devices)]


def _asked(engines: Iterable[Engine], question: Callable[[Engine], Future[T]]) -> dict[Engine, Future[T]]:
    """Those that have ended are left out."""
    asked = {}
    for engine in engines:
        try:
            asked[engine] = question(engine)
        except Unavailable:
            continue
    return asked


def _gathered(asked: dict[Engine, Future[T]], combine: Callable[[dict[Engine, T]], R]) -> Future[R]:
    """What `combine` makes of all answers, on the thread that gives the last one; or the first error."""
    done = Future[R]()

    def settle() -> None:
        try:
            done.set_result(combine({engine: future.result() for engine, future in _living(asked).items()}))
        except BaseException as error:
            done.set_exception(error)

    _when_all(asked.values(), settle)
    return done


def _living(asked: dict[Engine, Future[T]]) -> dict[Engine, Future[T]]:
    """Without those that ended instead of answering, unless all did."""
    return {e: f for e, f in asked.items() if not (e.ended and isinstance(f.exception(), Unavailable))} or asked


def _when_all(futures: Iterable[Future[Any]], act: Callable[[], None]) -> None:
    """Acts once all are done; at once if there are none."""
    futures = list(futures)
    left, counting = len(futures), threading.Lock()
    if not futures:
        act()

    def note(_: Future[Any]) -> None:
        nonlocal left
        with counting:
            left -= 1
            last = left == 0
        if last:
            act()

    for future in futures:
        future.add_done_callback(note)


def _key(owner: str, adapter: AdapterRef | None) -> tuple[str, str | None]:
    return owner, adapter.digest if adapter is not None else None


def _former(budgets: Budgets, device: int | None, ram: int | None) -> tuple[int | None, int | None]:
    return None if device is None else budgets.device, None if ram is None else budgets.ram


def _own(name: str, stats: dict[str, Any] | None) -> dict[str, Any]:
    """None of what the engines share, and only the name of one that has ended."""
    if stats is None:
        return {"device": name, "alive": False}
    tiers = {tier: stats["tiers"][tier] for tier in ("device", "ram")}
    return {"device": name, "alive": True, "tiers": tiers, "engine": stats["engine"]}


def _union(plans: list[Plan]) -> Plan:
    """Each block once."""
    device = {digest: size for plan in plans for digest, size in plan.device}
    ram = {digest: size for plan in plans for digest, size in plan.ram}
    return Plan(list(device.items()), list(ram.items()))


def _nothing(_: list[None]) -> None:
    return None
