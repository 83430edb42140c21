"""One answer's way through the engine, timed for metrics and told in spans."""

from __future__ import annotations

import time
from types import TracebackType

from opentelemetry.trace import Span, StatusCode, Tracer, set_span_in_context

from adapterhub.api.metrics import Metrics
from adapterhub.base.request import Output


class Passage:
    """From the request to its end: within it, tell of each output as it is heard, and of why the answer `finished`."""

    def __init__(self, metrics: Metrics, tracer: Tracer, prompt_tokens: int) -> None:
        self._metrics, self._tracer = metrics, tracer
        self._started = self._last = time.perf_counter()
        self._tokens = 0
        self._reason: str | None = None
        self._span = tracer.start_span("answer", attributes={"gen_ai.usage.input_tokens": prompt_tokens})
        self._part = self._begin("first token")
        metrics.prompt(prompt_tokens)

    def __enter__(self) -> Passage:
        return self

    def heard(self, output: Output) -> None:
        """A token, or that the prompt is through where none was asked for."""
        now, origin = time.perf_counter(), output.origin
        if origin is not None:
            self._metrics.first_token(now - self._started, origin.queued_ms / 1e3)
            self._part.set_attributes(
                {
                    "adapterhub.tier": origin.tier.value,
                    "adapterhub.load_ms": round(origin.load_ms, 3),
                    "adapterhub.queued_ms": round(origin.queued_ms, 3),
                }
            )
            self._part.end()
            self._part = self._begin("decode")
        else:
            self._metrics.next_token(now - self._last)
        if output.token is not None:
            self._metrics.token()
            self._tokens += 1
        self._last = now

    def finished(self, reason: str) -> None:
        self._reason = reason

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        reason = self._reason or ("error" if isinstance(error, Exception) else "abort")
        self._metrics.ended(reason, time.perf_counter() - self._started)
        self._part.end()
        self._span.set_attributes(
            {"gen_ai.usage.output_tokens": self._tokens, "gen_ai.response.finish_reasons": [reason]}
        )
        if reason == "error":
            self._span.set_status(StatusCode.ERROR, getattr(error, "code", None) or "")
        self._span.end()

    def _begin(self, name: str) -> Span:
        return self._tracer.start_span(name, context=set_span_in_context(self._span))
