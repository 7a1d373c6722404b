"""How much of the server one API key may use: requests per second, and places in the queue."""

import math
import threading
import time

from fewstep.runtime.sampling.events import Failed, Finished

from .errors import Refused
from .keys import Key, KeyRing


class Bucket:
    """A token bucket: `rate_per_s` on average, `burst` at once. Full at first."""

    def __init__(self, rate_per_s: float, burst: int, now_s: float) -> None:
        self._rate_per_s, self._burst = rate_per_s, burst
        self._tokens, self._at_s = float(burst), now_s

    def take(self, now_s: float) -> float:
        """0.0 where a token was there and is taken, else the seconds until there is one."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        return (1.0 - self._tokens) / self._rate_per_s


class Caller:
    """What the holder of one key has used. Its requests end on the runtime's thread, hence the lock."""

    def __init__(self, key: Key, now_s: float) -> None:
        self.key = key
        self.held = 0
        self._bucket = None if key.rate_per_s is None else Bucket(key.rate_per_s, key.burst, now_s)
        self._lock = threading.Lock()

    def pay(self, now_s: float) -> None:
        """Take one request from the rate.

        Errors: `Refused` 429 with Retry-After.
        """
        with self._lock:
            wait_s = 0.0 if self._bucket is None else self._bucket.take(now_s)
        if wait_s:
            message = f"key {self.key.name!r} may send {self.key.rate_per_s:g} requests per second; come back later"
            raise _later("key_rate", message, wait_s)

    def hold(self, max_queue: int) -> None:
        """Take one place of its share of a queue of `max_queue`.

        Errors: `Refused` 429 with Retry-After.
        """
        most = max(1, int(self.key.share * max_queue))
        with self._lock:
            if self.held >= most:
                message = f"key {self.key.name!r} has {self.held} requests waiting or running, and may have {most}"
                raise _later("key_share", f"{message}; come back when one has ended", 1.0)
            self.held += 1

    def release(self, event: Finished | Failed | None = None) -> None:
        """Give the place back; `event` is the end of its ticket, where it had one."""
        with self._lock:
            self.held -= 1


class Callers:
    """The callers of one server. A key whose limits were changed begins anew."""

    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring
        self._known: dict[str, Caller] = {}

    @property
    def open(self) -> bool:
        """Whether anybody may call, without a key."""
        return self._ring.open

    def find(self, given: str) -> Caller | None:
        """Whose key this is; None where it is nobody's."""
        key = self._ring.find(given)
        if key is None:
            return None
        known = self._known.get(key.name)
        if known is None or known.key != key:
            known = self._known[key.name] = Caller(key, time.monotonic())
        return known


def _later(code: str, message: str, wait_s: float) -> Refused:
    return Refused(429, code, message, Retry_After=str(max(1, math.ceil(wait_s))))
