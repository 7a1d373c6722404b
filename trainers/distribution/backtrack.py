"""Distribution backtracking (DisBack): the teacher's place is held by a trail of scores that leads back to it.

First the fake walks from the teacher to the law of the student as it began, and leaves snapshots on the way; then the
student follows these in the other order, and the teacher at last. Snapshots are running averages of the fake's that
stop, so they are kept and resumed with the run.
"""

import math
from dataclasses import dataclass

from ..errors import RecipeError


@dataclass(frozen=True)
class Snapshot:
    """The decay of an average that is the weights themselves up to a progress of the run, and stays there."""

    at: float

    def __call__(self, n: int, progress: float) -> float:
        return 0.0 if progress < self.at else 1.0


@dataclass(frozen=True)
class Trail:
    """`points` snapshots left by the share `out` of the run; the student is back at the teacher at the share `back`."""

    points: int = 4
    out: float = 0.1
    back: float = 0.5

    def __post_init__(self) -> None:
        if self.points < 1 or not 0.0 < self.out < self.back < 1.0:
            raise RecipeError(
                f"a trail of {self.points} points, out by {self.out} of the run and back by {self.back}; it needs a "
                "point, and shares that rise between 0 and 1"
            )

    @property
    def averages(self) -> dict[str, Snapshot]:
        """The fake's snapshots, the first nearest to the teacher."""
        return {f"trail{k}": Snapshot(self.out * (k + 1) / self.points) for k in range(self.points)}

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(f"fake.{name}" for name in self.averages)

    def role(self, progress: float) -> str:
        """Who stands for the teacher now."""
        if progress >= self.back:
            return "teacher"
        left = math.ceil(self.points * (self.back - max(progress, self.out)) / (self.back - self.out))
        return self.roles[min(self.points, left) - 1]
