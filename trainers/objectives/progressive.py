"""Progressive distillation (Salimans & Ho 2022): one student step learns to do what two teacher steps do."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand

from ..parts.distances import Distance, Weight
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.times import HalvingPairs, UniformScale
from ..parts.transitions import NoisedData, guided, inverse_ddim, with_scale


def halving_target(teacher: Denoiser, x_t: Tensor, t: Tensor, mid: Tensor, s: Tensor, cond: Condition) -> Tensor:
    """The clean estimate whose single DDIM step t -> s lands where the teacher's steps t -> mid -> s land.

    Where mid = s the teacher takes one step, and the target is its own clean estimate at t.
    """
    with torch.no_grad():
        x_mid = teacher.jump(x_t, t, mid, cond)
        two = mid > s
        # rows of one step are evaluated at t and discarded: mid may be clean data, where a network has no answer
        x_two = teacher.jump(x_mid, torch.where(two, mid, t), s, cond)
        return inverse_ddim(teacher.path, torch.where(expand(two, x_t) > 0, x_two, x_mid), x_t, t, s)


@dataclass(frozen=True, kw_only=True)
class ProgressiveHalving:
    """One round. `cfg` says the teacher is guided by two evaluations; its scale is then absorbed by the student."""

    pairs: HalvingPairs
    source: NoisedData
    distance: Distance
    weight: Weight
    guidance: UniformScale
    cfg: bool

    players = ("student",)
    roles = ("student", "teacher")

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        path = cast["student"].path
        count = batch.x0.shape[0]
        t, mid, s = self.pairs.draw(path, count, turn)
        w = self.guidance.draw(count, turn)
        x_t = self.source.draw(path, batch, t, turn)
        cond = with_scale(batch.cond, w)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        aim = halving_target(teacher, x_t, t, mid, s, cond)
        guess = cast["student"].x0(x_t, t, cond)
        each = self.distance(guess, aim) * self.weight(path, t).to(guess)
        return each.mean(), {"residual": float((guess.detach() - aim).square().mean().sqrt())}
