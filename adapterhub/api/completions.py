"""`/v1/completions`: a plain prompt, as text or as token ids."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from adapterhub.api.auth import Caller
from adapterhub.api.generation import Generation, GenerationRequest, Piece, while_connected
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.models import find_model
from adapterhub.api.streaming import Chunk, stream
from adapterhub.errors import BadRequest
from adapterhub.swap.database import now

router = APIRouter(prefix="/v1", tags=["inference"])
MAX_PROMPTS = 64
_DEFAULT_TOKENS = 16
TokenId = Annotated[int, Field(ge=0)]


class CompletionRequest(GenerationRequest):
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    suffix: str | None = None


@router.post("/completions", response_model=None)
async def create(hub: TheHub, caller: Caller, body: CompletionRequest, request: Request) -> Response:
    best_of = body.best_of not in (None, 1)
    body.check(echo=body.echo, best_of=best_of, logprobs=body.logprobs is not None, suffix=body.suffix)
    model = find_model(hub, caller, body.model)
    prompts = await asyncio.to_thread(_prompts, hub, body.prompt)
    if body.stream and len(prompts) > 1:
        raise BadRequest("Several prompts cannot be streamed in one request. Send one request each.", param="prompt")
    sampling = body.sampling(body.max_tokens or _DEFAULT_TOKENS)
    for prompt in prompts:
        hub.engine.check_length(len(prompt), sampling.max_tokens)
    generations = [Generation(hub, model, prompt, sampling, body.stops) for prompt in prompts]
    head = {
        "id": f"cmpl-{generations[0].id}",
        "object": "text_completion",
        "created": now(),
        "model": model.name,
        "system_fingerprint": model.system_fingerprint,
    }
    if not body.stream:
        answer = await while_connected(request, _whole(generations, head))
        return answer or Response(status_code=499)
    [generation] = generations
    if await while_connected(request, generation.started()) is None:
        return Response(status_code=499)
    head |= {"usage": None} if body.wants_usage else {}

    def chunk_of(piece: Piece) -> Chunk:
        return {**head, "choices": [_choice(0, piece.text, piece.finish)]}

    closing = [lambda: {**head, "choices": [], "usage": generation.usage}] if body.wants_usage else []
    return stream(generation, [], chunk_of, closing)


async def _whole(generations: list[Generation], head: dict[str, Any]) -> JSONResponse:
    answers = await asyncio.gather(*(g.whole() for g in generations))
    choices = [_choice(at, answer.text, answer.finish) for at, answer in enumerate(answers)]
    usages = [g.usage for g in generations]
    usage = {name: sum(u[name] for u in usages) for name in usages[0]}
    return JSONResponse({**head, "choices": choices, "usage": usage}, headers=generations[0].headers)


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def _prompts(hub: Hub, prompt: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
    if isinstance(prompt, str):
        batch: list[Any] = [prompt]
    elif prompt and isinstance(prompt[0], int):
        batch = [prompt]
    else:
        batch = list(prompt)
    if not 1 <= len(batch) <= MAX_PROMPTS:
        raise BadRequest(f"prompt: {len(batch)} prompts; 1 to {MAX_PROMPTS} are supported.", param="prompt")
    tokens = [hub.codec.encode(p, special=True) if isinstance(p, str) else p for p in batch]
    for ids in tokens:
        if not ids:
            raise BadRequest("prompt is empty; there is nothing to continue.", param="prompt")
        if max(ids) >= hub.codec.vocabulary:
            raise BadRequest(
                f"prompt has the token id {max(ids)}; the base has {hub.codec.vocabulary}.", param="prompt"
            )
    return tokens
