"""OpenAI's objects as answers have them, with the fields that are ours."""

from __future__ import annotations

from typing import Any, Generic, Literal, NotRequired, TypeVar

from typing_extensions import TypedDict  # before Python 3.12 pydantic reads no other

from adapterhub.train import uploads
from adapterhub.train.dataset import Kind as Method
from adapterhub.train.job import Status

Item = TypeVar("Item")
Number = int | float


class Page(TypedDict, Generic[Item]):
    object: Literal["list"]
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(TypedDict):
    id: str
    object: Literal["file", "model", "adapter"]
    deleted: Literal[True]


# -- files


class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None
    expires_at: int | None


class UploadObject(TypedDict):
    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: uploads.Status
    file: FileObject | None


class PartObject(TypedDict):
    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


# -- fine-tuning


class MethodObject(TypedDict):
    """With an object named as the type, which has the hyperparameters."""

    type: Method
    supervised: NotRequired[dict[str, Any]]
    dpo: NotRequired[dict[str, Any]]


class JobError(TypedDict):
    code: str
    message: str
    param: str | None


class JobObject(TypedDict):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Status
    hyperparameters: dict[str, Any]
    method: MethodObject
    seed: int
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    integrations: None
    metadata: dict[str, str] | None
    error: JobError | None
    user_provided_suffix: str | None
    priority: Literal["low", "normal", "high"]
    initial_model: str | None
    report: dict[str, Any] | None
    estimate: dict[str, Number | None] | None
    proof: dict[str, Any] | None


class EventObject(TypedDict):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class CheckpointObject(TypedDict):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Number | None]


# -- models


class ModelObject(TypedDict):
    """`root`: what it is a version of, or which version a name means."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: NotRequired[str]


class Models(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


# -- inference


class PromptTokens(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class ToldToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ToldToken):
    top_logprobs: list[ToldToken]


class ChatTokens(TypedDict):
    content: list[ChatToken]
    refusal: None


class MadeFunction(TypedDict):
    name: str
    arguments: str


class MadeCall(TypedDict):
    id: str
    type: Literal["function"]
    function: MadeFunction


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[MadeCall]]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatTokens | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Answer(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Tokens(TypedDict):
    """Of a completion, an entry for each token; null for the first of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: Tokens | None
    finish_reason: Literal["stop", "length"]


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
