"""Distillation and adaptation at once (Uni-DAD, Bahram et al. 2025): a second, fine-tuned teacher, and few real shots.

The role `adapted` is that teacher: for pictures the bundle that `--set adapted=DIR` names, on the plane the perfect
denoiser of the moved data. Real data are the few shots of the new domain.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fewstep.models.bundle import Bundle, load_bundle

from ..errors import RecipeError
from ..networks.student import load_denoiser, merged
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from .distribution import Around

ADAPTED = "adapted"


@dataclass(frozen=True)
class TaughtBy(Around):
    """`weight` times the term, with the network of another role as its teacher, whose normaliser is that network's."""

    term: Any
    role: str = ADAPTED
    weight: float = 1.0

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.role if role == "teacher" else role for role in self.term.roles)

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
