"""Every error a caller can be told about, each with its HTTP status and OpenAI error code.

    ServerError                      500  internal_error
    ├── InvalidRequestError          400  invalid_request_error
    │   ├── UnsupportedFieldError    400  unsupported_parameter
    │   ├── ContextLengthError       400  context_length_exceeded
    │   └── DiskUnavailableError     400  kv_disk_unavailable
    ├── AuthenticationError          401  invalid_api_key
    ├── NotFoundError                404  not_found (model_not_found, session_not_found)
    ├── ConflictError                409  conflict (session_busy, session_exists, session_evicted, …)
    ├── RequestTooLargeError         413  request_too_large
    ├── RateLimitError               429  queue_full | rate_limit_exceeded   (Retry-After)
    ├── RequestTimeoutError          504  request_timeout
    └── UnavailableError             503  engine_dead | shutting_down
        └── MemoryExhaustedError     503  kv_memory_exhausted

Knows nothing of HTTP frameworks; `server.app` turns these into OpenAI's error envelope.
"""

from __future__ import annotations

from typing import ClassVar


class ServerError(Exception):
    """Base of all errors shown to callers; `message` gives a reason they can act on."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class InvalidRequestError(ServerError):
    """The request itself is wrong."""

    status = 400
    error_type = "invalid_request_error"
    default_code = "invalid_request_error"


class UnsupportedFieldError(InvalidRequestError):
    """A field that this server does not implement; never silently ignored."""

    default_code = "unsupported_parameter"


class ContextLengthError(InvalidRequestError):
    """Prompt, or prompt and answer, longer than the model may hold."""

    default_code = "context_length_exceeded"


class DiskUnavailableError(InvalidRequestError):
    """Something was to be kept on disk, and this server has no disk tier (--kv-disk-path)."""

    default_code = "kv_disk_unavailable"


class AuthenticationError(ServerError):
    """No API key, or one that is not accepted."""

    status = 401
    error_type = "authentication_error"
    default_code = "invalid_api_key"


class NotFoundError(ServerError):
    """No such model, session or route."""

    status = 404
    error_type = "not_found_error"
    default_code = "not_found"


class ConflictError(ServerError):
    """What is asked for does not go together with the state of a session."""

    status = 409
    error_type = "conflict_error"
    default_code = "conflict"


class RequestTooLargeError(ServerError):
    """The body is larger than the server reads."""

    status = 413
    error_type = "invalid_request_error"
    default_code = "request_too_large"


class RateLimitError(ServerError):
    """The queue is full or a limit per key is reached; try again after `retry_after_seconds`."""

    status = 429
    error_type = "rate_limit_error"
    default_code = "queue_full"


class RequestTimeoutError(ServerError):
    """The request ran longer than the server allows."""

    status = 504
    error_type = "timeout_error"
    default_code = "request_timeout"


class UnavailableError(ServerError):
    """The engine is dead or shutting down."""

    status = 503
    error_type = "service_unavailable_error"
    default_code = "engine_dead"


class MemoryExhaustedError(UnavailableError):
    """The request's worst case does not fit the KV budget, now or ever."""

    default_code = "kv_memory_exhausted"
