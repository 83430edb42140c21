"""How a generation is answered: whole, or as server-sent events as OpenAI's clients read them.

A stream is `data: {...}` lines, `data: [DONE]` last. A failure after the first byte cannot be an HTTP status any more;
it is sent as `data: {"error": {...}}`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapterhub.api.fields import GenerationRequest
from adapterhub.api.generation import Generation, Piece, while_connected
from adapterhub.errors import HubError, ServerFault
from adapterhub.swap.database import now

log = logging.getLogger(__name__)
CLIENT_GONE = 499  # nobody reads it
Json = dict[str, Any]
Written = TypeVar("Written")
_AT_ONCE = 64  # tokens whose log probabilities are written in a few milliseconds, the best 20 of each


@dataclass(frozen=True)
class Form:
    """How an endpoint writes an answer: its ids and objects, a choice made of a whole answer, one made of a piece of
    it, None where that has nothing to tell, and what each choice of a stream begins with."""

    prefix: str
    whole_object: str
    chunk_object: str
    whole: Callable[[Piece], Json]
    part: Callable[[Piece], Json | None]
    opening: Callable[[int], Json] | None = None


async def respond(request: Request, body: GenerationRequest, generation: Generation, form: Form) -> Response:
    """Answers `body`; stops the generation when the client goes away."""
    created = now()

    def head(kind: str) -> Json:
        return {
            "id": f"{form.prefix}-{generation.id}",
            "object": kind,
            "created": created,
            "model": generation.model.name,
            "system_fingerprint": generation.model.system_fingerprint,
        }

    if not body.stream:
        answers = await while_connected(request, generation.whole())
        if answers is None:
            return Response(status_code=CLIENT_GONE)

        def written() -> Response:
            whole = {"choices": list(map(form.whole, answers)), "usage": generation.usage}
            return JSONResponse(head(form.whole_object) | whole, headers=generation.headers)

        return await _aside(sum(len(piece.tokens) for piece in answers), written)
    if await while_connected(request, generation.started()) is None:
        return Response(status_code=CLIENT_GONE)
    return _Stream(generation, _events(generation, head(form.chunk_object), form, body.wants_usage))


class _Stream(StreamingResponse):
    """Closes its generation, too, when the client has gone away before the first event could be sent."""

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=generation.headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.close()


async def _events(generation: Generation, head: Json, form: Form, wants_usage: bool) -> AsyncIterator[str]:
    no_usage = {"usage": None} if wants_usage else {}

    def chunk(choice: Json) -> str:
        return _event(head | {"choices": [choice]} | no_usage)

    def told(piece: Piece) -> str | None:
        choice = form.part(piece)
        return None if choice is None else chunk(choice)

    try:
        if form.opening is not None:
            for index in range(generation.choices):
                yield chunk(form.opening(index))
        async for piece in generation.pieces():
            if event := await _aside(len(piece.tokens), partial(told, piece)):
                yield event
        if wants_usage:
            yield _event(head | {"choices": [], "usage": generation.usage})
        yield "data: [DONE]\n\n"
    except HubError as error:
        yield _event(error.body)
    except Exception:
        log.exception("a stream failed")
        yield _event(ServerFault("The server met an unexpected error. Its log says more.").body)
    finally:
        await generation.close()


async def _aside(tokens: int, write: Callable[[], Written]) -> Written:
    """What `write` makes of so many tokens' log probabilities: on a thread where that would hold up the event loop."""
    return write() if tokens <= _AT_ONCE else await asyncio.to_thread(write)


def _event(chunk: Json) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
