"""The runtime's events, which come from its own thread, as asyncio values; a caller who leaves cancels its request."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from fewstep.runtime.errors import Cancelled
from fewstep.runtime.sampling.events import Event, Failed, Finished, Progress, Result
from fewstep.runtime.service.local import Runtime
from fewstep.runtime.service.ticket import Ticket, outcome

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Of a stream, so that proxies pass on each event as it comes."""


async def events(runtime: Runtime, ticket: Ticket) -> AsyncIterator[Event]:
    """Every event of a ticket, the final one last. Closing the iterator early cancels the ticket."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()

    def publish(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone, nobody waits
            loop.call_soon_threadsafe(queue.put_nowait, event)

    ended = False
    ticket.listen(publish)
    try:
        while not ended:
            event = await queue.get()
            ended = isinstance(event, Finished | Failed)
            yield event
    finally:
        if not ended:
            runtime.cancel(ticket.id)


async def result(runtime: Runtime, ticket: Ticket, request: Request) -> Result:
    """The ticket's result.

    Errors: the ticket's own; `Cancelled` where the caller hung up, which cancels the ticket too.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Finished | Failed | None] = loop.create_future()

    def publish(event: Finished | Failed) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone, nobody waits
            loop.call_soon_threadsafe(_settle, done, event)

    ticket.at_end(publish)
    gone = asyncio.create_task(_gone(request))
    gone.add_done_callback(lambda _: _settle(done, None))
    event = None
    try:
        event = await done
        if event is None:
            raise Cancelled("the caller closed the connection")
        return outcome(event)
    finally:
        gone.cancel()  # not waited for: the reply is
        if event is None:
            runtime.cancel(ticket.id)


def _settle(done: "asyncio.Future[Finished | Failed | None]", event: Finished | Failed | None) -> None:
    if not done.done():
        done.set_result(event)


async def last(stream: AsyncIterator[Event]) -> Result:
    """The result at the end of a stream of events.

    Errors: what the request failed with.
    """
    async for event in stream:
        if not isinstance(event, Progress):
            return outcome(event)
    raise AssertionError("a ticket ends in Finished or Failed")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def frame(name: str, data: Any, number: int | None = None) -> str:
    """One server-sent event. number: its id, by which a client that was cut off asks for those after it."""
    mark = "" if number is None else f"id: {number}\n"
    return f"event: {name}\n{mark}data: {json.dumps(data)}\n\n"
