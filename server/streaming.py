"""The runtime's events, which come from its own thread, as asyncio values; a caller who leaves cancels its request."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request

from fewstep.runtime.errors import Cancelled
from fewstep.runtime.events import Event, Failed, Finished, Progress, Result
from fewstep.runtime.local import Runtime
from fewstep.runtime.ticket import Ticket


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
    done = asyncio.create_task(last(events(runtime, ticket)))
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Cancelled("the caller closed the connection")
        return done.result()
    finally:
        for task in (done, gone):
            task.cancel()
        await asyncio.gather(done, gone, return_exceptions=True)


async def last(stream: AsyncIterator[Event]) -> Result:
    """The result at the end of a stream of events.

    Errors: what the request failed with.
    """
    async for event in stream:
        if isinstance(event, Finished):
            return event.result
        if isinstance(event, Failed):
            raise event.error
    raise AssertionError("a ticket ends in Finished or Failed")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def server_sent(
    stream: AsyncIterator[Event], finished: Callable[[Result], Any], failed: Callable[[Exception], dict[str, Any]]
) -> AsyncIterator[str]:
    """Server-sent events `progress`, then one of `finished` or `failed`, each with one JSON object.

    `finished` is awaited for the body of a result; where it raises, the stream ends in `failed` as well.
    """
    async with contextlib.aclosing(stream) as live:  # type: ignore[type-var]
        async for event in live:
            if isinstance(event, Progress):
                yield _frame("progress", {"picture": event.picture, "step": event.step, "steps": event.steps})
            elif isinstance(event, Failed):
                yield _frame("failed", failed(event.error))
            elif isinstance(event, Finished):
                try:
                    frame = _frame("finished", await finished(event.result))
                except Exception as error:
                    frame = _frame("failed", failed(error))
                yield frame


def _frame(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
