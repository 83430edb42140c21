"""OpenTelemetry spans of a request's way, when an exporter is configured in the environment as OpenTelemetry has it.

A span has a route's pattern, sizes and times. As logs, it has no path, name, prompt or answer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from opentelemetry.propagate import extract
from opentelemetry.trace import NoOpTracer, Span, SpanKind, StatusCode, Tracer

from adapterhub import __version__
from adapterhub.errors import BadRequest

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracing:
    """`tracer` does nothing unless there is somebody to tell."""

    def __init__(self, provider: Any = None) -> None:
        """`provider`: the SDK's; None: no spans."""
        self._provider = provider
        self.tracer: Tracer = NoOpTracer() if provider is None else provider.get_tracer("adapterhub", __version__)

    @classmethod
    def from_environment(cls) -> Tracing:
        """Raises BadRequest where an exporter is configured and cannot be had."""
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
        if endpoint is None or os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
            return cls()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise BadRequest(
                f"Spans are to be sent to {endpoint}, which needs `pip install 'adapterhub[otel]'`."
            ) from error
        resource = Resource.create()  # as the environment names it
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "adapterhub"}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def request(self, method: str, headers: Mapping[str, str]) -> Any:
        """A request's span, as a context manager: it goes on from what the client's `traceparent` says."""
        return self.tracer.start_as_current_span(
            method,
            context=extract(headers),
            kind=SpanKind.SERVER,
            record_exception=False,
            set_status_on_exception=False,
        )

    def close(self) -> None:
        """Sends what was not sent yet."""
        if self._provider is not None:
            self._provider.shutdown()


def name_request(span: Span, method: str, route: str | None, status: int, identity: str) -> None:
    """What is known of a request once it was answered."""
    span.update_name(f"{method} {route}" if route else method)
    span.set_attributes({
        "http.request.method": method,
        "http.route": route or "",
        "http.response.status_code": status,
        "adapterhub.request_id": identity,
    })  # fmt: skip
    if status >= 500:
        span.set_status(StatusCode.ERROR)
