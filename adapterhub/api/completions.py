"""`/v1/completions`: a plain prompt, as text or as token ids."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from adapterhub.api.auth import Caller
from adapterhub.api.generation import Generation, GenerationRequest, Piece, TokenId
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.models import find_model
from adapterhub.api.streaming import Form, Json, respond
from adapterhub.base.request import Token
from adapterhub.base.text import TextCodec
from adapterhub.errors import BadRequest

router = APIRouter(prefix="/v1", tags=["inference"])
MAX_PROMPTS = 64
_DEFAULT_TOKENS = 16


class CompletionRequest(GenerationRequest):
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    echo: bool | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None


@router.post("/completions", response_model=None)
async def create(hub: TheHub, caller: Caller, body: CompletionRequest, request: Request) -> Response:
    body.check(hub, echo=body.echo, best_of=body.best_of not in (None, 1), suffix=body.suffix)
    model = find_model(hub, caller, body.model)
    prompts = await asyncio.to_thread(_prompts, hub, body.prompt)
    plan = body.sampling(body.max_tokens or _DEFAULT_TOKENS, body.logprobs)
    for prompt in prompts:
        hub.engine.check_length(len(prompt), plan.max_tokens)
    generation = Generation(hub, caller.owner, model, prompts, body, plan)
    return await respond(request, body, generation, _form(hub.codec, generation.choices))


def _form(codec: TextCodec, choices: int) -> Form:
    offsets = [0] * choices  # how much of each streamed text there has been

    def part(piece: Piece) -> Json:
        choice = _choice(codec, piece, offsets[piece.index])
        offsets[piece.index] += len(piece.text)
        return choice

    return Form("cmpl", "text_completion", "text_completion", lambda answer: _choice(codec, answer, 0), part)


def _choice(codec: TextCodec, piece: Piece, offset: int) -> Json:
    logprobs = _logprobs(codec, piece.tokens, offset) if piece.tokens else None
    return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}


def _logprobs(codec: TextCodec, tokens: tuple[Token, ...], offset: int) -> Json:
    texts = [codec.token_bytes(token.id).decode(errors="replace") for token in tokens]
    best = [{codec.token_bytes(b.token).decode(errors="replace"): b.logprob for b in t.best} for t in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": best,
        "text_offset": [offset + sum(map(len, texts[:at])) for at in range(len(texts))],
    }


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
