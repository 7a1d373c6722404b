"""Score forgetting (Chen et al. 2024, arXiv 2409.11219): a student unlearns one concept while it is distilled.

Where the forgotten concept is asked for, the teacher is asked for another in its place; student and fake score are
asked for what the user would say. So the student gives the other concept's samples, and no data are needed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand

from ..errors import RecipeError
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.times import UniformScale
from .distribution import Around, Term


@dataclass(frozen=True)
class Swap:
    """What is forgotten, and what is taught in its place: a word of prompts, on the plane the name of a class."""

    forget: str
    override: str

    def __post_init__(self) -> None:
        if not self.forget.strip() or not self.override.strip() or self.forget == self.override:
            raise RecipeError(
                f"forget is {self.forget!r} and override {self.override!r}; name two different words of the prompts"
            )


@dataclass(frozen=True)
class Forgetting(Around):
    """A term, where the teacher is asked for what `batch.taught` says; forgotten rows count `weight` times.

    They count by their gradient: the student's samples, or in another's turn what the networks answer, pass that much
    of it back. So no row is set apart, and all see the draws that they would see anyway.
    """

    term: Term
    weight: float

    def __post_init__(self) -> None:
        own = (getattr(self.term, "fake_guidance", 1.0), getattr(self.term, "guidance", 1.0))
        if any(isinstance(scale, float) and scale != 1.0 for scale in own):
            raise RecipeError("a term that guides its fake score has no room for a forgotten concept; set that to 1")

    @property
    def guidance(self) -> UniformScale | None:
        """The teacher's scale, where the term has one."""
        scale = getattr(self.term, "guidance", None)
        return scale if isinstance(scale, UniformScale) else None

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        if batch.taught is None:
            return self.term.loss(made, cast, batch, turn)
        gone = forgotten(batch)
        share = 1.0 + (self.weight - 1.0) * gone.to(made.x0)
        learns = made.x0.requires_grad
        if learns:
            x_s = None if made.x_s is None else counted(made.x_s, share)
            made = replace(made, x0=counted(made.x0, share), x_s=x_s)
        others = {name: net for name, net in cast.roles.items() if name != "teacher"}
        told = {name: asked(net, batch.cond, None if learns else share) for name, net in others.items()}
        theirs = replace(cast, roles={**cast.roles, **told})
        meant = replace(batch, cond={**batch.cond, **batch.taught}, taught=None)
        value, metrics = self.term.loss(made, theirs, meant, turn)
        return value, {**metrics, "forgotten": float(gone.float().mean())}


def forgotten(batch: Batch) -> Tensor:
    """[B]: the rows whose teacher is asked for something else."""
    gone = torch.zeros(len(batch.x0), dtype=torch.bool, device=batch.x0.device)
    for name, value in (batch.taught or {}).items():
        gone |= (value != batch.cond[name]).flatten(1).any(1)
    return gone


def counted(x: Tensor, share: Tensor) -> Tensor:
    """x, whose gradient is `share` [B] times itself."""
    return x.detach() + expand(share, x) * (x - x.detach())


def asked(net: Denoiser, cond: Condition, share: Tensor | None) -> Denoiser:
    """The network, asked in `cond` whatever it is told; share [B]: how much of the gradient of its answer counts."""

    def answer(x: Tensor, t: Tensor, told: Condition) -> Tensor:
        out = net.raw(x, t, {**told, **cond})
        return out if share is None else counted(out, share)

    return Denoiser(answer, net.path, net.prediction)
