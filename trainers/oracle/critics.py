"""The oracle of critics: each loss's best critic, regularisers in closed form, features that gradients go through."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.analytic import gaussian, log_density
from fewstep.models.denoiser import Condition
from fewstep.models.paths import VP

from ..distribution.discriminator import Adversary, Deceive, Judge
from ..distribution.distribution import DistributionMatching
from ..errors import RecipeError
from ..networks.critics import TEACHER, CriticPlan, FrozenCritic, TeacherEye
from ..parts.gan_losses import R1, ApproximateR1, FiniteDifference, Hinge, Judged, Relativistic, Softplus
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..recipes.recipe import Recipe
from .world import Check, MeanCritic, below, between, grad_of, holds, turn, world

COUNT = 4096


def loss_checks(adversary: Adversary) -> Iterator[Check]:
    """T6 for losses of no ratio: hinge's best critic is the sign, a relativistic one is free up to a constant."""
    levels = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    z = torch.special.ndtri(levels)[:, None]
    p, q = ((torch.tensor([m], dtype=torch.float64), s) for m, s in ((0.6, 0.8), (-0.2, 1.1)))
    real, fake = (m + s * z for m, s in (p, q))
    one, none = torch.ones(()).double(), torch.zeros(()).double()

    def ratio(x: Tensor) -> Tensor:
        return log_density(gaussian(*p), x, one, none) - log_density(gaussian(*q), x, one, none)

    if isinstance(adversary.loss, Hinge):
        grid = torch.linspace(-8.0, 8.0, 160001, dtype=torch.float64)[:, None]
        both = [log_density(gaussian(*side), grid, one, none).exp() for side in (p, q)]
        overlap = float(torch.minimum(*both).sum() * 1e-4)
        best = adversary.loss.critic(ratio(real).sign(), ratio(fake).sign())
        yield below("hinge: the loss of the sign of log(p / q) is twice the overlap", float(best) - 2 * overlap, 1e-2)
        for factor in (0.5, 2.0):
            other = adversary.loss.critic(factor * ratio(real).sign(), factor * ratio(fake).sign())
            yield between(f"hinge: more at {factor} times that", float(other - best), 1e-3, float("inf"))
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        adversary.loss.critic(scale * ratio(real), scale * ratio(fake)).backward()
        yield between("hinge: log(p / q) is not its best critic", abs(float(scale.grad or 0.0)), 1e-2, float("inf"))
    if isinstance(adversary.loss, Relativistic):
        pairs = torch.cartesian_prod(torch.arange(400), torch.arange(400)).unbind(1)
        for factor in (1.0, 0.5, 2.0):
            scale = torch.tensor(factor, dtype=torch.float64, requires_grad=True)
            logits = [scale * ratio(side) for side in (real, fake)]
            adversary.loss.critic(logits[0][pairs[0]], logits[1][pairs[1]]).backward()
            slope = float(scale.grad or 0.0)
            if factor == 1.0:
                yield below("relativistic: slope at log(p / q)", slope, 1e-2)
            else:
                yield between(f"relativistic: slope beside it, {factor}", slope * (factor - 1.0), 1e-2, float("inf"))
        moved = adversary.loss.critic(real + 3.0, fake + 3.0) - adversary.loss.critic(real, fake)
        yield below("relativistic: a constant changes nothing", moved, 1e-6)
    said, beside = torch.tensor([-1.0, 0.5], requires_grad=True), torch.tensor([0.0, 0.3])
    adversary.loss.student(said, beside).backward()
    yield holds("the student raises the logits of its samples", bool((grad_of(said) < 0.0).all()))
    yield from _ratio_refused(adversary)


class ReadsRatio:
    """What stands for a term that takes logits for ratios."""

    roles = ()
    reads_ratio = True

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        return made.x0.mean(), {}


def _ratio_refused(adversary: Adversary) -> Iterator[Check]:
    try:
        DistributionMatching(rollout=_nothing(), terms={"student": (ReadsRatio(),), "critic": (Judge(adversary),)})
    except RecipeError as error:
        named = type(adversary.loss).__name__ in str(error)
        yield holds("a term that reads ratios is refused, and the loss named", named and not adversary.loss.is_ratio)
    else:
        yield holds("a term that reads ratios is let in", isinstance(adversary.loss, Softplus))


def _nothing() -> Any:
    return None


def regulariser_checks(adversary: Adversary) -> Iterator[Check]:
    """Against closed forms of `gain mean(x) + offset`, whose slope is `gain / n` in each of n elements."""
    critic, gain = MeanCritic(gain=3.0), 3.0
    x = torch.randn(COUNT, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.zeros(COUNT, dtype=torch.float64)
    side, square = Judged(critic, x, t, {}, critic(x, t, {})), gain**2 / 6.0
    for rule in adversary.regularisers:
        every = rule.every if isinstance(rule, R1) else 1
        found = sum(float(rule.loss(side, side, turn(step)).detach()) for step in range(every)) / every
        if isinstance(rule, R1):
            yield below("R1: w/2 |grad l|^2 in the mean", found / (0.5 * rule.weight * square) - 1, 1e-6)
            on = [float(rule.loss(side, side, turn(step)).detach()) != 0.0 for step in range(2 * every)]
            yield holds("R1: in the last of so many steps", on == ([False] * (every - 1) + [True]) * 2)
            critic.zero_grad()
            rule.loss(side, side, turn(every - 1)).backward()
            wanted = rule.weight * every * gain / 6.0
            yield below("R1: its slope in the critic's gain", float(critic.gain.grad or 0.0) / wanted - 1.0, 1e-6)
        elif isinstance(rule, FiniteDifference):
            yield below("finite differences: R1 and R2", found / (2.0 * rule.weight * square) - 1.0, 0.1)
        elif isinstance(rule, ApproximateR1):
            wanted = rule.weight * rule.width**2 * square
            yield below("aR1: w (l(x) - l(x + s n))^2", found / wanted - 1.0, 0.1)
        other = MeanCritic(gain=7.0)
        moved = Judged(other, x, t, {}, other(x, t, {}))
        one_sided = not isinstance(rule, FiniteDifference)
        again = float(rule.loss(side, moved, turn(every - 1)).detach())
        same = math.isclose(again, float(rule.loss(side, side, turn(every - 1)).detach()))
        yield holds(f"{type(rule).__name__}: looks at {'data alone' if one_sided else 'both sides'}", same == one_sided)


def misaligned_checks(adversary: Adversary) -> Iterator[Check]:
    """Data i under the condition of data i - 1 are fakes, unless the two conditions are one."""
    if not adversary.misaligned:
        return
    owner = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 3.0], dtype=torch.float64)[:, None]
    batch = Batch(owner, {"ctx": owner}, {"ctx": owner})

    def critic(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return torch.where(x == cond["ctx"], 0.8, -0.8)[:, 0]  # says whether a pair is aligned

    plain = replace(adversary, times=None, share=1.0, regularisers=(), critic_weight=1.0)
    made = Made(owner, owner, torch.zeros(6, dtype=torch.float64))
    cast = Cast({"student": world(VP(), "v").teacher()}, critic)
    found = float(Judge(plain).loss(made, cast, batch, turn())[0])
    real, fake = torch.full((6,), 0.8), torch.tensor([0.8] * 6 + [-0.8] * 4)
    yield below("misaligned pairs: four of six, none aligned", found - float(plain.loss.critic(real, fake)), 1e-6)


class _Config(dict[str, Any]):
    __getattr__ = dict.__getitem__


class _Layers(nn.Module):
    """A network of two layers, as a teacher whose blocks are read."""

    def __init__(self) -> None:
        super().__init__()
        self.config = _Config(dim=4)
        self.layers = nn.ModuleList((nn.Linear(1, 4), nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x.flatten(1)[:, :, None]).tanh())  # type: ignore[no-any-return]


def frozen_checks(plan: CriticPlan | None) -> Iterator[Check]:
    """A critic on frozen blocks: its derivative in the sample is that of the whole, and the blocks learn nothing."""
    if plan is None or plan.features != TEACHER:
        return
    torch.manual_seed(0)
    network = _Layers().requires_grad_(False)
    eye = TeacherEye(network, lambda x, t, cond: network(x), replace(plan, depths=(0.0, 1.0)))
    critic = FrozenCritic(eye, replace(plan, text=False, step=False), None).eval()
    x, t = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(), torch.zeros(1)
    logit = critic.judge(x, t, {}).mean()
    logit.backward()
    slope = torch.zeros_like(x) if x.grad is None else x.grad
    h, direction = 1e-2, slope / slope.norm().clamp(min=1e-12)
    with torch.no_grad():
        ahead, behind = (critic.judge(x + k * direction, t, {}).mean() for k in (h, -h))
    steep = float((ahead - behind) / (2 * h))
    yield between("frozen features: the gradient goes through them", float(slope.norm()), 1e-6, float("inf"))
    yield below(
        "frozen features: gradient in x against differences", steep / float(slope.norm().clamp(1e-12)) - 1, 0.02
    )
    learned = [w.grad is not None for w in critic.parameters()], [w.grad is not None for w in network.parameters()]
    yield holds("frozen features: the heads learn, the blocks do not", any(learned[0]) and not any(learned[1]))
    yield holds("frozen features: no hook is left", not any(part._forward_hooks for part in network.modules()))


def judge_parts(recipe: Recipe, adversary: Adversary) -> Iterator[Check]:
    """What an adversary is made of."""
    yield from loss_checks(adversary)
    yield from regulariser_checks(adversary)
    yield from misaligned_checks(adversary)
    yield from frozen_checks(recipe.critic)
    yield from told_checks(adversary)


def told_checks(adversary: Adversary) -> Iterator[Check]:
    """A critic that is told the step's time hears that of each sample's own step, for data as for samples."""
    if not adversary.told:
        return
    heard: list[Tensor] = []

    def critic(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        heard.append(cond["s"])
        return x.flatten(1).mean(1)

    stage, begun = world(VP(), "v"), torch.tensor([999.0, 759.0, 499.0, 259.0], dtype=torch.float64)
    batch, plain = stage.batch(4), replace(adversary, share=1.0, regularisers=(), misaligned=False)
    made = Made(batch.x0, batch.x0, begun)
    for term in (Deceive(plain), Judge(plain)):
        term.loss(made, Cast({"student": stage.teacher()}, critic), batch, turn())
    right = torch.equal(heard[0], begun) and torch.equal(heard[1], torch.cat([begun, begun]))
    yield holds("told: the critic hears when each sample's step began", right)
