"""What Prometheus and OpenTelemetry are told: of everything that happens, and nothing of whose it is."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from adapterhub.api.devices import Devices
from adapterhub.api.tracing import Tracing
from adapterhub.errors import BadRequest
from tests.serving import BASE, SECONDS, PeftFiles, Server, chat_lines, eventually, running, small_config
from tests.test_bad_input import CHAT, HELLO, PLAIN, refused

Values = Counter[str]


@pytest.fixture(scope="module")
def told(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose numbers no other test changes."""
    with running(small_config(base_directory, tmp_path_factory.mktemp("told"))) as started:
        yield started


def values(text: str) -> Values:
    """Every sample by its name and labels but the model's name."""
    found: Values = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model_name")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] += sample.value
    return found


def read(server: Server) -> Values:
    return values(server.admin.http.get("/metrics").raise_for_status().text)


def test_requests_and_tokens_are_counted_as_they_are(told: Server) -> None:
    before, user = read(told), told.user()
    answers = [
        user.http.post(CHAT, json={"model": BASE, "messages": HELLO, "max_tokens": n, "ignore_eos": True}).json()[
            "usage"
        ]
        for n in (1, 5, 9)
    ]
    user.http.post(CHAT, json={"model": "nobody/nothing", "messages": HELLO})
    new = read(told) - before
    assert new["vllm:prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in answers)
    assert new["vllm:generation_tokens_total"] == 15
    assert new["vllm:request_success_total{finished_reason=length}"] == 3
    assert new["vllm:time_to_first_token_seconds_count"] == 3
    assert new["vllm:request_queue_time_seconds_count"] == 3
    assert 0 <= new["vllm:request_queue_time_seconds_sum"] <= new["vllm:time_to_first_token_seconds_sum"]
    assert new["vllm:inter_token_latency_seconds_count"] == 12
    assert new["vllm:e2e_request_latency_seconds_count"] == 3
    assert new[f"http_requests_total{{handler={CHAT},method=POST,status=200}}"] == 3
    assert new[f"http_requests_total{{handler={CHAT},method=POST,status=404}}"] == 1
    assert 0 < new["vllm:prefix_cache_hits_total"] < new["vllm:prefix_cache_queries_total"]
    assert new["vllm:prefix_cache_queries_total"] == new["vllm:prompt_tokens_total"]


def test_a_stop_string_is_a_stop_and_a_client_that_goes_away_an_abort(told: Server) -> None:
    before, user = read(told), told.user()
    said = user.http.post(
        PLAIN, json={"model": BASE, "prompt": "a", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    )
    text = said.json()["choices"][0]["text"]
    body = {"model": BASE, "prompt": "a", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stop": text[:1]}
    assert user.http.post(PLAIN, json=body).json()["choices"][0]["finish_reason"] == "stop"
    with user.http.stream(
        "POST", PLAIN, json={"model": BASE, "prompt": "a", "max_tokens": 480, "stream": True, "ignore_eos": True}
    ) as answer:
        next(answer.iter_lines())
    eventually(lambda: (read(told) - before)["vllm:request_success_total{finished_reason=abort}"] == 1)
    assert (read(told) - before)["vllm:request_success_total{finished_reason=stop}"] == 1


def test_tiers_loads_and_jobs_are_told(told: Server, adapter: PeftFiles) -> None:
    user = told.user()
    before = read(told)
    made = user.import_adapter(adapter, "mine")
    assert user.tier(made["model"]) == "disk"
    assert user.tier(made["model"]) == "device"
    told.evict(made["id"])
    new = read(told) - before
    assert new["adapterhub:tier_hits_total{tier=device}"] == 1
    assert new["adapterhub:adapter_load_seconds_count{tier=disk}"] == 1
    assert new["adapterhub:tier_loads_total{tier=device}"] == 1
    user.job(user.train(chat_lines(), max_steps=1), "succeeded")
    after = read(told)
    new = after - before
    assert after["adapterhub:tier_adapters{tier=disk}"] == 2
    assert after["adapterhub:tier_used_bytes{tier=disk}"] > 0
    assert after["adapterhub:tier_budget_bytes{tier=device}"] == told.hub.engine.budgets.device
    assert new["adapterhub:jobs{status=succeeded}"] == 1
    assert new["adapterhub:train_tokens_total"] > 0
    assert after["adapterhub:engine_up"] == 1


def test_series_do_not_grow_with_owners_names_or_what_strangers_send(told: Server, adapter: PeftFiles) -> None:
    def visit(name: str) -> None:
        user = told.user(owner=f"secret-{name}")
        user.import_adapter(adapter, f"private-{name}")
        user.ask(f"secret-{name}/private-{name}")
        for path in (f"/v1/models/{name}", f"/v1/files/{name}", f"/{name}", f"/v1/adapters/{name}"):
            user.http.get(path)
            user.http.request("LOCK", path)

    visit("zulu")
    before = told.admin.http.get("/metrics").text
    for number in range(3):
        visit(f"yankee{number}")
    after = told.admin.http.get("/metrics").text
    assert values(after).keys() == values(before).keys()
    assert not re.search("secret|private|zulu|yankee", after)


def test_metrics_are_the_operators(told: Server) -> None:
    refused(httpx.get(f"{told.url}/metrics"), 401, "missing_api_key")
    refused(told.user().http.get("/metrics"), 403, "insufficient_permissions", "--admin")


def test_a_port_of_the_loopback_address_needs_no_key(told: Server, base_directory: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadRequest, match=f"{port}"):
            told.hub.metrics.listen(port)
    with running(small_config(base_directory, tmp_path, metrics_port=port)):
        assert "vllm:num_requests_running" in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS).text


# -- spans


def test_spans_tell_a_requests_way_and_none_of_its_data(told: Server, adapter: PeftFiles) -> None:
    heard, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(heard))
    user = told.user(owner="secret-spans")
    user.import_adapter(adapter, "private")
    silent, told.hub.tracing = told.hub.tracing, Tracing(provider)
    try:
        parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        body = {"model": "secret-spans/private", "messages": HELLO, "max_tokens": 3, "ignore_eos": True}
        answer = user.http.post(CHAT, json=body, headers=parent)
        eventually(lambda: len(heard.get_finished_spans()) == 4)
    finally:
        told.hub.tracing = silent
    spans: dict[str, ReadableSpan] = {span.name: span for span in heard.get_finished_spans()}
    assert spans.keys() == {f"POST {CHAT}", "answer", "first token", "decode"}
    request, whole, first = spans[f"POST {CHAT}"], spans["answer"], spans["first token"]
    assert f"{request.context.trace_id:x}" == "a" * 32
    assert request.attributes is not None
    assert whole.attributes is not None
    assert first.attributes is not None
    assert request.attributes["adapterhub.request_id"] == answer.headers["x-request-id"]
    assert request.attributes["http.response.status_code"] == 200
    assert whole.parent is not None
    assert whole.parent.span_id == request.context.span_id
    assert first.parent is not None
    assert first.parent.span_id == whole.context.span_id
    assert first.attributes["adapterhub.tier"] == "disk"
    assert whole.attributes["gen_ai.usage.output_tokens"] == 3
    assert not re.search("secret|private|Hello", "".join(span.to_json() for span in spans.values()))


def test_spans_are_off_unless_an_exporter_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracing.from_environment().request("GET", {}) as span:
        assert not span.is_recording()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    with Tracing.from_environment().request("GET", {}) as span:
        assert not span.is_recording()


@pytest.mark.parametrize("given", [None, "my-hub"])
def test_spans_are_sent_to_where_the_environment_says_under_the_name_that_it_gives(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    bodies: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        if given is not None:
            monkeypatch.setenv("OTEL_SERVICE_NAME", given)
        tracing = Tracing.from_environment()
        tracing.tracer.start_span("a span of ours").end()
        tracing.close()
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    [(path, body)] = bodies
    assert path == "/v1/traces"
    assert b"a span of ours" in body
    assert (given or "adapterhub").encode() in body
    assert b"unknown_service" not in body


def test_the_dashboard_asks_for_what_there_is(told: Server) -> None:
    told.user().ask(BASE)
    known = {name for f in text_string_to_metric_families(told.admin.http.get("/metrics").text) for name in names_of(f)}
    device = {f"adapterhub:device_{name}" for name in ("memory_used_bytes", "memory_total_bytes", "utilization_ratio")}
    dashboard = json.loads(Path(__file__).parents[1].joinpath("docs", "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found = {name for text in asked for name in re.findall(r"((?:vllm:|adapterhub:|http_)\w+)\{", text)}
    assert found <= known | device, found - known - device
    assert found >= device


def names_of(family: Metric) -> set[str]:
    return {sample.name for sample in family.samples} | {family.name, f"{family.name}_total", f"{family.name}_bucket"}


def test_a_processor_has_its_memory_and_nothing_of_what_gpus_tell() -> None:
    told = {family.name for family in Devices({"cpu": torch.device("cpu")}).collect()}
    assert told == {"adapterhub:device_memory_total_bytes", "adapterhub:device_memory_used_bytes"}
