"""What OpenAI's Python SDK may send, field by field, and what is decided of the fields that no route's model supports.

Every field is supported, refused with an error that names it, or ignored for a reason that is given here. Only the
documentation and tests import this: the SDK is no dependency of the server.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

import openai.types
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.fine_tuning
import openai.types.fine_tuning.jobs
import openai.types.uploads
from typing_extensions import is_typeddict

from adapterhub.train.dataset import Kind
from adapterhub.train.plan import Plan

Endpoint = tuple[str, str]  # method and path
CHAT: Endpoint = ("POST", "/v1/chat/completions")
COMPLETIONS: Endpoint = ("POST", "/v1/completions")
CREATE_FILE: Endpoint = ("POST", "/v1/files")
CREATE_UPLOAD: Endpoint = ("POST", "/v1/uploads")
CREATE_JOB: Endpoint = ("POST", "/v1/fine_tuning/jobs")
LIST_JOBS: Endpoint = ("GET", "/v1/fine_tuning/jobs")

# by endpoint, the parameters that the SDK's method takes
CLIENT: dict[Endpoint, Any] = {
    CREATE_FILE: openai.types.FileCreateParams,
    ("GET", "/v1/files"): openai.types.FileListParams,
    CREATE_UPLOAD: openai.types.UploadCreateParams,
    ("POST", "/v1/uploads/{upload_id}/parts"): openai.types.uploads.PartCreateParams,
    ("POST", "/v1/uploads/{upload_id}/complete"): openai.types.UploadCompleteParams,
    CREATE_JOB: openai.types.fine_tuning.JobCreateParams,
    LIST_JOBS: openai.types.fine_tuning.JobListParams,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): openai.types.fine_tuning.JobListEventsParams,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): openai.types.fine_tuning.jobs.CheckpointListParams,
    CHAT: openai.types.chat.completion_create_params.CompletionCreateParams,
    COMPLETIONS: openai.types.completion_create_params.CompletionCreateParams,
}


@dataclass(frozen=True)
class Refusal:
    """`example`: a value, of the outermost field, that is refused with `code` and `param` (None: the field's own name);
    `unless`: what is taken, as it asks for nothing."""

    example: Any
    code: str = "unsupported_parameter"
    unless: str | None = None
    param: str | None = None


def _said(**message: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello", **message}]


def _part(**part: Any) -> Refusal:
    message = {"role": "user", "content": [{"type": next(iter(part)), **part}]}
    return Refusal([message], "invalid_value", param="messages.0")


_PADDED = Refusal({"include_obfuscation": True}, unless="false")
_CUSTOM_CALL = {"id": "call_1", "type": "custom", "custom": {"name": "f", "input": "a"}}
REFUSED: dict[Endpoint, dict[str, Refusal]] = {
    CREATE_JOB: {
        "integrations": Refusal([{"type": "wandb"}], "invalid_value", "[]"),
        "method.reinforcement": Refusal({"type": "reinforcement"}, "invalid_value", param="method.type"),
    },
    CHAT: {
        "audio": Refusal({"voice": "alloy", "format": "wav"}),
        "function_call": Refusal({"name": "f"}, unless='"none" or "auto"'),
        "functions": Refusal([{"name": "f"}], unless="[]"),
        "messages.audio": Refusal(_said(audio={"id": "audio_1"}), param="messages.1.audio"),
        "messages.content.file": _part(file={"file_id": "file-1"}),
        "messages.content.image_url": _part(image_url={"url": "https://example.com/a.png"}),
        "messages.content.input_audio": _part(input_audio={"data": "", "format": "wav"}),
        "messages.content.refusal": _part(refusal="No."),
        "messages.function_call": Refusal(
            _said(function_call={"name": "f", "arguments": "{}"}), param="messages.1.function_call"
        ),
        "messages.refusal": Refusal(_said(refusal="No."), param="messages.1.refusal", unless='""'),
        "messages.tool_calls.custom": Refusal(
            _said(tool_calls=[_CUSTOM_CALL]), "invalid_value", param="messages.1.tool_calls.0.type"
        ),
        "modalities": Refusal(["audio"], unless='["text"]'),
        "moderation": Refusal({"model": "omni-moderation-latest"}),
        "reasoning_effort": Refusal("high", unless='"none"'),
        "service_tier": Refusal("priority", unless='"auto" or "default"'),
        "store": Refusal(True, unless="false"),
        "stream_options.include_obfuscation": _PADDED,
        "tool_choice.custom": Refusal(
            {"type": "custom", "custom": {"name": "f"}}, "invalid_value", param="tool_choice.type"
        ),
        "tools.custom": Refusal([{"type": "custom", "custom": {"name": "f"}}], "invalid_value", param="tools.0.type"),
        "verbosity": Refusal("low", unless='"medium"'),
        "web_search_options": Refusal({}),
    },
    COMPLETIONS: {
        "stream_options.include_obfuscation": _PADDED,
        "suffix": Refusal("the end", unless='""'),
    },
}
_CACHE = "a hint for speed: what prompts have in common is found by itself, and kept while there is room"
# taken and not looked at; why that does no harm
IGNORED: dict[Endpoint, dict[str, str]] = {
    CREATE_UPLOAD: {"mime_type": "what a file is shows when it is used"},
    CHAT: {
        "messages.content.prompt_cache_breakpoint": _CACHE,
        "messages.name": "in training as well: chat templates have no place for it",
        "metadata": "it would be kept with a stored answer, and none is stored",
        "prediction": "a hint for speed: the answer would be the same",
        "prompt_cache_key": _CACHE,
        "prompt_cache_options": _CACHE,
        "prompt_cache_retention": _CACHE,
        "safety_identifier": "nobody is reported to anybody; who keeps to one version of a split says `user`",
    },
}
HYPERPARAMETERS = [field.name for field in fields(Plan) if field.name not in ("kind", "seed")]
# what a route reads by itself; objects among them refuse fields that they do not know
BESIDES: dict[Endpoint, dict[str, str]] = {
    CREATE_FILE: {
        "expires_after": "form: as `expires_after[anchor]`, which is `created_at`, and `expires_after[seconds]`, "
        "3600 to 2592000"
    },
    LIST_JOBS: {
        "metadata": "query, as `metadata[KEY]=VALUE`: jobs with all of these pairs; `metadata=null`: those without any"
    },
    CREATE_JOB: {
        "hyperparameters": f"body: object with some of {', '.join(f'`{name}`' for name in HYPERPARAMETERS)}; others "
        "are refused",
        "method": "body: object with `type`, "
        + " or ".join(f"`{kind}`" for kind in Kind)
        + ", and under that name an object with `hyperparameters`; other fields are refused",
    },
}


def client_fields(endpoint: Endpoint) -> list[str]:
    """The fields that the SDK's method may send, each after the one it is within (`tools`, `tools.type`)."""
    params = CLIENT.get(endpoint)
    return [] if params is None else [*dict.fromkeys(_below(params, "", ()))]


def unsaid(endpoint: Endpoint, supported: Collection[str]) -> list[str]:
    """The SDK's fields of which nothing is said: neither of themselves, nor all that is in what they are within."""
    whole = {*REFUSED.get(endpoint, ()), *IGNORED.get(endpoint, ()), *BESIDES.get(endpoint, ())}
    return [
        name
        for name in client_fields(endpoint)
        if name not in supported and not any(name == said or name.startswith(f"{said}.") for said in whole)
    ]


def _below(kind: Any, prefix: str, above: tuple[Any, ...]) -> Iterator[str]:
    if not is_typeddict(kind):
        for option in get_args(kind):
            yield from _below(option, prefix, above)
    elif kind not in above:
        for name, inner in get_type_hints(kind).items():
            yield prefix + name
            yield from _below(inner, f"{prefix}{name}.", (*above, kind))
