"""What stands before every route: API keys, their rates, pages of other sites, and a bound on bodies."""

import asyncio
import base64
import binascii
import ipaddress
import logging
import re
import secrets
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .account import Account
from .errors import Refused, answer
from .quota import Caller, Callers
from .settings import Settings
from .visit import Visit, current

_log = logging.getLogger("fewstep.server")
_LINGER_BYTES, _LINGER_S = 32 * 2**20, 3.0
"""How much of a refused body is read and dropped, so that the client reads the 413 instead of a broken pipe."""
_OPEN = ("/health", "/ready", "/metrics", "/openapi.json", "/")
_OPEN_BELOW = ("/page/", "/pictures/")
"""What needs no key: whatever is not named here does. A kept picture's name is the permission to see it."""
_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class Gate:
    """ASGI middleware. Makes the `Visit` of a call or socket, and refuses it before its body is read where it must.

    A socket may come without a key: its route asks for one in the first message (`Door` takes nothing from it before).
    """

    def __init__(self, app: ASGIApp, settings: Settings, callers: Callers, account: Account) -> None:
        self.app, self.callers, self.account = app, callers, account
        self.max_bytes = settings.max_body_bytes
        self.origins = settings.origins
        self.bound = settings.host.lower() if callers.open else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        visit = Visit(request_id(headers), scope.get("method", "WEBSOCKET"), scope["path"])
        token = current.set(visit)
        self.account.begin(visit, headers)
        try:
            await self._enter(visit, scope, receive, self._marked(visit, scope, send))
        except Exception as error:
            if visit.status:  # the reply has begun: all that is left is to break it off
                raise
            _log.exception("an unforeseen error")
            await _refuse(error, scope, receive, self._marked(visit, scope, send))
        finally:
            self.account.end(visit)
            current.reset(token)

    async def _enter(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._check(visit, scope, headers)
        except Refused as error:
            self.account.refused(visit, error.code)
            if error.status == 413:
                await _linger(receive)
            await _refuse(error, scope, receive, send)
            return
        await self.app(scope, self._bounded(receive) if scope["type"] == "http" else receive, send)

    def _check(self, visit: Visit, scope: Scope, headers: Headers) -> None:
        """Errors: `Refused`, in the order in which they leave the least to an unknown caller."""
        socket = scope["type"] == "websocket"
        acts = socket or visit.method not in ("GET", "HEAD", "OPTIONS")
        if acts and not own_origin(headers, self.origins, self.bound):
            message = f"pages of {headers['origin']} may not call this server; FEWSTEP_ORIGINS lists those that may"
            raise Refused(403, "foreign_origin", message)
        visit.caller = self._caller(scope["path"], headers.get("authorization", ""), optional=socket)
        if visit.method == "POST" and visit.caller is not None:
            visit.pay()
            visit.paid = True
        if (coding := headers.get("content-encoding", "identity")) != "identity":
            message = f"the body's Content-Encoding is {coding!r}; send it as it is, so that its size can be bounded"
            raise Refused(415, "unsupported_encoding", message)
        length = headers.get("content-length", "0")
        if not socket and length.isdecimal() and int(length) > self.max_bytes:
            raise self._too_large()

    def _caller(self, path: str, authorization: str, *, optional: bool) -> Caller | None:
        """Whose key the call brings; None where it needs none.

        Errors: `Refused` 401.
        """
        if self.callers.open or path in _OPEN or path.startswith(_OPEN_BELOW) or (optional and not authorization):
            return None
        given = key_of(authorization)
        caller = None if given is None else self.callers.find(given)
        if caller is None:
            message = "this server needs an API key: send Authorization: Bearer KEY"
            raise Refused(401, "invalid_api_key", message, www_authenticate="Bearer")
        return caller

    def _marked(self, visit: Visit, scope: Scope, send: Send) -> Send:
        """`send` that notes status and route, and gives the reply its request id."""

        async def marked(message: Message) -> None:
            kind = message["type"]
            if kind in ("http.response.start", "websocket.accept", "websocket.http.response.start"):
                visit.status = message.get("status", 101)
                visit.route = getattr(scope.get("route"), "path", "none")
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["x-request-id"] = visit.id
                self.account.answered(visit)
            await send(message)

        return marked

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


def request_id(headers: Headers) -> str:
    """The caller's `x-request-id` where it is a plain word, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"


def key_of(authorization: str) -> str | None:
    """The key in an Authorization header: a Bearer token, or the password of Basic, as A1111's clients send it."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return None


def own_origin(headers: Headers, allowed: tuple[str, ...], bound: str | None = None) -> bool:
    """Whether a page of this server, a page of `allowed` (as in "https://host:port"), or no page at all is calling.

    A browser lends any page the user's place in the network, so pages of other sites are kept out. bound: the address
    that a server without keys listens at, None where there are keys. Such a server takes a page for its own under that
    address, an IP address or localhost only: another name may be anybody's, resolved anew to this machine once its page
    was loaded (DNS rebinding). Calls that change nothing come without an `Origin` and are not told apart.
    """
    origin, host = headers.get("origin"), headers.get("host", "").lower()
    if origin is None or origin in allowed:
        return True
    try:
        own = host != "" and urlsplit(origin).netloc.lower() == host
        return own and (bound is None or _is_here(urlsplit(f"//{host}").hostname or "", bound))
    except ValueError:  # no address at all
        return False


def _is_here(name: str, bound: str) -> bool:
    if name in (bound, "localhost") or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


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


async def _refuse(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:100]})
        return
    status, body, headers = answer(error)
    await JSONResponse(body, status, headers)(scope, receive, send)
