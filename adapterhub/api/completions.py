"""`/v1/completions`: a plain prompt, as text or as token ids."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from adapterhub.api.auth import Inferring
from adapterhub.api.generation import Generation, GenerationRequest, Piece, Said, TokenId
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.models import choose_model
from adapterhub.api.streaming import Form, Json, respond
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
async def create(hub: TheHub, caller: Inferring, body: CompletionRequest, request: Request) -> Response:
    body.check(hub, echo=body.echo, best_of=body.best_of not in (None, 1), suffix=body.suffix)
    model = choose_model(hub, caller, body.model, body.user)
    prompts = await asyncio.to_thread(_prompts, hub, body.prompt)
    plan = body.sampling(body.max_tokens or _DEFAULT_TOKENS, body.logprobs)
    for prompt in prompts:
        hub.engine.check_length(len(prompt), plan.max_tokens, "prompt")
    generation = Generation(hub, caller, model, prompts, body, plan)
    return await respond(request, body, generation, _form(hub.codec))


def _form(codec: TextCodec) -> Form:
    choice = partial(_choice, codec)

    def part(piece: Piece) -> Json | None:
        return choice(piece) if piece.text or piece.finish or piece.tokens else None

    return Form("cmpl", "text_completion", "text_completion", choice, part)


def _choice(codec: TextCodec, piece: Piece) -> Json:
    logprobs = _logprobs(codec, piece.tokens) if piece.tokens else None
    return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}


def _logprobs(codec: TextCodec, tokens: tuple[Said, ...]) -> Json:
    return {
        "tokens": [_written(codec, said.token.id) for said in tokens],
        "token_logprobs": [said.token.logprob for said in tokens],
        "top_logprobs": [{_written(codec, best): logprob for best, logprob in said.token.best} for said in tokens],
        "text_offset": [said.offset for said in tokens],
    }


def _written(codec: TextCodec, token: int) -> str:
    """A token that is not whole characters is written as its bytes, by which it differs from others of that kind."""
    raw = codec.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


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
