"""Distillation and adaptation at once (Uni-DAD, Bahram et al. 2025): a second, fine-tuned teacher, and few real shots.

The role `adapted` is that teacher: for pictures the bundle that `--set adapted=DIR` names, on the plane the perfect
denoiser of the moved data. Real data are the few shots of the new domain.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle, load_bundle

from .errors import RecipeError
from .objective import Batch, Cast, Metrics, Turn, derive
from .plane import CLASSES, Plane, PlaneSource
from .rollout import Made
from .student import load_denoiser, merged
from .times import UniformScale

ADAPTED = "adapted"
SHOTS = 32
"""Points of each class that the plane's new domain is known by."""
MOVED = (0.3, -0.2)
"""Where the plane's new domain lies from the old."""


@dataclass(frozen=True)
class TaughtBy:
    """`weight` times the term, with the network of another role as its teacher, whose normaliser is that network's."""

    term: Any
    role: str = ADAPTED
    weight: float = 1.0

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.role if role == "teacher" else role for role in self.term.roles)

    @property
    def guidance(self) -> UniformScale | None:
        return getattr(self.term, "guidance", None)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        theirs = replace(cast, roles={**cast.roles, "teacher": cast[self.role]})
        loss, metrics = self.term.loss(made, theirs, batch, turn)
        return self.weight * loss, {f"{self.role}_{name}": value for name, value in metrics.items()}


def adapted_network(named: str | None, recipe: str, teacher: Bundle) -> Any:
    """The fine-tuned teacher's network, frozen.

    Errors: `RecipeError` where none is named, or it is not the teacher's like.
    """
    if named is None:
        raise RecipeError(
            f"recipe {recipe!r} learns from a teacher that was fine-tuned on the new domain too; name its bundle with "
            "--set adapted=DIR, or set target=0 to learn from the first alone"
        )
    other = load_bundle(named)
    for field in ("path", "prediction", "latent"):
        if getattr(other.spec, field) != getattr(teacher.spec, field):
            raise RecipeError(
                f"adapted {other.name!r} and the teacher {teacher.name!r} differ in {field}; fine-tune that teacher"
            )
    return merged(load_denoiser(other)).requires_grad_(False).eval()


def learns_adapted(recipe: Any) -> bool:
    """Whether a recipe's student is for a new domain."""
    return any(ADAPTED in stage.objective.roles for stage in recipe.stages)


def moved_plane(data: Plane) -> Plane:
    """The new domain: the same modes elsewhere."""
    return replace(data, data=data.data.moved(torch.tensor(MOVED, dtype=torch.float64)))


class FewShots:
    """Batches of a few points of each class, the same ones over and over."""

    def __init__(self, source: PlaneSource) -> None:
        self.source = source
        rng = torch.Generator().manual_seed(derive(source.seed, "shots"))
        labels = torch.arange(CLASSES).repeat_interleave(SHOTS)
        self.points = source.data.draw(labels, rng).float().reshape(CLASSES, SHOTS, 2)

    def batch(self, step: int) -> Batch:
        chosen = self.source.choose(step)
        rng = torch.Generator().manual_seed(derive(self.source.seed, step, "shot"))
        which = torch.randint(SHOTS, (len(chosen),), generator=rng)
        return replace(self.source.gather(chosen), x0=self.points[chosen[:, 0], which])
