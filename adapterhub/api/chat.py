"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Field

from adapterhub.api.auth import Inferring
from adapterhub.api.body import AtMost
from adapterhub.api.calls import CallReader
from adapterhub.api.fields import GenerationRequest, longest_answer, tokens_of
from adapterhub.api.generation import Generation, Piece
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.models import choose_model
from adapterhub.api.streaming import Form, Json, respond
from adapterhub.api.structured import ResponseFormat, answer_part, compiled
from adapterhub.api.tools import MAX_TOOLS, Choice, FunctionTool, Toolbox
from adapterhub.base.grammar import Grammar
from adapterhub.base.request import Token
from adapterhub.base.text import TextCodec
from adapterhub.base.tools import Message
from adapterhub.errors import BadRequest

router = APIRouter(prefix="/v1/chat", tags=["inference"])
MAX_MESSAGES = 2048
MAX_PARTS = 4096  # of contents, and calls, in all messages together

_UNSUPPORTED = {  # fields of a message, and what to send instead
    "refusal": "Send its text as the content.",
    "function_call": "Send it in tool_calls.",
    "audio": "Send what was said as the content.",
}


class ContentPart(BaseModel):
    type: str
    text: str | None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As a chat template reads it, which writes an object as an object, and a text as a text."""
        arguments: Any = self.function.arguments
        with suppress(ValueError, RecursionError):
            if isinstance(read := json.loads(arguments), dict):
                arguments = read
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], AtMost(MAX_PARTS)] | None = None
    tool_calls: Annotated[list[ToolCall], AtMost(MAX_PARTS)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None

    def plain(self, at: int, called: set[str]) -> dict[str, Any]:
        """As a chat template reads it. `called`: the ids of calls so far. Raises BadRequest for what is not text, and
        for results of what was not called."""
        where = f"messages.{at}"
        for name, advice in _UNSUPPORTED.items():
            if getattr(self, name):
                message = f"{where}.{name} is not supported. {advice}"
                raise BadRequest(message, param=f"{where}.{name}", code="unsupported_parameter")
        if self.tool_calls and self.role != "assistant":
            raise BadRequest(f"{where} is the {self.role}'s; only the assistant calls tools.", param=where)
        if self.role == "tool" and self.tool_call_id not in called:
            reason = f"{where} needs the tool_call_id of a call in an earlier message; {self.tool_call_id!r} is none."
            raise BadRequest(reason, param=where)
        if self.content is None and not self.tool_calls:
            raise BadRequest(f"{where} needs a content.", param=where)
        plain: dict[str, Any] = {"role": self.role, "content": self._text(where)}
        if self.tool_calls:
            plain["tool_calls"] = [call.plain() for call in self.tool_calls]
            called |= {call.id for call in self.tool_calls}
        if self.role == "tool":
            plain["tool_call_id"] = self.tool_call_id
        return plain

    def _text(self, where: str) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        other = [part.type for part in self.content if part.type != "text" or part.text is None]
        if other:
            kind = other[0][:80]
            raise BadRequest(f"{where} has a part of type {kind!r}; only text is supported by this base.", param=where)
        return "".join(part.text or "" for part in self.content)


def _few_parts(messages: Any) -> Any:
    """A before-validator: of messages that have few parts each, too."""
    if isinstance(messages, list):
        lists = [m.get(name) for m in messages if isinstance(m, dict) for name in ("content", "tool_calls")]
        parts = sum(len(each) for each in lists if isinstance(each, list))
        if parts > MAX_PARTS:
            raise ValueError(f"they have {parts} parts and calls together; up to {MAX_PARTS} are supported")
    return messages


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1), AtMost(MAX_MESSAGES), BeforeValidator(_few_parts)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], AtMost(MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    web_search_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    moderation: dict[str, Any] | None = None
    modalities: Annotated[list[str], AtMost(16)] | None = None
    audio: dict[str, Any] | None = None

    def check_chat(self, hub: Hub) -> None:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs=true.", param="top_logprobs")
        self.check(
            hub,
            functions=self.functions,
            function_call=self.function_call not in (None, "none", "auto"),
            web_search_options=self.web_search_options is not None,
            reasoning_effort=self.reasoning_effort not in (None, "none"),
            verbosity=self.verbosity not in (None, "medium"),
            store=self.store,
            service_tier=self.service_tier not in (None, "auto", "default"),
            moderation=self.moderation is not None,
            modalities=self.modalities not in (None, ["text"]),
            audio=self.audio,
        )


@router.post("/completions", response_model=None)
async def create(hub: TheHub, caller: Inferring, body: ChatRequest, request: Request) -> Response:
    body.check_chat(hub)
    model = choose_model(hub, caller, body.model, body.user)
    called: set[str] = set()
    messages = [message.plain(at, called) for at, message in enumerate(body.messages)]
    toolbox = Toolbox(body.tools or [], body.tool_choice, body.parallel_tool_calls)
    grammar = await _grammar(hub, caller.owner, toolbox, body.response_format)
    prompt = await asyncio.to_thread(_prompt, hub, messages, toolbox)
    most = longest_answer(hub, len(prompt), body.max_completion_tokens or body.max_tokens)
    plan = body.sampling(most, (body.top_logprobs or 0) if body.logprobs else None)
    generation = Generation(hub, caller, model, [prompt], body, plan, grammar)
    form = _form(hub.codec)
    if toolbox.any:
        form = _form_with_calls(hub.codec, json_answer=answer_part(body.response_format) is not None)
    return await respond(request, body, generation, form)


def _prompt(hub: Hub, messages: list[Message], toolbox: Toolbox) -> list[int]:
    return tokens_of(hub, hub.codec.render(messages, reply=True, tools=toolbox.told), "messages")


async def _grammar(hub: Hub, owner: str, toolbox: Toolbox, form: ResponseFormat | None) -> Grammar | None:
    answer = answer_part(form)
    if toolbox.any:
        return await compiled(hub, owner, toolbox.grammar(answer), "tools", "tools")
    if answer is not None:
        return await compiled(hub, owner, [answer], str(form), "response_format")
    return None


def _form(codec: TextCodec) -> Form:
    def whole(answer: Piece) -> Json:
        return _choice(codec, answer, message={"role": "assistant", "content": answer.text, "refusal": None})

    def part(piece: Piece) -> Json | None:
        if not (piece.text or piece.finish or piece.tokens):
            return None
        return _choice(codec, piece, delta={"content": piece.text} if piece.text or piece.tokens else {})

    def opening(index: int) -> Json:
        return _choice(codec, Piece(index, ""), delta={"role": "assistant", "content": ""})

    return Form("chatcmpl", "chat.completion", "chat.completion.chunk", whole, part, opening)


def _form_with_calls(codec: TextCodec, json_answer: bool) -> Form:
    """Of answers that may call tools: their calls are told apart from what is said."""
    readers: defaultdict[int, CallReader] = defaultdict(lambda: CallReader(json_answer))

    def whole(answer: Piece) -> Json:
        reader = CallReader(json_answer)
        told = reader.push(answer.text, last=True)
        calls = [{k: v for k, v in call.items() if k != "index"} for call in told.calls]
        message = {"role": "assistant", "content": told.content or None, "refusal": None}
        return _choice(codec, _ended(answer, reader), message=message | ({"tool_calls": calls} if calls else {}))

    def part(piece: Piece) -> Json | None:
        reader = readers[piece.index]
        told = reader.push(piece.text, last=piece.finish is not None)
        delta = ({"content": told.content} if told.content else {}) | ({"tool_calls": told.calls} if told.calls else {})
        return _choice(codec, _ended(piece, reader), delta=delta) if delta or piece.finish or piece.tokens else None

    def opening(index: int) -> Json:
        return _choice(codec, Piece(index, ""), delta={"role": "assistant", "content": None})

    return Form("chatcmpl", "chat.completion", "chat.completion.chunk", whole, part, opening)


def _ended(piece: Piece, reader: CallReader) -> Piece:
    return replace(piece, finish="tool_calls") if piece.finish == "stop" and reader.called else piece


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
