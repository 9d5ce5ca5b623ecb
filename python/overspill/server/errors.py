"""Errors in the form of OpenAI's API: every answer that is none has it."""

from __future__ import annotations

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from overspill._core import ClosedError, ContextFullError, Error, OutOfMemoryError, UnusableError

__all__ = ["ApiError", "ApiResponse", "ErrorReply", "api_error_of", "from_validation"]

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiResponse(JSONResponse):
    """JSON that is ASCII alone: texts of clients and models may have halves of characters."""

    def render(self, content: Any) -> bytes:
        """Return the content as bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class ErrorDetail(BaseModel):
    """What is wrong with a request, or with the server."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """An answer that is an error, as OpenAI's API has it."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that cannot be answered: a status of HTTP, and the keys of OpenAI's errors.

    Parameters
    ----------
    status
        400: the request is wrong; 503: the server cannot do it now; and so on, as HTTP has them.
    message
        What is wrong, and what to do.
    param
        The field of the request that is meant.
    code
        OpenAI's word for it, such as ``"model_not_found"``.
    retry_after_s
        Seconds after which the same request may be answered.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Keep all of it."""
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The answer's content."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> ApiResponse:
        """The answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return ApiResponse(self.body, self.status, headers)


def api_error_of(error: Exception) -> ApiError:
    """Return what a client is told of an error of the engine or of the framework."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case ContextFullError():
            return ApiError(400, str(error), param="messages", code="context_length_exceeded")
        case ValueError() | TypeError():
            return ApiError(400, str(error))
        case RecursionError():
            return ApiError(400, "the request has lists or objects in each other, too many levels deep")
        case OutOfMemoryError() | ClosedError() | UnusableError():
            return ApiError(503, str(error), retry_after_s=5)
        case Error():  # no chat template, or a template that computes for too long
            return ApiError(400, str(error))
        case _:
            return ApiError(500, f"a bug in overspill: {type(error).__name__}: {error}")


def from_validation(error: RequestValidationError) -> ApiError:
    """Return the first thing that is wrong with a request's fields."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}, at character {first['loc'][-1]}")
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{where}: {message}" if where else message, param=where or None)
