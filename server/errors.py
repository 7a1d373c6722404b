"""The one table from the runtime's errors to HTTP, and the OpenAI envelope every error travels in.

    {"error": {"message": ..., "type": ..., "param": ... | null, "code": ...}}

409 is never used: OpenAI clients retry it. A 429 and a 503 carry Retry-After; where trying again cannot help, the
`x-should-retry: false` header says so to those clients.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from fewstep.runtime.errors import (
    BundleError,
    Cancelled,
    Closed,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    FewstepError,
    InvalidRequest,
    Overloaded,
    SpecError,
)


@dataclass(frozen=True)
class Row:
    """How one kind of error is answered. `retry` False tells clients that the same call will fail again."""

    status: int
    type: str
    code: str
    retry: bool = True


TABLE: Mapping[type[Exception], Row] = {
    InvalidRequest: Row(400, "invalid_request_error", "invalid_value"),
    Overloaded: Row(429, "rate_limit_error", "overloaded"),
    Cancelled: Row(499, "invalid_request_error", "cancelled", retry=False),
    DeadlineExceeded: Row(504, "server_error", "deadline_exceeded", retry=False),
    EngineFailed: Row(500, "server_error", "engine_failed"),
    EngineUnavailable: Row(503, "server_error", "engine_unavailable", retry=False),
    Closed: Row(503, "server_error", "shutting_down"),
    BundleError: Row(500, "server_error", "bundle_error", retry=False),
    SpecError: Row(500, "server_error", "bundle_error", retry=False),
    FewstepError: Row(500, "server_error", "internal_error"),
    Exception: Row(500, "server_error", "internal_error"),
}
"""Looked up along the error's own classes, so the most exact row wins."""

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_BODY_CODES = {"missing": "missing_required_parameter", "json_invalid": "invalid_json"}


class Refused(Exception):
    """The server itself, not the runtime, says no."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def row_of(error: Exception) -> Row:
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)


def answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, envelope, headers) of any error, the runtime's or the server's own."""
    if isinstance(error, Refused):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return error.status, envelope(str(error), kind, error.code, error.param), error.headers
    row = row_of(error)
    message = str(error) if isinstance(error, FewstepError) else "the server failed; its log has the reason"
    headers = {} if row.retry else {"x-should-retry": "false"}
    if not isinstance(error, FewstepError):
        headers["connection"] = "close"  # the web server ends the connection after such an error: say so
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif row.status == 503 and row.retry:
        headers["Retry-After"] = "1"
    return row.status, envelope(message, row.type, row.code, getattr(error, "field", None)), headers


def envelope(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error. What a caller sent may stand in it, so halves of surrogate pairs are replaced."""
    said, named = (None if text is None else text.encode("utf-8", "replace").decode() for text in (message, param))
    return {"error": {"message": said, "type": kind, "param": named, "code": code}}


def install(app: FastAPI) -> None:
    """Every error of every route, known or not, leaves in the envelope."""
    app.add_exception_handler(RequestValidationError, _on_body)
    app.add_exception_handler(HTTPException, _on_http)
    for kind in (Refused, FewstepError, Exception):
        app.add_exception_handler(kind, _on_error)


async def _on_error(request: Request, error: Exception) -> Response:
    status, body, headers = answer(error)
    return _reply(request, status, body, headers)


def _reply(request: Request, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """An envelope as the API that was called says it: A1111's clients look for `detail`."""
    if request.url.path.startswith("/sdapi/"):
        error = body["error"]
        body = {
            "error": error["code"],
            "detail": error["message"],
            "body": error["param"] or "",
            "errors": error["message"],
        }
        status = 422 if status == 400 else status
    return JSONResponse(body, status, headers)


async def _on_http(request: Request, error: Exception) -> Response:
    http = cast(HTTPException, error)  # starlette dispatches by class
    kind = "invalid_request_error" if http.status_code < 500 else "server_error"
    message = {
        404: f"there is nothing at {request.url.path}; docs/server.md lists the routes",
        405: f"{request.method} is not allowed at {request.url.path}",
    }.get(http.status_code, str(http.detail))
    body = envelope(message, kind, _HTTP_CODES.get(http.status_code, "invalid_request"))
    return _reply(request, http.status_code, body, http.headers)


async def _on_body(request: Request, error: Exception) -> Response:
    return _reply(request, 400, described(cast(RequestValidationError, error).errors()[0]))


def described(first: Mapping[str, Any]) -> dict[str, Any]:
    """The envelope of a body's first fault, as pydantic found it; `loc` begins with where the body came from."""
    kind, where = first["type"], [str(part) for part in first["loc"][1:]]
    code = _BODY_CODES.get(kind, "invalid_type")
    if kind == "json_invalid":
        where, message = [], f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    elif kind in ("unknown_parameter", "invalid_value"):  # ours, from `wire.Body`
        code, where, message = kind, [*where, first["ctx"]["field"]], first["msg"]
    elif not where:
        message = "the body must be a JSON object sent with Content-Type: application/json"
    elif kind == "missing":
        message = f"{'.'.join(where)} is missing; it is required"
    else:
        message = f"{'.'.join(where)} is {_short(first['input'])}; {first['msg'][:1].lower()}{first['msg'][1:]}"
    return envelope(message, "invalid_request_error", code, ".".join(where) or None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
