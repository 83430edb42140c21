"""`/v1/completions`: a plain prompt, as text or as token ids."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field

from adapterhub.api.auth import Inferring
from adapterhub.api.body import AtMost
from adapterhub.api.echo import echo_of
from adapterhub.api.fields import GenerationRequest, TokenId, tokens_of
from adapterhub.api.generation import Generation, Piece, Said
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.models import choose_model
from adapterhub.api.streaming import Form, Json, respond
from adapterhub.api.strictjson import MAX_VALUES
from adapterhub.base.request import Sampling, Token
from adapterhub.base.text import TextCodec
from adapterhub.errors import BadRequest

router = APIRouter(prefix="/v1", tags=["inference"])
MAX_PROMPTS = 64
MAX_SCORED = 2**17  # log probabilities of prompts in one answer
_DEFAULT_TOKENS = 16
TokenIds = Annotated[list[TokenId], AtMost(MAX_VALUES)]
Texts = Annotated[list[str], AtMost(MAX_PROMPTS)]


def _few(prompt: Any) -> Any:
    """A before-validator: of several prompts, and so of whatever is not one in token ids."""
    one_in_ids = isinstance(prompt, list) and prompt and isinstance(prompt[0], int)
    if isinstance(prompt, list) and not one_in_ids and not 1 <= len(prompt) <= MAX_PROMPTS:
        raise ValueError(f"{len(prompt)} prompts; 1 to {MAX_PROMPTS} are supported")
    return prompt


class CompletionRequest(GenerationRequest):
    prompt: Annotated[str | TokenIds | Texts | Annotated[list[TokenIds], AtMost(MAX_PROMPTS)], BeforeValidator(_few)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None

    @property
    def compared(self) -> int | None:
        """How many answers are made to tell the best, if that is more than are told. Raises BadRequest."""
        told = self.n or 1
        if self.best_of is None or self.best_of == told:
            return None
        if self.best_of < told:
            raise BadRequest(f"best_of is {self.best_of}, of which n={told} cannot be told. Raise it.", param="best_of")
        if self.stream:
            raise BadRequest("The best of several is known at their end: best_of needs stream=false.", param="best_of")
        if self.max_tokens == 0:
            raise BadRequest("best_of compares answers: it needs max_tokens of at least 1.", param="best_of")
        return self.best_of


@router.post("/completions", response_model=None)
async def create(hub: TheHub, caller: Inferring, body: CompletionRequest, request: Request) -> Response:
    body.check(hub)
    if body.suffix:
        message = (
            "suffix is not supported: bases here go on from a prompt, and none is told what comes after. Leave it out."
        )
        raise BadRequest(message, param="suffix", code="unsupported_parameter")
    best_of = body.compared
    model = choose_model(hub, caller, body.model, body.user)
    given = _several(body.prompt)
    prompts = await asyncio.to_thread(_prompts, hub, given)
    max_tokens = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    logprobs = 0 if best_of and body.logprobs is None else body.logprobs
    plan = body.sampling(max_tokens, logprobs, body.logprobs if body.echo else None)
    for prompt in prompts:
        hub.engine.check_length(len(prompt), max_tokens, "prompt")
    echoes = None
    if body.echo:
        _check_scored(prompts, plan, best_of or body.n or 1)
        echoes = await asyncio.to_thread(lambda: [echo_of(hub.codec, prompt) for prompt in given])
    generation = Generation(hub, caller, model, prompts, body, plan, echoes=echoes, best_of=best_of)
    return await respond(request, body, generation, _form(hub.codec, told=body.logprobs is not None))


def _check_scored(prompts: list[list[int]], plan: Sampling, answers: int) -> None:
    """Raises BadRequest when prompts have more log probabilities than are kept for one answer."""
    if plan.prompt_logprobs is None:
        return
    scored = answers * sum(map(len, prompts)) * (1 + plan.prompt_logprobs)
    if scored > MAX_SCORED:
        raise BadRequest(
            f"echo with logprobs={plan.prompt_logprobs} would tell {scored} log probabilities of the prompts; up to "
            f"{MAX_SCORED} are supported. Send fewer prompts at once, or ask for fewer of logprobs, n or best_of.",
            param="logprobs",
        )


def _form(codec: TextCodec, *, told: bool) -> Form:
    """`told`: with log probabilities."""
    choice = partial(_choice, codec, told)

    def part(piece: Piece) -> Json | None:
        return choice(piece) if piece.text or piece.finish or piece.tokens else None

    return Form("cmpl", "text_completion", "text_completion", choice, part)


def _choice(codec: TextCodec, told: bool, piece: Piece) -> Json:
    logprobs = _logprobs(codec, piece.tokens) if told and piece.tokens else None
    return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}


def _logprobs(codec: TextCodec, tokens: tuple[Said, ...]) -> Json:
    return {
        "tokens": [_written(codec, said.token.id) for said in tokens],
        "token_logprobs": [said.token.logprob for said in tokens],
        "top_logprobs": [_best(codec, said.token) for said in tokens],
        "text_offset": [said.offset for said in tokens],
    }


def _best(codec: TextCodec, token: Token) -> Json | None:
    """None for the first of a prompt, as before it is nothing that would make it likely."""
    if token.logprob is None:
        return None
    return {_written(codec, best): logprob for best, logprob in token.best}


def _written(codec: TextCodec, token: int) -> str:
    """A token that is not whole characters is written as its bytes, by which it differs from others of that kind."""
    raw = codec.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _several(prompt: Any) -> list[str | list[int]]:
    one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    return [prompt] if one else list(prompt)


def _prompts(hub: Hub, batch: list[str | list[int]]) -> list[list[int]]:
    tokens = [tokens_of(hub, p, "prompt", special=True) if isinstance(p, str) else p for p in batch]
    for ids in tokens:
        if not ids:
            raise BadRequest("prompt is empty; there is nothing to continue.", param="prompt")
        if max(ids) >= hub.codec.vocabulary:
            raise BadRequest(
                f"prompt has the token id {max(ids)}; the base has {hub.codec.vocabulary}.", param="prompt"
            )
    return tokens
