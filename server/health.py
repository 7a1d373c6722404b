"""Live, ready, draining: a server is ready once each model has made a picture, until it is told to stop."""

import asyncio
import logging
from typing import Any

from fewstep.runtime.errors import FewstepError, Overloaded
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.service.local import Runtime
from fewstep.runtime.service.ticket import Ticket

from .errors import Refused
from .streaming import events, last

_log = logging.getLogger("fewstep.server")
WARM_WAIT_S = 300.0
"""For how long a full queue may keep a model's first picture out before that counts as a failure."""


class Health:
    """One server's state: warming, ready, draining, or failed with the reason."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.state = "warming"
        self.reason = "the models are warming up; come back in a moment"
        self.leaving = asyncio.Event()
        """Set when live sessions are to end what they draw and close."""

    def look(self) -> str:
        """The state now: a server that was ready has failed once its runtime takes no more requests."""
        if self.state == "ready" and self._runtime.closed:
            self.state = "failed"
            self.reason = "the runtime has stopped, and the log has the reason: restart the server"
        return self.state

    def check(self) -> dict[str, Any]:
        """The body of /ready.

        Errors: `Refused` 503 while no traffic should come here.
        """
        if self.look() != "ready":
            raise Refused(503, self.state, self.reason, retry_after="1")
        return {"status": "ready"}

    def drain(self) -> None:
        self.state, self.reason = "draining", "the server is shutting down; send new requests elsewhere"

    async def warm(self) -> None:
        """Make one picture with each model, then be ready; a model that cannot is the reason why not."""
        for name in self._runtime.models:
            try:
                await last(events(self._runtime, await self._enter(name)))
            except Exception as error:  # of whatever kind: a server that warms for ever tells nobody why
                foreseen = isinstance(error, FewstepError)
                said = str(error) if foreseen else repr(error)
                _log.error("the warm-up of %s failed: %s", name, said, exc_info=not foreseen)
                self.state, self.reason = "failed", f"the warm-up of {name} failed: {said}"
                return
        if self.state == "warming":
            self.state, self.reason = "ready", ""

    async def _enter(self, name: str) -> Ticket:
        """A model's first request. Others are taken meanwhile, so the queue may be full: then it waits for room.

        Errors: those of `Runtime.submit`; `Overloaded` once it has waited for `WARM_WAIT_S`.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + WARM_WAIT_S
        while True:
            try:
                return self._runtime.submit(GenerateRequest(prompt="warm up"), name)
            except Overloaded as error:
                if (left_s := end_s - loop.time()) <= 0.0:
                    raise
                await asyncio.sleep(min(error.retry_after_s, left_s))
