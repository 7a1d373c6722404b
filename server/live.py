"""The live session: one WebSocket, frames in, pictures out, the latest frame wins.

While as many pictures are made as the caller wants at once, at most one frame waits: the newest. Those it displaces are
dropped and counted, so a caller may send as fast as a pen moves. A caller who reads slowly is sent less, by the same
rule. A picture that is done after a newer one is not sent. A closed socket ends its requests.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, FastAPI, WebSocket, WebSocketDisconnect
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.websockets import WebSocketDisconnected

from fewstep.runtime.errors import FewstepError
from fewstep.runtime.sampling.events import Event, Progress
from fewstep.runtime.service.local import Model

from .errors import Refused, answer
from .gate import key_of
from .live_frame import BadMessage, Frame, Hello, Repeats, frame_job, read_message, write_message
from .pictures import account, preview_bytes
from .service import Service
from .settings import Settings
from .streaming import events, last
from .visit import current
from .wire import Job

_log = logging.getLogger("fewstep.server")
KEY_WAIT_S = 10.0
"""How long a caller may take to send its key."""
POLICY, GOING_AWAY, TRY_LATER = 1008, 1012, 1013
"""Close codes of RFC 6455 and its registry."""
router = APIRouter()


class Lobby(Collector):
    """The open sessions of one server, and what became of their frames."""

    def __init__(self, most: int) -> None:
        self.most, self.open = most, 0
        self.frames: Counter[str] = Counter(made=0, dropped=0, skipped=0, failed=0)

    @contextlib.contextmanager
    def seat(self) -> Iterator[None]:
        """Room for one session.

        Errors: `Refused` 503 where all are taken.
        """
        if self.open >= self.most:
            raise Refused(503, "overloaded", f"{self.most} live sessions are open; try again later", retry_after="5")
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("fewstep_live_sessions", "Open live sessions.", value=self.open)
        family = CounterMetricFamily("fewstep_live_frames", "Frames of live sessions by outcome.", labels=["outcome"])
        for outcome, count in self.frames.items():
            family.add_metric([outcome], count)
        yield family


class Inbox:
    """Room for one waiting frame. A newer one takes its place."""

    def __init__(self) -> None:
        self._frame: Frame | None = None
        self._filled = asyncio.Event()

    def put(self, frame: Frame) -> bool:
        """Whether an older frame had to go."""
        displaced = self._frame is not None
        self._frame = frame
        self._filled.set()
        return displaced

    async def take(self) -> Frame:
        await self._filled.wait()
        self._filled.clear()
        frame, self._frame = self._frame, None
        assert frame is not None
        return frame


class Session:
    """One socket: what it sent last, what is being made for it. key: what it came with, None where it needs none."""

    def __init__(self, socket: WebSocket, service: Service, lobby: Lobby, key: str | None) -> None:
        self.socket, self.service, self.lobby, self._key = socket, service, lobby, key
        self.inbox = Inbox()
        self.answering: set[asyncio.Task[None]] = set()
        self.depth, self.taken, self.newest = 1, 0, 0
        self.reading, self.sending = asyncio.Lock(), asyncio.Lock()
        self.dropped = 0
        self.repeats = Repeats()

    async def run(self) -> None:
        """Until the caller closes the socket, which ends what is being made for it; or until the server shuts down,
        with the frame that is being made as the last.

        Errors: `Refused` 401 at the first frame after its key was revoked.
        """
        making, leaving = asyncio.create_task(self._make()), asyncio.create_task(self._leave())
        try:
            await self._read()
        finally:
            tasks = [making, leaving, *self.answering]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave(self) -> None:
        await self.service.health.leaving.wait()
        if self.answering:
            await asyncio.wait(self.answering, timeout=self.service.settings.drain_s)
        await self.socket.close(GOING_AWAY, "the server is shutting down")

    async def _read(self) -> None:
        while True:
            try:
                message = await _receive(self.socket, self.service.settings.max_body_bytes)
                if isinstance(message, Frame):
                    self._recognise()
                    self.depth = message.number.depth
                    ended = sum(task.cancel() for task in self.answering) if message.number.replace else 0
                    self._drop(ended + self.inbox.put(message))
            except (BadMessage, Refused) as error:
                if isinstance(error, Refused) and error.status == 401:
                    raise
                await self._fail(error, None)

    def _recognise(self) -> None:
        """Look its key up anew, since a socket may outlive it or its limits.

        Errors: `Refused` 401.
        """
        visit = current.get()
        if visit is None or self._key is None:
            return
        visit.caller = self.service.callers.find(self._key)
        if visit.caller is None:
            raise Refused(401, "invalid_api_key", "this session's API key is no longer known: open one with another")

    async def _make(self) -> None:
        while True:
            while len(self.answering) >= self.depth:
                await asyncio.wait(self.answering, return_when=asyncio.FIRST_COMPLETED)
            frame, self.taken = await self.inbox.take(), self.taken + 1
            task = asyncio.create_task(self._answer(frame, self.taken))
            self.answering.add(task)
            task.add_done_callback(self.answering.discard)

    def _drop(self, count: int) -> None:
        self.dropped += count
        self.lobby.frames["dropped"] += count

    async def _answer(self, frame: Frame, place: int) -> None:
        """place: of the frame among those that were taken; one that ends after a later one is dropped."""
        number = frame.number.frame
        standing = False
        try:
            await self._picture(frame, place)
            standing = True
        except (WebSocketDisconnect, WebSocketDisconnected):
            return
        except Exception as error:
            if not isinstance(error, FewstepError | Refused | BadMessage):
                _log.exception("a live frame failed")
            await self._fail(error, number)
        finally:
            if not standing:  # a new one: a thread may still be busy with the old one
                self.repeats = Repeats()

    async def _picture(self, frame: Frame, place: int) -> None:
        service, number = self.service, frame.number.frame
        async with self.reading:  # frames are compared in their order
            job, skipped = await service.aside(_read, frame, service.runtime.models, self.repeats)
        if skipped:
            self.lobby.frames["skipped"] += 1
            await self._say({"type": "skipped", "frame": number, "dropped": self.dropped})
            return
        self._recognise()  # it may have waited since it came
        ticket = service.submit(job)
        try:
            ahead = service.runtime.metrics().live - 1
            await self._say({"type": "started", "frame": number, "ahead": max(0, ahead), "dropped": self.dropped})
            result = await last(self._previewed(events(service.runtime, ticket), frame, job, place))
        finally:
            service.runtime.cancel(ticket.id)  # nothing where it has ended
        async with self.sending:  # of two that end together the first is sent first
            if place < self.newest:
                self._drop(1)
                return
            self.newest = place
            files = await service.encode(result, job)
            height, width = result.pictures[0].shape[:2]
            header = {"type": "picture", "frame": number, "seed": result.seeds[0], "format": job.format}
            header |= {"width": width, "height": height, "dropped": self.dropped, **account(result, files)}
            await self.socket.send_bytes(write_message(header, files.files[0]))
        self.lobby.frames["made"] += 1

    async def _previewed(
        self, stream: AsyncIterator[Event], frame: Frame, job: Job, place: int
    ) -> AsyncIterator[Event]:
        """A stream of events; those with a preview are told on the way, unless a later frame was shown."""
        async for event in stream:
            if isinstance(event, Progress) and event.preview is not None and place > self.newest:
                file = await self.service.aside(preview_bytes, event.preview, job.format)
                height, width = event.preview.shape[:2]
                header = {"type": "partial", "frame": frame.number.frame, "step": event.step, "steps": event.steps}
                header |= {"format": job.format, "width": width, "height": height, "dropped": self.dropped}
                await self.socket.send_bytes(write_message(header, file))
            yield event

    async def _fail(self, error: Exception, frame: int | None) -> None:
        self.lobby.frames["failed"] += 1
        body = error.envelope if isinstance(error, BadMessage) else answer(error)[1]
        with contextlib.suppress(WebSocketDisconnect, WebSocketDisconnected):  # the caller has gone meanwhile
            await self._say({"type": "failed", "frame": frame, "dropped": self.dropped, **body})

    async def _say(self, message: dict[str, Any]) -> None:
        await self.socket.send_json(message)


def _read(frame: Frame, models: Mapping[str, Model], repeats: Repeats) -> tuple[Job, bool]:
    """(a frame's job, whether it is skipped); for a thread, since pictures are unpacked."""
    job = frame_job(frame, models)
    return job, repeats.skips(frame, job)


def install(app: FastAPI, settings: Settings) -> Lobby:
    """Add the route. The lobby is what metrics show of it."""
    app.state.lobby = Lobby(settings.max_live)
    app.include_router(router)
    lobby: Lobby = app.state.lobby
    return lobby


@router.websocket("/v1/live")
async def live(socket: WebSocket) -> None:
    service: Service = socket.app.state.service
    await socket.accept()
    lobby: Lobby = socket.app.state.lobby
    with contextlib.suppress(WebSocketDisconnect, WebSocketDisconnected):
        try:
            key = await _check_key(socket, service)  # before a seat is taken: strangers could wait in all of them
            with lobby.seat():
                await socket.send_json({"type": "ready", "max_message_bytes": service.settings.max_body_bytes})
                await Session(socket, service, lobby, key).run()
        except (BadMessage, Refused) as error:
            body = error.envelope if isinstance(error, BadMessage) else answer(error)[1]
            await socket.send_json({"type": "failed", "frame": None, "dropped": 0, **body})
            busy = isinstance(error, Refused) and error.status == 503
            await socket.close(TRY_LATER if busy else POLICY, str(error)[:100])


async def _check_key(socket: WebSocket, service: Service) -> str | None:
    """The key that a socket brings; None where it needs none.

    Browsers cannot send a header with a socket, so the gate lets it in and the first message brings the key.

    Errors: `Refused` 401 where a key is needed and neither the handshake nor the first message has one.
    """
    visit = current.get()
    if service.callers.open or visit is None:
        return None
    if visit.caller is not None:
        return key_of(socket.headers.get("authorization", ""))
    try:
        async with asyncio.timeout(KEY_WAIT_S):
            message = await _receive(socket, service.settings.max_body_bytes)
    except TimeoutError:
        message = None
    key = message.key if isinstance(message, Hello) else None
    visit.caller = None if key is None else service.callers.find(key)
    if visit.caller is None:
        said = 'this server needs an API key: send {"key": "KEY"} as the first message'
        raise Refused(401, "invalid_api_key", said)
    return key


async def _receive(socket: WebSocket, max_bytes: int) -> Hello | Frame:
    """The next message.

    Errors: `WebSocketDisconnect`; `BadMessage`; `Refused` 413 where it is too large.
    """
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    content = message.get("text") or message.get("bytes") or b""
    if len(content) > max_bytes:
        raise Refused(413, "body_too_large", f"the message is above {max_bytes} bytes; send a smaller one")
    return read_message(content)
