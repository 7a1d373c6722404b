"""What stands before every route: API keys, and a bound on the body that holds for chunked bodies too."""

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refused, answer
from .settings import Settings

_LINGER_BYTES, _LINGER_S = 32 * 2**20, 3.0
"""How much of a refused body is read and dropped, so that the client reads the 413 instead of a broken pipe."""


class Gate:
    """ASGI middleware. Refuses a call under /v1/ without a valid key before reading its body."""

    def __init__(self, app: ASGIApp, settings: Settings, count: Callable[[str, int], None]) -> None:
        self.app = app
        self.count = count
        self.max_bytes = settings.max_body_bytes
        self.keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._counted(scope, send)
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if scope["path"].startswith("/v1/") and not self._knows(headers.get("authorization", "")):
            message = "this server needs an API key: send Authorization: Bearer KEY"
            error = Refused(401, "invalid_api_key", message, www_authenticate="Bearer")
            await _refuse(error, scope, receive, send)
        elif length.isdecimal() and int(length) > self.max_bytes:
            await _linger(receive)
            await _refuse(self._too_large(), scope, receive, send)
        else:
            await self.app(scope, self._bounded(receive), send)

    def _knows(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        token = given.strip().encode()
        found = [secrets.compare_digest(token, key) for key in self.keys]  # all compared: no early exit to time
        return not self.keys or (scheme.lower() == "bearer" and any(found))

    def _counted(self, scope: Scope, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(getattr(scope.get("route"), "path", "none"), message["status"])
            await send(message)

        return counted

    def _too_large(self) -> Refused:
        message = f"the body is above {self.max_bytes} bytes; send a smaller one"
        return Refused(413, "body_too_large", message, connection="close")

    def _bounded(self, receive: Receive) -> Receive:
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                await _linger(receive)
                error = self._too_large()
                raise HTTPException(413, str(error), error.headers)  # FastAPI lets only this class through its parsing
            return message

        return bounded


async def _linger(receive: Receive) -> None:
    dropped = 0
    try:
        async with asyncio.timeout(_LINGER_S):
            more = True
            while more and dropped < _LINGER_BYTES:
                message: Any = await receive()
                dropped += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        return


async def _refuse(error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    status, body, headers = answer(error)
    await JSONResponse(body, status, headers)(scope, receive, send)
