"""Every exception mell-ray raises on purpose.

The hierarchy is small because callers need to tell apart only *whose* turn it is: the person who
wrote the configuration, the client who sent the request, the client who should come back later, or
the operator. Each class knows the HTTP status and the OpenAI error type it is answered with.
"""

from __future__ import annotations


class MellError(Exception):
    """Base of all errors of this package. ``str(error)`` is the message meant for a person."""

    status_code: int = 500
    error_type: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__.copy()))


def _rebuild(cls: type[MellError], message: str, state: dict[str, object]) -> MellError:
    """Unpickle without calling a subclass's own ``__init__`` (errors cross process borders)."""
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigError(MellError):
    """A setting is wrong; raised before anything starts. The message names the setting."""

    status_code = 400
    error_type = "config_error"


class InvalidRequestError(MellError):
    """The client's request is wrong; ``param`` names the field."""

    status_code = 400
    error_type = "invalid_request_error"


class ModelNotFoundError(MellError):
    """The request names a model that this application does not serve."""

    status_code = 404
    error_type = "invalid_request_error"


class AuthenticationError(MellError):
    """No API key, or one that does not open this path."""

    status_code = 401
    error_type = "invalid_request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class RequestTooLargeError(MellError):
    """The request body is longer than the server takes."""

    status_code = 413
    error_type = "invalid_request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="request_too_large")


class NotFoundError(MellError):
    """An operator call names a request or replica that does not exist (any more)."""

    status_code = 404
    error_type = "invalid_request_error"


class ConflictError(MellError):
    """An operator call cannot be carried out in the present state; the message says why."""

    status_code = 409
    error_type = "conflict_error"


class OverloadedError(MellError):
    """The queue is full; try again after ``retry_after_s`` seconds."""

    status_code = 503
    error_type = "overloaded_error"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after_s = retry_after_s


class RateLimitError(MellError):
    """The caller has as many requests running as its key allows."""

    status_code = 429
    error_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after_s = retry_after_s


class ServerError(MellError):
    """The request was right and the server failed to answer it."""

    status_code = 500
    error_type = "server_error"


class UnsupportedModelError(ConfigError):
    """The load-time gate or self-check of the engine refused the model."""


class OutOfBlocksError(MellError):
    """The KV pool cannot give the blocks asked for; the caller declines or waits."""


class MigrationError(MellError):
    """A live migration cannot start or go on. The source keeps the request."""


class FencedError(MellError):
    """The caller's incarnation or generation is older than what the callee has already seen."""
