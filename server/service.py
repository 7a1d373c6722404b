"""What the routes of one app share, and the way of a job through it: submitted, awaited, encoded."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.events import Result
from fewstep.runtime.service.local import Runtime
from fewstep.runtime.service.ticket import Ticket

from . import streaming
from .account import Account
from .health import Health
from .jobs import Jobs
from .metrics import Meters
from .pictures import Encoded, Store, encoded
from .provenance import Signatory
from .quota import Callers
from .sessions import Sessions
from .settings import Settings
from .visit import Door, current
from .wire import Job

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """What the routes of one app share."""

    runtime: Runtime
    settings: Settings
    health: Health
    meters: Meters
    store: Store
    pool: ThreadPoolExecutor
    started_unix_s: int
    callers: Callers
    door: Door
    account: Account
    signatory: Signatory | None
    jobs: Jobs
    sessions: Sessions

    def submit(self, job: Job) -> Ticket:
        try:
            return self.door.submit(job.request, job.model)
        except InvalidRequest as error:
            raise job.renamed(error) from error

    async def make(self, job: Job, request: Request) -> tuple[Result, Encoded]:
        """Run a job to encoded pictures; a caller who hangs up ends it."""
        result = await streaming.result(self.runtime, self.submit(job), request)
        return result, await self.encode(result, job)

    async def encode(self, result: Result, job: Job) -> Encoded:
        files = await encoded(self.pool, result, job, self.signatory)
        self.account.made(result, files.encode_s)
        return files

    async def aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do work on pictures in a thread, out of the event loop's way."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)


def service_of(request: Request) -> Service:
    """The service of the app that a request came to."""
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> str:
    """Who calls: the name of the key, or the address where no keys are needed."""
    visit = current.get()
    if visit is not None and visit.caller is not None:
        return f"key {visit.caller.key.name}"
    return f"address {request.client.host if request.client else 'unknown'}"
