"""What Prometheus reads at `/metrics`. A name is vLLM's where vLLM has one, so that dashboards for it work.

Counters and histograms are added to as things happen; all else is read from the engine's and the database's own counts
when somebody asks. No label ever names an owner, an adapter or a path: the number of time series does not grow with
users, and who may read them learns nothing of any.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector

from adapterhub.api.auth import Admin
from adapterhub.api.devices import Devices
from adapterhub.errors import BadRequest, HubError
from adapterhub.swap.ref import Tier, Use

log = logging.getLogger(__name__)
router = APIRouter(include_in_schema=False)
Stats = dict[str, Any]
Values = list[tuple[tuple[str, ...], float]]  # of labels
_PATIENCE_SECONDS = 10.0  # with an engine that does not say how it is
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_LOADS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """One hub's, in a registry of its own. Safe to use from any thread."""

    def __init__(
        self, model: str, devices: Devices, stats: Callable[[], Future[Stats]], jobs: Callable[[], dict[str, int]]
    ) -> None:
        """`stats` are the engines'; `jobs` says how many there are in each state."""
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, ["model_name", *labels], buckets=buckets, registry=self.registry)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.").labels(model)
        self._tokens = counter("vllm:generation_tokens", "Tokens of answers.").labels(model)
        self._ended = counter("vllm:request_success", "Answers that have ended, by why.", "finished_reason")
        first = histogram("vllm:time_to_first_token_seconds", "From a request to its first token.", _FIRST)
        between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", _BETWEEN)
        whole = histogram("vllm:e2e_request_latency_seconds", "From a request to its last token.", _WHOLE)
        queued = histogram("vllm:request_queue_time_seconds", "From a request to its first step.", _FIRST)
        self._first, self._between, self._whole = first.labels(model), between.labels(model), whole.labels(model)
        self._queued = queued.labels(model)
        self._loads = histogram(
            "adapterhub:adapter_load_seconds",
            "Until an adapter that was not on the device was there, by the tier it came from, for those who asked.",
            _LOADS,
            "tier",
        )
        self._model = model
        self._requests = Counter(
            "http_requests", "Requests by route.", ["handler", "method", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds", "Until an answer was sent.", ["handler", "method"], registry=self.registry
        )
        self.registry.register(Snapshot(model, devices, stats, jobs))
        ProcessCollector(registry=self.registry)
        self._listener: Any = None

    # -- what happens

    def prompt(self, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def token(self) -> None:
        self._tokens.inc()

    def first_token(self, seconds: float, queued: float) -> None:
        """`queued`: of the seconds, those before the first step. Of a request for no token, when its prompt was
        through."""
        self._first.observe(seconds)
        self._queued.observe(queued)

    def next_token(self, seconds: float) -> None:
        self._between.observe(seconds)

    def ended(self, reason: str, seconds: float) -> None:
        """`reason`: stop, length, abort (the client went away) or error."""
        self._ended.labels(self._model, reason).inc()
        self._whole.observe(seconds)

    def used(self, use: Use) -> None:
        """An adapter answers a request; nothing to tell where it was on the device."""
        if use.tier is not Tier.DEVICE:
            self._loads.labels(self._model, use.tier.value).observe(use.load_ms / 1e3)

    def answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """`route`: the pattern; None where there was none. Status 0: the client went away before."""
        method = method if method in _METHODS else "other"
        handler = route or "none"
        self._requests.labels(handler, method, str(status or 499)).inc()
        self._seconds.labels(handler, method).observe(seconds)

    # -- who reads it

    def text(self) -> bytes:
        """May wait for the engine."""
        return generate_latest(self.registry)

    def listen(self, port: int) -> None:
        """Answers `GET /metrics` on a port of the loopback address, without a key. Raises BadRequest."""
        try:
            self._listener, _ = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except OSError as error:
            raise BadRequest(f"Cannot listen on 127.0.0.1:{port} for metrics: {error.strerror}.") from error

    def close(self) -> None:
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()


@router.get("/metrics")
def metrics(caller: Admin, request: Request) -> Response:
    return Response(request.app.state.hub.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class Snapshot(Collector):
    """What is counted elsewhere, at the moment somebody asks."""

    def __init__(
        self, model: str, devices: Devices, stats: Callable[[], Future[Stats]], jobs: Callable[[], dict[str, int]]
    ) -> None:
        self._model, self._devices, self._stats, self._jobs = model, devices, stats, jobs

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._stats().result(_PATIENCE_SECONDS)
        except (HubError, TimeoutError):
            yield _gauge("adapterhub:engine_up", "Whether the engine runs.", [((), 0)])
            return
        yield _gauge("adapterhub:engine_up", "Whether the engine runs.", [((), 1)])
        yield from self._engine(stats["engine"])
        yield from _tiers(stats["tiers"])
        yield from _training(stats["engine"]["training"])
        yield _gauge("adapterhub:jobs", "Fine-tuning jobs.", [((s,), n) for s, n in self._jobs().items()], "status")
        yield from _devices(stats["devices"])
        yield from self._devices.collect()

    def _engine(self, engine: Stats) -> Iterator[Metric]:
        for name, text, value in (
            ("num_requests_running", "Answers under way.", engine["running"]),
            ("num_requests_waiting", "Requests in the queue.", engine["waiting"]),
            (
                "kv_cache_usage_perc",
                "Of the KV cache, from 0 to 1.",
                1 - engine["kv_blocks_free"] / engine["kv_blocks"],
            ),
        ):
            yield _gauge(f"vllm:{name}", text, [((self._model,), value)], "model_name")
        for name, text, value in (
            ("queries", "Tokens that were looked for in the KV cache.", engine["sought_tokens"]),
            ("hits", "Of them, those that were there and so not computed.", engine["shared_tokens"]),
        ):
            prefixes = CounterMetricFamily(f"vllm:prefix_cache_{name}", text, labels=["model_name"])
            prefixes.add_metric([self._model], value)
            yield prefixes
        yield CounterMetricFamily("adapterhub:engine_steps", "Forwards.", value=engine["steps"])


def _tiers(tiers: Stats) -> Iterator[Metric]:
    for key, name, text in (
        ("budget_bytes", "tier_budget_bytes", "What a tier may hold."),
        ("used_bytes", "tier_used_bytes", "What it holds."),
        ("adapters", "tier_adapters", "Blocks in it."),
        ("pinned", "tier_pinned_adapters", "Of them, those that are pinned."),
    ):
        yield _gauge(f"adapterhub:{name}", text, [((t,), s[key]) for t, s in tiers.items() if key in s], "tier")
    for key, name, text in (
        ("hits", "tier_hits", "Look-ups that found their adapter there."),
        ("evictions", "tier_evictions", "Blocks that had to leave."),
        ("loads", "tier_loads", "Blocks read from it; of the device, into it."),
    ):
        family = CounterMetricFamily(f"adapterhub:{name}", text, labels=["tier"])
        for tier, stats in tiers.items():
            if key in stats:
                family.add_metric([tier], stats[key])
        yield family


def _devices(devices: list[Stats]) -> Iterator[Metric]:
    """What each device has of what the others tell of all together; nothing but its end of one that is lost."""
    up: Values = [((device["device"],), float(device["alive"])) for device in devices]
    yield _gauge("adapterhub:device_up", "Whether its engine runs.", up, "device")
    living = [(device["device"], device["engine"], device["tiers"]["device"]) for device in devices if device["alive"]]
    for name, text, values in (
        ("requests_running", "Answers under way.", [e["running"] for _, e, _ in living]),
        ("requests_waiting", "Requests in its queue.", [e["waiting"] for _, e, _ in living]),
        ("kv_usage_ratio", "Of its KV cache.", [1 - e["kv_blocks_free"] / e["kv_blocks"] for _, e, _ in living]),
        ("pool_budget_bytes", "What its pool of adapters may hold.", [pool["budget_bytes"] for *_, pool in living]),
        ("pool_used_bytes", "What it holds.", [pool["used_bytes"] for *_, pool in living]),
        ("adapters", "Adapters on it.", [pool["adapters"] for *_, pool in living]),
        ("train_runs", "Jobs that train on it now.", [e["training"]["runs"] for _, e, _ in living]),
        ("step_tokens", "A step's at most; fewer after there was no memory.", [e["step_tokens"] for _, e, _ in living]),
    ):
        told: Values = [((device,), value) for (device, *_), value in zip(living, values, strict=True)]
        yield _gauge(f"adapterhub:device_{name}", text, told, "device")
    short = CounterMetricFamily(
        "adapterhub:out_of_memory",
        "Steps, and pieces of training, that found no memory and were done again; requests that failed for it.",
        labels=["device", "of"],
    )
    for device, engine, _ in living:
        short.add_metric([device, "step"], engine["out_of_memory"])
        short.add_metric([device, "piece"], engine["training"]["out_of_memory"])
        short.add_metric([device, "request"], engine["refused"])
    yield short


def _training(training: Stats) -> Iterator[Metric]:
    yield _gauge("adapterhub:train_runs", "Jobs that train now.", [((), training["runs"])])
    yield _gauge("adapterhub:train_share", "Of the last 10 s, training's.", [((), training["share"])])
    yield _gauge("adapterhub:train_tokens_per_second", "Of the last 10 s.", [((), training["tokens_per_second"])])
    yield CounterMetricFamily("adapterhub:train_tokens", "Tokens trained.", value=training["tokens"])


def _gauge(name: str, text: str, values: Values, *labels: str) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family
