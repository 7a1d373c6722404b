"""One HTTP call or socket on its way through the server: who calls, and what became of it.

The gate makes a `Visit` and routes find it as `current`. They hand requests to the runtime through a `Door`, which
holds the caller to its rate and its share of the queue.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fewstep.runtime.errors import FewstepError
from fewstep.runtime.sampling.events import Failed, Finished, Result
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.service.local import Runtime
from fewstep.runtime.service.ticket import Ticket

from .errors import Refused, row_of
from .quota import Caller, Callers


@dataclass(eq=False)
class Visit:
    """id: the request id, which the reply, logs and traces carry. begun_s: on `time.monotonic`.

    submitted_s: when it last handed a request in. inner_s: seconds that the runtime and the encoding of pictures took.
    ticket, made: the last request handed in and the last result; of a socket there are many. span: of the trace,
    where one is kept.
    """

    id: str
    method: str
    path: str
    caller: Caller | None = None
    begun_s: float = field(default_factory=time.monotonic)
    paid: bool = False
    status: int = 0
    route: str = "none"
    submitted_s: float = 0.0
    ticket: str | None = None
    made: Result | None = None
    encode_s: float = 0.0
    inner_s: float = 0.0
    pictures: int = 0
    span: Any = None

    @property
    def key_name(self) -> str:
        """Of the caller's key; "" where there are no keys."""
        return "" if self.caller is None else self.caller.key.name

    def pay(self) -> None:
        """Take one request from the caller's rate; the first one of a call was taken at the gate.

        Errors: `Refused` 429.
        """
        if self.paid:
            self.paid = False
        elif self.caller is not None:
            self.caller.pay(time.monotonic())

    def note(self, result: Result, encode_s: float) -> None:
        """Pictures were made and encoded in it."""
        self.made, self.encode_s = result, encode_s
        self.inner_s += result.timings.total_s + encode_s
        self.pictures += len(result.pictures)


current: ContextVar[Visit | None] = ContextVar("visit", default=None)
"""The visit that the running task belongs to."""


class Door:
    """Requests into the runtime, within what the caller's key allows.

    count: told (key name, decision) of each: "accepted", or the `code` of the error it was refused with; and how each
    accepted one ended: "finished", or the `code` of its error. reply_s: says how long replies took of late once
    the runtime had ended.
    """

    def __init__(
        self,
        runtime: Runtime,
        callers: Callers,
        max_queue: int,
        count: Callable[[str, str], None],
        reply_s: Callable[[], float],
    ) -> None:
        self._runtime, self._callers, self._max_queue = runtime, callers, max_queue
        self._count, self._reply_s = count, reply_s

    def submit(self, request: GenerateRequest, model: str | None) -> Ticket:
        """As `Runtime.submit`.

        Errors: those of it; `Refused` 401 without a key where one is needed, 429 where its rate or share is used up.
        """
        visit = current.get() or Visit("", "", "")
        visit.submitted_s = time.monotonic()
        try:
            ticket = self._held(visit, request, model)
        except Refused as error:
            self._count(visit.key_name, error.code)
            raise
        except FewstepError as error:
            self._count(visit.key_name, row_of(error).code)
            raise
        visit.ticket = ticket.id
        self._count(visit.key_name, "accepted")
        name = visit.key_name

        def ended(event: Finished | Failed) -> None:
            self._count(name, row_of(event.error).code if isinstance(event, Failed) else "finished")

        ticket.at_end(ended)
        return ticket

    def _held(self, visit: Visit, request: GenerateRequest, model: str | None) -> Ticket:
        caller = visit.caller
        if caller is None and not self._callers.open:
            raise Refused(401, "invalid_api_key", "this server needs an API key, and this request came without one")
        if caller is None:
            return self._runtime.submit(request, model, reply_s=self._reply_s())
        visit.pay()
        caller.hold(self._max_queue)
        try:
            ticket = self._runtime.submit(request, model, reply_s=self._reply_s())
        except BaseException:
            caller.release()
            raise
        ticket.at_end(caller.release)
        return ticket
