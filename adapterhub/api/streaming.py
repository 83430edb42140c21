"""Server-sent events, as OpenAI's clients read them: `data: {...}` lines, `data: [DONE]` last.

A failure after the first byte cannot be an HTTP status any more; it is sent as `data: {"error": {...}}`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from fastapi.responses import StreamingResponse

from adapterhub.api.generation import Generation, Piece
from adapterhub.errors import HubError, ServerFault

log = logging.getLogger(__name__)
Chunk = dict[str, Any]


def stream(
    generation: Generation,
    opening: Iterable[Chunk],
    chunk_of: Callable[[Piece], Chunk],
    closing: Iterable[Callable[[], Chunk]],
) -> StreamingResponse:
    """Streams a started generation: `opening` chunks, one for each piece with news, then the `closing` ones."""

    async def events() -> AsyncIterator[str]:
        try:
            for chunk in opening:
                yield _event(chunk)
            async for piece in generation.pieces():
                if piece.text or piece.finish or piece.tokens:
                    yield _event(chunk_of(piece))
            for close in closing:
                yield _event(close())
            yield "data: [DONE]\n\n"
        except HubError as error:
            yield _event(error.body)
        except Exception:
            log.exception("a stream failed")
            yield _event(ServerFault("The server met an unexpected error. Its log says more.").body)
        finally:
            await generation.close()

    return StreamingResponse(events(), media_type="text/event-stream", headers=generation.headers)


def _event(chunk: Chunk) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
