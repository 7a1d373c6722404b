"""Live, ready, draining: a server is ready once each model has made a picture, until it is told to stop."""

import asyncio
import logging
from typing import Any

from fewstep.runtime.errors import FewstepError
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.service.local import Runtime

from .errors import Refused
from .streaming import events, last

_log = logging.getLogger("fewstep.server")


class Health:
    """One server's state: warming, ready, draining, or failed with the reason."""

    def __init__(self) -> None:
        self.state = "warming"
        self.reason = "the models are warming up; come back in a moment"
        self.leaving = asyncio.Event()
        """Set when live sessions are to end what they draw and close."""

    def check(self) -> dict[str, Any]:
        """The body of /ready.

        Errors: `Refused` 503 while no traffic should come here.
        """
        if self.state != "ready":
            raise Refused(503, self.state, self.reason, retry_after="1")
        return {"status": "ready"}

    def drain(self) -> None:
        self.state, self.reason = "draining", "the server is shutting down; send new requests elsewhere"

    async def warm(self, runtime: Runtime) -> None:
        """Make one picture with each model, then be ready; a model that cannot is the reason why not."""
        for name in runtime.models:
            try:
                await last(events(runtime, runtime.submit(GenerateRequest(prompt="warm up"), name)))
            except FewstepError as error:
                _log.error("the warm-up of %s failed: %s", name, error)
                self.state, self.reason = "failed", f"the warm-up of {name} failed: {error}"
                return
        if self.state == "warming":
            self.state, self.reason = "ready", ""
