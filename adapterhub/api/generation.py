"""One answer under way: from the engine's tokens to text, with stop strings, usage, and a client that may go away."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, Field

from adapterhub.api.body import Body
from adapterhub.api.hub import Hub
from adapterhub.api.models import Model
from adapterhub.base.request import Origin, Sampling
from adapterhub.base.request import Request as EngineRequest
from adapterhub.errors import BadRequest

Result = TypeVar("Result")
MAX_STOPS = 4
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class GenerationRequest(Body):
    """What chat and plain completions share. `ignore_eos` and `min_tokens` are vLLM's, for load generators."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: Stop | list[Stop] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    # known to OpenAI's clients, not supported yet: refused unless they ask for what is done anyway
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, **unsupported: Any) -> None:
        """Raises BadRequest for a field that is set to something that is not done. `unsupported`: more such fields."""
        if self.n not in (None, 1):
            raise BadRequest("n: only one answer per request is supported. Send the request several times.", param="n")
        if len(self.stops) > MAX_STOPS:
            raise BadRequest(f"stop: {len(self.stops)} strings; up to {MAX_STOPS} are supported.", param="stop")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options needs stream=true.", param="stream_options")
        fields = ("frequency_penalty", "presence_penalty", "logit_bias")
        for name, value in {**{f: getattr(self, f) for f in fields}, **unsupported}.items():
            if value:
                raise BadRequest(
                    f"{name} is not supported yet. Leave it out.", param=name, code="unsupported_parameter"
                )

    def sampling(self, max_tokens: int) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True)
class Piece:
    """More text of an answer; the last one says why it ended: "stop" or "length"."""

    text: str
    finish: str | None = None


class StopStrings:
    """Ends a text before the first of `stops`, and holds back what may still become one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """What of the text so far can be shown now."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.hit = True
            return self._held[: min(found)]
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        return "" if self.hit else self._held

    def _overlap(self, stop: str) -> int:
        """How much of the end of the held text is a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class Generation:
    """One answer: awaited as a `whole`, or `started` and then read piece by piece.

    Nothing is sent before it has started: whatever is wrong with a request shows by its first token.
    """

    def __init__(self, hub: Hub, model: Model, prompt: list[int], sampling: Sampling, stops: list[str]) -> None:
        self.id = secrets.token_hex(12)
        self.model = model
        self.prompt_tokens = len(prompt)
        self.completion_tokens = 0
        self.origin: Origin | None = None
        adapter = model.version.ref if model.version else None
        self._pieces = self._run(hub, EngineRequest(self.id, prompt, sampling, adapter), stops)
        self._first: Piece | None = None

    async def started(self) -> bool:
        self._first = await anext(self._pieces)
        return True

    async def whole(self) -> Piece:
        """The answer in one piece."""
        try:
            pieces = [piece async for piece in self._pieces]
        finally:
            await self.close()
        return Piece("".join(p.text for p in pieces), pieces[-1].finish)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything from the first piece on; the last one has a `finish`."""
        assert self._first is not None
        yield self._first
        async for piece in self._pieces:
            yield piece

    async def close(self) -> None:
        """Stops the engine's work on an answer that nobody waits for."""
        await self._pieces.aclose()

    @property
    def headers(self) -> dict[str, str]:
        version, origin = self.model.version, self.origin
        assert origin is not None
        return {
            "x-adapterhub-version": version.id if version else "base",
            "x-adapterhub-tier": origin.tier,
            "x-adapterhub-load-ms": f"{origin.load_ms:.2f}",
        }

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    async def _run(self, hub: Hub, request: EngineRequest, stops: list[str]) -> AsyncGenerator[Piece]:
        text, stopped = hub.codec.stream(request.prompt), StopStrings(stops)
        outputs = hub.run(request)
        try:
            async for output in outputs:
                self.origin = output.origin or self.origin
                self.completion_tokens += 1
                ends = output.finish == "stop"
                shown = stopped.push("" if ends or output.token is None else text.push(output.token))
                if stopped.hit:
                    yield Piece(shown, "stop")
                    return
                if output.last:
                    yield Piece(shown + stopped.flush(), output.finish)
                    return
                yield Piece(shown)
        finally:
            await outputs.aclose()


async def while_connected(request: Request, work: Awaitable[Result]) -> Result | None:
    """Awaits `work`, which is cancelled when the client goes away; None then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def longest_answer(hub: Hub, prompt: int, asked: int | None) -> int:
    """`asked`, or all that the context has left. Raises ContextLengthExceeded when that is nothing."""
    hub.engine.check_length(prompt, asked or 1)
    return asked or hub.engine.context - prompt
