"""What A1111's clients take for one global state, kept per caller: the chosen model, and the job that runs.

So that one caller's `interrupt` never ends another's job, and one caller's choice of a model changes no one else's.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from fewstep.runtime.sampling.events import Event, Failed, Finished, Picture, Progress

MAX_CALLERS = 1024
_LATE_S = 5.0
"""How long after a caller hung up an interrupt still means the job that ended by it (clients send it on closing)."""


@dataclass(eq=False)
class Running:
    """One job as its caller asks about it. done, total: steps over all its pictures; told by the runtime's thread."""

    ticket_id: str
    task_id: str
    pictures: int
    done: int = 0
    step: int = 0
    steps: int = 0
    preview: Picture | None = None
    interrupted: bool = False
    begun_s: float = field(default_factory=time.monotonic)
    begun_unix_s: float = field(default_factory=time.time)

    def note(self, event: Event) -> None:
        """A ticket's listener."""
        if isinstance(event, Progress):
            self.done += 1
            self.step, self.steps = max(self.step, event.step), event.steps
            self.preview = event.preview if event.preview is not None else self.preview
        elif isinstance(event, Finished | Failed):
            self.preview = None

    @property
    def progress(self) -> float:
        """0 to 1; just above 0 while it waits, so that 0 means that nothing runs."""
        return max(0.01, self.done / (self.pictures * self.steps) if self.steps else 0.0)

    def eta_s(self, now_s: float) -> float:
        """Seconds to go, if it goes on as it went; 0 where it has not begun."""
        return (now_s - self.begun_s) * (1.0 - self.progress) / self.progress if self.done else 0.0


@dataclass(eq=False)
class Seat:
    """One caller. running: by the order of their beginning; the first is the one that progress is about."""

    model: str | None = None
    live_previews: bool = False
    running: list[Running] = field(default_factory=list)
    hung_up_s: float | None = None

    def current(self, task_id: str | None) -> Running | None:
        """The job of a task id, or the one that has run longest."""
        return next((run for run in self.running if task_id in (None, run.task_id)), None)

    def left(self, run: Running, now_s: float) -> None:
        """Its caller closed the connection, which ended it."""
        if not run.interrupted:
            self.hung_up_s = now_s

    def interrupt(self, task_id: str | None, now_s: float) -> Running | None:
        """The job that an interrupt means. A client that closes hangs up and interrupts, in either order: once."""
        late = self.hung_up_s is not None and now_s - self.hung_up_s < _LATE_S
        self.hung_up_s = None
        found = None if late and task_id is None else self.current(task_id)
        if found is not None:
            found.interrupted = True
        return found


class Sessions:
    """The callers of one server, those not heard of for longest forgotten first. Used from the event loop only."""

    def __init__(self) -> None:
        self._seats: OrderedDict[str, Seat] = OrderedDict()

    def of(self, caller: str) -> Seat:
        seat = self._seats.setdefault(caller, Seat())
        self._seats.move_to_end(caller)
        if len(self._seats) > MAX_CALLERS:
            idle = [name for name, other in self._seats.items() if not other.running and other is not seat]
            for name in idle[: len(self._seats) - MAX_CALLERS]:
                del self._seats[name]
        return seat
