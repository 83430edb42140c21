"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from adapterhub.api.auth import Caller
from adapterhub.api.generation import Generation, GenerationRequest, Piece, longest_answer
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.models import choose_model
from adapterhub.api.streaming import Form, Json, respond
from adapterhub.base.request import Token
from adapterhub.base.text import TextCodec
from adapterhub.errors import BadRequest

router = APIRouter(prefix="/v1/chat", tags=["inference"])


class ContentPart(BaseModel):
    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None

    def plain(self, at: int) -> dict[str, str]:
        """As a chat template reads it. Raises BadRequest for what is not text."""
        where = f"messages.{at}"
        if self.tool_calls:
            raise BadRequest(f"{where}.tool_calls is not supported yet.", param=where, code="unsupported_parameter")
        if self.content is None:
            raise BadRequest(f"{where} needs a content.", param=where)
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        other = [part.type for part in self.content if part.type != "text" or part.text is None]
        if other:
            raise BadRequest(f"{where} has a {other[0]!r} part; only text is supported by this base.", param=where)
        return {"role": self.role, "content": "".join(part.text or "" for part in self.content)}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    web_search_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    store: bool | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None

    def check_chat(self, hub: Hub) -> None:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs=true.", param="top_logprobs")
        text_only = self.response_format is None or self.response_format.get("type") == "text"
        self.check(
            hub,
            response_format=not text_only,
            tools=self.tools,
            tool_choice=self.tool_choice not in (None, "none", "auto"),
            functions=self.functions,
            function_call=self.function_call not in (None, "none", "auto"),
            web_search_options=self.web_search_options is not None,
            reasoning_effort=self.reasoning_effort not in (None, "none"),
            verbosity=self.verbosity not in (None, "medium"),
            store=self.store,
            modalities=self.modalities not in (None, ["text"]),
            audio=self.audio,
        )


@router.post("/completions", response_model=None)
async def create(hub: TheHub, caller: Caller, body: ChatRequest, request: Request) -> Response:
    body.check_chat(hub)
    model = choose_model(hub, caller, body.model, body.user)
    messages = [message.plain(at) for at, message in enumerate(body.messages)]
    prompt = await asyncio.to_thread(hub.codec.chat, messages)
    most = longest_answer(hub, len(prompt), body.max_completion_tokens or body.max_tokens)
    plan = body.sampling(most, (body.top_logprobs or 0) if body.logprobs else None)
    generation = Generation(hub, caller, model, [prompt], body, plan)
    return await respond(request, body, generation, _form(hub.codec))


def _form(codec: TextCodec) -> Form:
    def whole(answer: Piece) -> Json:
        return _choice(codec, answer, message={"role": "assistant", "content": answer.text, "refusal": None})

    def part(piece: Piece) -> Json:
        return _choice(codec, piece, delta={"content": piece.text} if piece.text or piece.tokens else {})

    def opening(index: int) -> Json:
        return _choice(codec, Piece(index, ""), delta={"role": "assistant", "content": ""})

    return Form("chatcmpl", "chat.completion", "chat.completion.chunk", whole, part, opening)


def _choice(codec: TextCodec, piece: Piece, **content: Any) -> Json:
    logprobs = {"content": [_logprob(codec, said.token) for said in piece.tokens], "refusal": None}
    return {
        "index": piece.index,
        **content,
        "logprobs": logprobs if piece.tokens else None,
        "finish_reason": piece.finish,
    }


def _logprob(codec: TextCodec, token: Token) -> Json:
    def shown(identity: int, logprob: float | None) -> Json:
        raw = codec.token_bytes(identity)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    return {**shown(token.id, token.logprob), "top_logprobs": [shown(*best) for best in token.best]}
