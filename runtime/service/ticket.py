"""A caller's hold on an accepted request."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..sampling.events import Event, Failed, Finished, Progress, Result

_log = logging.getLogger(__name__)


class Ticket:
    """An accepted request. Its events end with exactly one `Finished` or `Failed`."""

    def __init__(self, ticket_id: str) -> None:
        self.id = ticket_id
        self._events: list[Event] = []
        self._listeners: list[Callable[[Event], None]] = []
        self._at_end: list[Callable[[Finished | Failed], None]] = []
        self._final: Finished | Failed | None = None
        self._changed = threading.Condition(threading.RLock())
        self._ended = threading.Event()  # of its own, so that a step does not wake those who wait for the end

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def events(self) -> Iterator[Event]:
        """Every event from the first on, waiting for those to come; ends after the final one."""
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._events) > seen)  # noqa: B023
                event = self._events[seen]
            seen += 1
            yield event
            if not isinstance(event, Progress):
                return

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the end.

        Errors: the `FewstepError` the request failed with; `TimeoutError` where it has not ended in time (it goes on).
        """
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"request {self.id} has not ended within {timeout_s} s")
        assert self._final is not None
        return outcome(self._final)

    def listen(self, callback: Callable[[Event], None]) -> None:
        """Call back for every event in order: past ones at once, then from the runtime's thread. Be quick there."""
        with self._changed:
            self._listeners.append(callback)
            for event in tuple(self._events):
                _call(callback, event)

    def at_end(self, callback: Callable[[Finished | Failed], None]) -> None:
        """Call back for the final event only, as `listen` does.

        Who has no use for the steps should hear of none: waking another thread at each costs as much as a small call.
        """
        with self._changed:
            self._at_end.append(callback)
            if self._final is not None:
                _call(callback, self._final)

    def publish(self, event: Event) -> None:
        """For the runtime. Whatever comes after a final event is dropped."""
        with self._changed:
            if self.done:
                return
            self._events.append(event)
            if not isinstance(event, Progress):
                self._final = event
                self._ended.set()
            self._changed.notify_all()
            for callback in tuple(self._listeners):
                _call(callback, event)
            if not isinstance(event, Progress):
                for at_end in tuple(self._at_end):
                    _call(at_end, event)


def outcome(event: Finished | Failed) -> Result:
    """What a final event brings.

    Errors: what the request failed with.
    """
    if isinstance(event, Failed):
        raise event.error
    return event.result


def _call(callback: Callable[[Any], None], event: Event) -> None:
    try:
        callback(event)
    except Exception:
        _log.exception("a listener raised on %s", type(event).__name__)
