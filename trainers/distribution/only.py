"""A term for the steps that begin in one part of the path, or from a share of the run on."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import RecipeError
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from .distribution import Around


@dataclass(frozen=True)
class Only(Around):
    """The term where a step begins at `low < share <= high` of the path, and from the share `after` of the run on.

    Elsewhere it is nothing. A batch shares its step, so every process of a run has the term or leaves it out.
    """

    term: Any
    low: float = 0.0
    high: float = 1.0
    after: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise RecipeError(f"a term for {self.low} to {self.high} of the path; these are shares, the lower first")

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        path = cast["student"].path
        share = (made.t - path.end) / (path.start - path.end)
        inside = (share > self.low - (self.low == 0.0)) & (share <= self.high + 1e-9)
        if bool(inside.any()) != bool(inside.all()):
            raise RecipeError("a term for some of the steps needs a rollout whose batch shares its step")
        if turn.progress < self.after or not bool(inside.all()):
            return 0.0 * made.x0.float().sum(), {}
        loss, metrics = self.term.loss(made, cast, batch, turn)
        return loss, metrics
