"""Every error a caller can meet, in one tree. Each class knows its HTTP status, OpenAI `type` and default `code`.

    HubError
    ├── BadRequest 400
    │   ├── InvalidAdapter        a PEFT adapter that is malformed, empty, not finite, or of the wrong shape
    │   ├── UnsupportedAdapter    an adapter that a block cannot express (DoRA, biases, ...)
    │   ├── WrongBase             made for another base model
    │   ├── ContextLengthExceeded the prompt, or prompt plus max_tokens, does not fit
    │   ├── KeyReused             an Idempotency-Key that came with another request before
    │   └── InvalidTrainingFile   names the line and the reason
    ├── Unauthorized 401
    ├── Forbidden 403
    ├── NotFound 404
    ├── TooLarge 413
    ├── TooManyRequests 429
    │   └── RateLimited           an owner's requests or tokens of this minute are used up
    ├── QuotaExceeded 429         too much kept or under way of one owner's; trying again at once does not help
    ├── ServerFault 500
    │   └── BlockDamaged          a block file is missing, truncated or does not match its digest
    ├── Unavailable 503
    │   └── OutOfMemory           the device has no room left for this one request
    ├── DeadlineExceeded 504
    └── StorageFull 507

A message names the value, the limit and what to do about it; it is shown to users as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class HubError(Exception):
    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What an answer with this error says besides."""
        return {}


class BadRequest(HubError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidAdapter(BadRequest):
    code = "invalid_adapter"


class UnsupportedAdapter(BadRequest):
    code = "unsupported_adapter"


class WrongBase(BadRequest):
    code = "wrong_base"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class KeyReused(BadRequest):
    code = "idempotency_key_reused"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"The Idempotency-Key {key[:80]!r} came with another request before. Send that one again, or another key.",
            param="Idempotency-Key",
        )


class InvalidTrainingFile(BadRequest):
    code = "invalid_training_file"


class Unauthorized(HubError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class Forbidden(HubError):
    status = 403
    type = "invalid_request_error"
    code = "insufficient_permissions"


class NotFound(HubError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class TooLarge(HubError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class TooManyRequests(HubError):
    """`retry_after`: seconds after which to try again."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after = 1

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(self.retry_after)}


class RateLimited(TooManyRequests):
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int, headers: Mapping[str, str]) -> None:
        """`headers` say how much there is of which limit."""
        super().__init__(message)
        self.retry_after = retry_after
        self._limits = headers

    @property
    def headers(self) -> dict[str, str]:
        return {**super().headers, **self._limits}


class QuotaExceeded(HubError):
    status = 429
    type = "rate_limit_error"
    code = "exceeded_quota"

    def __init__(self, message: str, *, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """`headers` say how much there is of which limit."""
        super().__init__(message)
        self._limits = headers

    @property
    def headers(self) -> dict[str, str]:
        """An SDK would try again at once, in vain, as it does on any 429."""
        return {"retry-after": "60", "x-should-retry": "false", **self._limits}


class ServerFault(HubError):
    pass


class BlockDamaged(ServerFault):
    code = "block_damaged"


class Unavailable(HubError):
    status = 503
    code = "unavailable"


class OutOfMemory(Unavailable):
    code = "out_of_memory"

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": "10"}


class DeadlineExceeded(HubError):
    status = 504
    code = "deadline_exceeded"


class StorageFull(HubError):
    status = 507
    code = "storage_full"
