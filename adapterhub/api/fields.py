"""The fields that a request for a chat completion and one for a plain completion share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from adapterhub.api.body import AtMost, Body
from adapterhub.api.hub import Hub
from adapterhub.base.request import Sampling
from adapterhub.errors import BadRequest, ContextLengthExceeded

MAX_STOPS = 4
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(Body):
    """What chat and plain completions share. `ignore_eos` and `min_tokens` are vLLM's, for load generators."""

    model: str
    user: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], AtMost(MAX_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], AtMost(1024)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self, hub: Hub, **unsupported: Any) -> None:
        """Raises BadRequest for what cannot be done. `unsupported`: fields that must not ask for anything."""
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options needs stream=true.", param="stream_options")
        known = hub.codec.vocabulary
        if any(token >= known for token in self.logit_bias or ()):
            raise BadRequest(f"logit_bias names tokens that the base, with {known}, does not have.", param="logit_bias")
        padded = self.stream_options is not None and self.stream_options.include_obfuscation
        for name, value in {"stream_options.include_obfuscation": padded, **unsupported}.items():
            if value:
                message = f"{name} is not supported. Leave it out."
                raise BadRequest(message, param=name, code="unsupported_parameter")

    def sampling(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def tokens_of(hub: Hub, text: str, param: str, *, special: bool = False) -> list[int]:
    """Of a text that has come in as `param`. Raises ContextLengthExceeded, before it is looked at, for one that is too
    long whatever it says."""
    nbytes, most = len(text.encode()), hub.engine.context * hub.codec.longest
    if nbytes > most:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {hub.engine.context} tokens, which have at most {most} bytes; "
            f"the prompt has {nbytes}. Shorten it.",
            param=param,
        )
    return hub.codec.encode(text, special=special)


def longest_answer(hub: Hub, prompt: int, asked: int | None) -> int:
    """`asked`, or all that the context has left. Raises ContextLengthExceeded when that is nothing."""
    hub.engine.check_length(prompt, asked or 1, "messages")
    return asked or hub.engine.context - prompt
