"""A stream of frames, each a request in flight at a step of its own: the latest frame wins, like frames are skipped.

StreamDiffusion (Kodaira et al. 2023) keeps N frames at N steps in one batch. Here each frame is a request like any
other (an img2img one, mostly), and the scheduler puts rows at different steps into one call; so `depth` frames in
flight, of `depth` steps each, give a picture per call, and other traffic shares the same calls. Give every frame the
same seed: the noise then stands still as the picture moves.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FewstepError
from ..sampling.events import Failed, Finished, Result
from ..sampling.request import GenerateRequest
from .ticket import Ticket


class SimilarityFilter:
    """StreamDiffusion's stochastic similarity filter: the likelier a frame shows nothing new, the likelier it goes.

    P(skip) = max(0, 1 - (1 - cos) / (1 - eta)), cos between the frame and the last one that passed; after `max_skip`
    frames in a row one passes. The count begins anew with every frame that passes.
    """

    def __init__(self, eta: float = 0.98, max_skip: int = 10, seed: int = 0) -> None:
        if not 0.0 <= eta < 1.0:
            raise ValueError(f"eta is {eta}; it must be from 0 to below 1, the cosine from which frames may be skipped")
        if max_skip < 1:
            raise ValueError(f"max_skip is {max_skip}; it must be 1 or more frames")
        self.eta, self.max_skip = eta, max_skip
        self._chance = random.Random(seed)
        self._last: Any = None
        self._skipped = 0

    def passes(self, image: Any) -> bool:
        """Whether a frame, any array of a fixed shape, is to be made."""
        frame = np.asarray(image, np.float32).ravel()
        frame = frame / max(float(np.linalg.norm(frame)), 1e-12)
        if self._last is not None and self._last.shape == frame.shape and self._skipped < self.max_skip:
            likeness = float(frame @ self._last)
            if self._chance.random() < 1.0 - (1.0 - likeness) / (1.0 - self.eta):
                self._skipped += 1
                return False
        self._last, self._skipped = frame, 0
        return True


@dataclass(frozen=True)
class Shown:
    """The result of frame `number`, or why there is none."""

    number: int
    result: Result | None = None
    error: FewstepError | None = None


@dataclass
class Counts:
    """What became of frames: made or failed, dropped for a newer one, skipped as nothing new, or done too late: after a
    newer one was shown."""

    made: int = 0
    failed: int = 0
    dropped: int = 0
    skipped: int = 0
    late: int = 0


class LiveStream:
    """One caller's frames. `submit` and `cancel` are a runtime's; `show` is called from its thread, frames in order.

    depth: frames in flight at once, the model's step count for one picture per engine call. similar: the filter, which
    looks at `edit.image`, else at the control picture.
    """

    def __init__(
        self,
        submit: Callable[[GenerateRequest], Ticket],
        cancel: Callable[[str], object],
        show: Callable[[Shown], None],
        *,
        depth: int = 1,
        similar: SimilarityFilter | None = None,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; keep 1 or more frames in flight")
        self.counts = Counts()
        self._submit, self._cancel, self._show = submit, cancel, show
        self._depth, self._similar = depth, similar
        self._lock = threading.RLock()
        self._flying: dict[int, str | None] = {}
        self._waiting: tuple[int, GenerateRequest] | None = None
        self._numbers = 0
        self._newest = -1
        self._closed = False

    def frame(self, request: GenerateRequest) -> int | None:
        """Take a frame; its number, or None where it is skipped and the last picture still stands.

        A frame that finds `depth` in flight waits; a newer one takes its place.
        """
        with self._lock:
            image = _image(request)
            if self._similar is not None and image is not None and not self._similar.passes(image):
                self.counts.skipped += 1
                return None
            number = self._numbers
            self._numbers += 1
            if self._waiting is not None:
                self.counts.dropped += 1
            self._waiting = (number, request)
            self._fly()
            return number

    @property
    def flying(self) -> int:
        """Frames in flight."""
        with self._lock:
            return len(self._flying)

    def close(self) -> None:
        """Take no more, and end what is in flight. Idempotent."""
        with self._lock:
            self._closed, self._waiting = True, None
            flying = [ticket for ticket in self._flying.values() if ticket is not None]
        for ticket in flying:
            self._cancel(ticket)

    def _fly(self) -> None:
        """Send the waiting frame where there is room; the lock is held."""
        while self._waiting is not None and len(self._flying) < self._depth and not self._closed:
            (number, request), self._waiting = self._waiting, None
            self._flying[number] = None  # events may come before `submit` returns
            try:
                ticket = self._submit(request)
            except FewstepError as error:
                del self._flying[number]
                self._tell(Shown(number, error=error))
                continue
            self._flying[number] = ticket.id
            ticket.at_end(lambda event, number=number: self._landed(number, event))  # type: ignore[misc]

    def _landed(self, number: int, event: Finished | Failed) -> None:
        with self._lock:
            self._flying.pop(number, None)
            if not self._closed:
                failed = isinstance(event, Failed)
                self._tell(Shown(number, error=event.error) if failed else Shown(number, event.result))  # type: ignore[union-attr]
            self._fly()

    def _tell(self, shown: Shown) -> None:
        if shown.number < self._newest:
            self.counts.late += 1
            return
        self._newest = shown.number
        if shown.error is None:
            self.counts.made += 1
        else:
            self.counts.failed += 1
        self._show(shown)


def _image(request: GenerateRequest) -> Any:
    if request.edit is not None:
        return request.edit.image
    return None if request.control is None else request.control.edge
