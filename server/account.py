"""What is written down of every call when it ends: its log line, its measurements, its trace."""

import time
from collections import deque
from collections.abc import Mapping

from fewstep.runtime.sampling.events import Result

from .logs import log_visit
from .metrics import Meters
from .traces import Traces
from .visit import Visit, current

LATEST = 64


class Account:
    """One server's books. reply_s: of 100 of the latest calls, 95 took no longer from the runtime's end to the reply's
    beginning, which a promised deadline has to leave time for."""

    def __init__(self, meters: Meters, traces: Traces | None) -> None:
        self._meters, self._traces = meters, traces
        self._after: deque[float] = deque(maxlen=LATEST)
        self.reply_s = 0.0

    def begin(self, visit: Visit, headers: Mapping[str, str]) -> None:
        if self._traces is not None:
            self._traces.begin(visit, headers)

    def made(self, result: Result, encode_s: float) -> None:
        """A route has made and encoded pictures."""
        self._meters.encoded(encode_s)
        visit = current.get()
        if visit is not None:
            visit.note(result, encode_s)
            if self._traces is not None:
                self._traces.made(visit, result, encode_s)

    def refused(self, visit: Visit, code: str) -> None:
        """The gate let it go no further."""
        self._meters.decided(visit.key_name, code)

    def answered(self, visit: Visit) -> None:
        """The reply begins."""
        if visit.made is not None:
            took_s = time.monotonic() - visit.submitted_s - visit.made.timings.total_s
            self._after.append(max(0.0, took_s))
            self.reply_s = sorted(self._after)[len(self._after) * 95 // 100]
        self._meters.response(visit.route, visit.status)

    def end(self, visit: Visit) -> None:
        seconds = time.monotonic() - visit.begun_s
        self._meters.visited(visit, seconds)
        log_visit(visit, seconds)
        if self._traces is not None:
            self._traces.end(visit, seconds)

    def close(self) -> None:
        if self._traces is not None:
            self._traces.close()
