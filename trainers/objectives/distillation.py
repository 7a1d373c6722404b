"""Knowledge distillation: a smaller network learns a larger one's outputs and what its stages give on the way.

BK-SDM (Kim et al. 2023): `L_task + L_out + L_feat`. A-SDM's assembly, VDMini's ICD loss and LinFusion's distillation
are the same with other weights, or with stages that are fed the larger network's inputs (`trainers.networks.watch`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.paths import Path

from ..parts.distances import Distance, Weight
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.times import UniformScale
from ..parts.transitions import NoisedData, with_scale


class Times(Protocol):
    def draw(self, path: Path, count: int, turn: Turn) -> Tensor: ...


def feature_loss(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Mean over stages of `|f_s - f_t|^2 / |f_t|^2`, so that no stage counts more for having larger numbers."""
    gaps = []
    for name, aim in theirs.items():
        if name in mine and mine[name].shape == aim.shape:
            aim = aim.detach().float()
            gaps.append((mine[name].float() - aim).square().mean() / aim.square().mean().clamp(min=1e-8))
    return torch.stack(gaps).mean() if gaps else torch.zeros(())


@dataclass(frozen=True, kw_only=True)
class KnowledgeDistillation:
    """The parts of BK-SDM's loss. task, output, feature: weights of data, of the teacher's output and of its stages.

    task must be 0 where the teacher is a few-step student: its estimate is not the mean of the data. guidance: the
    scale both networks are told, where they have an input for it; None leaves the batch's own. alone: share of the
    steps, evenly spread, in which stages are fed the teacher's inputs, so that only features can teach (A-SDM: all;
    PPCL: every second).
    """

    times: Times
    source: NoisedData
    distance: Distance
    weight: Weight
    guidance: UniformScale | None
    task: float = 1.0
    output: float = 1.0
    feature: float = 1.0
    alone: float = 0.0

    players = ("student",)
    roles = ("student", "teacher")

    @property
    def whole_batch(self) -> bool:
        """Whether samples look at each other: features are compared by norms over the batch."""
        return self.feature != 0.0

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        student, teacher = cast["student"], cast["teacher"]
        count = batch.x0.shape[0]
        t = self.times.draw(student.path, count, turn)
        cond = batch.cond if self.guidance is None else with_scale(batch.cond, self.guidance.draw(count, turn))
        x_t = self.source.draw(student.path, batch, t, turn)
        if cast.led is not None:
            cast.led.on = math.floor((turn.step + 1) * self.alone) > math.floor(turn.step * self.alone)
        with torch.no_grad():
            aim = teacher.x0(x_t, t, cond)
        guess = student.x0(x_t, t, cond)
        weight = self.weight(student.path, t).to(guess)
        feature = feature_loss(cast.seen.get("student", {}), cast.seen.get("teacher", {})).to(guess.device)
        total = self.feature * feature
        if self.output:
            total = total + self.output * (self.distance(guess, aim) * weight).mean()
        if self.task:
            total = total + self.task * (self.distance(guess, batch.x0) * weight).mean()
        residual = float((guess.detach() - aim).square().mean().sqrt())
        return total, {"residual": residual, "feature": float(feature.detach())}
