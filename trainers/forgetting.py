"""Score forgetting (Chen et al. 2024, arXiv 2409.11219): a student unlearns one concept while it is distilled.

Where the forgotten concept is asked for, the teacher is asked for another in its place; student and fake score are
asked for what the user would say. So the student gives the other concept's samples, and no data are needed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser

from .distribution import Term
from .errors import RecipeError
from .objective import Batch, Cast, Metrics, Turn
from .rollout import Made
from .times import UniformScale


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
class Forgetting:
    """A term, where the teacher is asked for what `batch.taught` says; those rows count `weight` times.

    The term sees kept and forgotten rows apart. Its estimate of the fake score must be unguided.
    """

    term: Term
    weight: float

    def __post_init__(self) -> None:
        if any(getattr(self.term, name, 1.0) != 1.0 for name in ("fake_guidance",)):
            raise RecipeError("a term that guides its fake score has no room for a forgotten concept; set it to 1")

    @property
    def roles(self) -> tuple[str, ...]:
        return self.term.roles

    @property
    def through_networks(self) -> bool:
        return bool(getattr(self.term, "through_networks", False))

    @property
    def guidance(self) -> UniformScale | None:
        """The teacher's scale, where the term has one."""
        scale = getattr(self.term, "guidance", None)
        return scale if isinstance(scale, UniformScale) else None

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        taught = batch.taught or {}
        gone = forgotten(batch)
        total, told = torch.zeros((), device=made.x0.device), {}
        for rows, factor in ((~gone, 1.0), (gone, self.weight)):
            if not bool(rows.any()):
                continue
            part = Batch(batch.x0[rows], pick(batch.cond, rows), pick(batch.uncond, rows))
            theirs = cast
            if bool(gone[rows].any()):
                others = {name: net for name, net in cast.roles.items() if name != "teacher"}
                told_so = {name: asked(net, part.cond) for name, net in others.items()}
                theirs = replace(cast, roles={**cast.roles, **told_so})
                part = replace(part, cond={**part.cond, **pick(taught, rows)})
            value, found = self.term.loss(_rows(made, rows), theirs, part, turn)
            total = total + factor * rows.float().mean() * value
            told |= found if factor == 1.0 else {f"forgotten_{name}": number for name, number in found.items()}
        return total, told


def forgotten(batch: Batch) -> Tensor:
    """[B]: the rows whose teacher is asked for something else."""
    gone = torch.zeros(len(batch.x0), dtype=torch.bool, device=batch.x0.device)
    for name, value in (batch.taught or {}).items():
        gone |= (value != batch.cond[name]).flatten(1).any(1)
    return gone


def asked(net: Denoiser, cond: Condition) -> Denoiser:
    """The network, asked in `cond` whatever it is told."""
    return Denoiser(lambda x, t, told: net.raw(x, t, {**told, **cond}), net.path, net.prediction)


def pick(cond: Condition, rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in cond.items()}


def _rows(made: Made, rows: Tensor) -> Made:
    s, x_s = (None if v is None else v[rows] for v in (made.s, made.x_s))
    return Made(made.x0[rows], made.x[rows], made.t[rows], s, x_s)
