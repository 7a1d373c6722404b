"""Distribution matching: a student is trained on its own samples, by terms that say where they should move.

A method is a rollout and, for each player, a sum of terms. DMD2 (Yin et al. 2024) is a score gap and a GAN term for the
student, and denoising and the critic's loss for the fake score.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import RecipeError
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made, Rollout
from ..parts.times import UniformScale


class Term(Protocol):
    """A part of one player's loss on what the student made; in the student's turn `made` has a gradient.

    One that takes the critic's logits for log(p / q) says so: `reads_ratio = True`. So does one whose gradient passes
    through other networks, whose weights stay: `through_networks = True`; and one whose gradient comes back by another
    way than through `made.x0`: `of_samples = False`.
    """

    @property
    def roles(self) -> tuple[str, ...]:
        """The denoisers it asks for beside the student."""
        ...

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]: ...


def _of_term(name: str, *, otherwise: bool = False) -> Any:
    """What the term inside says of itself, `otherwise` where it says nothing."""
    return property(lambda self: bool(getattr(self.term, name, otherwise)))


class Around:
    """A term around another one, `term`: what that one says of itself holds for both."""

    term: Any

    @property
    def roles(self) -> tuple[str, ...]:
        asked: tuple[str, ...] = self.term.roles
        return asked

    @property
    def guidance(self) -> UniformScale | None:
        return getattr(self.term, "guidance", None)

    @property
    def adversary(self) -> Any:
        return self.term.adversary  # no attribute where the term has none

    fake_cfg = _of_term("fake_cfg")
    reads_ratio = _of_term("reads_ratio")
    two_times = _of_term("two_times")
    through_networks = _of_term("through_networks")
    of_samples = _of_term("of_samples", otherwise=True)


@dataclass(frozen=True, kw_only=True)
class DistributionMatching:
    """terms: player -> what its loss sums, in the order of their turns; the student first.

    walker: the role whose samples they are; another than the student's make an objective of fixed pairs. told: the fake
    and the critic are told, as `s` of their condition, at which time the step began that made a sample. Steps from
    several times share the law that they aim at, not the law that they have; one untold score is that of their mixture,
    which leaves each free to drift.
    """

    rollout: Rollout
    terms: Mapping[str, tuple[Term, ...]]
    walker: str = "student"
    told: bool = False

    def __post_init__(self) -> None:
        every = [term for terms in self.terms.values() for term in terms]
        reader = next((type(term).__name__ for term in every if getattr(term, "reads_ratio", False)), None)
        losses = [adversary.loss for term in every if (adversary := getattr(term, "adversary", None)) is not None]
        if reader is not None and (wrong := [loss for loss in losses if not loss.is_ratio]):
            raise RecipeError(
                f"{reader} reads log(p / q) from the critic, whose best logits are that with Softplus alone, not with "
                f"{type(wrong[0]).__name__}; give the adversary Softplus"
            )

    @property
    def players(self) -> tuple[str, ...]:
        return tuple(self.terms)

    @property
    def roles(self) -> tuple[str, ...]:
        asked = [role for terms in self.terms.values() for term in terms for role in term.roles]
        every = dict.fromkeys(("student", *self.terms, *asked))
        return tuple(role for role in every if role not in ("critic", "proxy"))

    @property
    def two_times(self) -> bool:
        """Whether the student is told where its step lands."""
        return any(getattr(part, "two_times", False) for part in (self.rollout, *self.terms["student"]))

    @property
    def guidance(self) -> UniformScale | None:
        """The teacher's scale, which the student takes in for good; None where no term has one."""
        taken = [term for term in self.terms["student"] if not getattr(term, "fake_cfg", False)]
        scales = (getattr(term, "guidance", None) for term in taken)
        return next((scale for scale in scales if scale is not None), None)

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        with torch.set_grad_enabled(player == "student"):
            made = self.rollout.make(cast[self.walker], batch, turn)
        if self.told:
            batch = replace(batch, cond={**batch.cond, "s": made.t})
        total: Tensor | float = 0.0
        metrics: Metrics = {}
        for term in self.terms[player]:
            value, told = term.loss(made, cast, batch, turn)
            total, metrics = total + value, metrics | told
        if not isinstance(total, Tensor):
            raise TypeError(f"the player {player!r} has no term")
        return total, metrics
