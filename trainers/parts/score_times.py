"""Times at which two scores are compared, where they hang on the step that made the sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.paths import Path

from ..errors import RecipeError
from .laws import Law
from .objective import Turn
from .rollout import Made

START, LANDING = "start", "landing"


@dataclass(frozen=True)
class Window:
    """A law of times squeezed linearly, in native time, into the part of the path above or below a sample's own time.

    of: "start", the time at which the step that made it began, or "landing", where that ended. low, high: shares of the
    path that bound the whole law; margin: the share of it that is left out beside the sample's time. Where nothing is
    left between them that time is drawn.
    """

    law: Law
    of: str = LANDING
    above: bool = True
    low: float = 0.0
    high: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.of not in (START, LANDING):
            raise RecipeError(f"a window hangs on {self.of!r}; it must be {START!r} or {LANDING!r}")

    def within(self, path: Path, made: Made, turn: Turn) -> Tensor:
        """[B] times."""
        end, width = path.end, path.start - path.end
        own = made.t if self.of == START or made.s is None else made.s
        own = own.clamp(min=end) + (self.margin if self.above else -self.margin) * width
        if self.of == LANDING and made.s is None:
            own = torch.full_like(own, end)
        own = own.clamp(end, path.start)
        low, high = (torch.full_like(own, end + share * width) for share in (self.low, self.high))
        if self.above:
            low, high = torch.maximum(low, own), torch.maximum(high, own)
        else:
            low, high = torch.minimum(low, own), torch.minimum(high, own)
        t = low + (high - low) * ((self.law.draw(path, len(own), turn) - end) / width).to(low)
        return t.round() if path.kind == "vp" else t


def draw_times(law: Law | Window, path: Path, made: Made, turn: Turn) -> Tensor:
    """[B] times for what a student made."""
    return law.within(path, made, turn) if isinstance(law, Window) else law.draw(path, len(made.x0), turn)
