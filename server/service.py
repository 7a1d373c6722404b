"""What the routes of one app share, and the way of a job through it: submitted, awaited, encoded."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fastapi import Request

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.events import Result
from fewstep.runtime.local import Runtime
from fewstep.runtime.ticket import Ticket

from . import streaming
from .account import Account
from .health import Health
from .metrics import Meters
from .pictures import Encoded, Store, encoded
from .quota import Callers
from .settings import Settings
from .visit import Door
from .wire import Job


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
        files = await encoded(self.pool, result, job)
        self.account.made(result, files.encode_s)
        return files


def service_of(request: Request) -> Service:
    """The service of the app that a request came to."""
    service: Service = request.app.state.service
    return service
