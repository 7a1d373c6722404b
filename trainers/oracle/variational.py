"""The oracle of a learned coupling: a silent encoder is the plain method, its divergence is closed form, and it learns
through x_t alone."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import VP

from ..objectives.variational import VariationalCoupling, divergence, posterior
from ..parts.laws import MappedPairs, levels
from ..parts.objective import Cast
from ..recipes.recipe import Recipe
from . import consistency as oracle_consistency
from .world import Bent, Check, World, below, between, holds, slope_of, turn, world

COUNT = 256


class _Encoder(nn.Module):
    """mean = pull x0 + push, width = spread: three weights, all zero at first."""

    def __init__(self, pull: float = 0.0, push: float = 0.0, spread: float = 0.0) -> None:
        super().__init__()
        self.pull, self.push, self.spread = (
            nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (pull, push, spread)
        )

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return torch.cat([self.pull * x + self.push, self.spread + torch.zeros_like(x)], 1)


def checks(recipe: Recipe, objective: VariationalCoupling) -> Iterator[Check]:
    yield from oracle_consistency.checks(recipe, objective.base)
    yield from _divergence()
    stage = world(VP(), "v")
    yield from _silent(stage, objective)
    yield from _routing(stage, objective)
    yield from _held(stage, objective)


def _cast(stage: World, objective: VariationalCoupling, encoder: nn.Module, gain: float = 0.2) -> tuple[Cast, Bent]:
    student = Bent(stage.consistency(), gain, 0.5 * gain)
    roles = {"student": student.denoiser(), "teacher": stage.teacher(), "encoder": _role(stage, encoder)}
    return Cast({**roles, objective.base.target: roles["student"]}), student


def _role(stage: World, encoder: nn.Module) -> Denoiser:
    return Denoiser(encoder, stage.path, stage.prediction)


def _divergence() -> Iterator[Check]:
    """The posterior of an encoder's raw output, and its KL against torch's own."""
    stage = world(VP(), "v")
    x0 = stage.batch(8).x0
    mean, std = posterior(_role(stage, _Encoder()), x0, {})
    yield below("a silent encoder says N(0, 1)", torch.cat([mean, std - 1.0]), 1e-12)
    mean, std = posterior(_role(stage, _Encoder(0.3, -0.2, 0.7)), x0, {})
    yield below("mean: the first half of the channels", mean - (0.3 * x0 - 0.2), 1e-12)
    truth = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).flatten(1).sum(1)
    yield below("KL in closed form, summed over a sample", divergence(mean, std) - truth, 1e-9)


def _silent(stage: World, objective: VariationalCoupling) -> Iterator[Check]:
    """A silent encoder leaves the base method's loss, draw by draw, and adds no divergence."""
    batch = stage.batch(COUNT)
    cast, _ = _cast(stage, objective, _Encoder())
    base = objective.base
    for step in (0, 50, 99):
        plain = float(base.loss("student", cast, batch, turn(step))[0].detach())
        for player in objective.players:
            found = float(objective.loss(player, cast, batch, turn(step))[0].detach())
            yield below(f"silent encoder: the {player}'s loss is the plain one, step {step}", found / plain - 1.0, 1e-9)


def _routing(stage: World, objective: VariationalCoupling) -> Iterator[Check]:
    """The student's turn teaches the student alone; the encoder's slope is that of x_t, with the aim held still."""
    batch, encoder = stage.batch(COUNT), _Encoder(0.2, 0.1, 0.3)
    cast, student = _cast(stage, objective, encoder)
    objective.loss("student", cast, batch, turn(60))[0].backward()
    yield holds("the student's turn teaches it", all(w.grad is not None for w in student.parameters()))
    yield holds("the student's turn teaches no encoder", all(w.grad is None for w in encoder.parameters()))
    student.requires_grad_(False)  # as the loop does in another's turn
    objective.loss("encoder", cast, batch, turn(60))[0].backward()
    kept: list[Tensor] = []

    def still(a: Tensor, b: Tensor) -> Tensor:
        kept.append(b.detach())
        return objective.base.distance(a, kept[0])

    held = replace(objective, base=replace(objective.base, distance=still))
    held.loss("encoder", cast, batch, turn(60))

    def loss() -> Tensor:
        return held.loss("encoder", cast, batch, turn(60))[0]

    for name, weight in encoder.named_parameters():
        assert weight.grad is not None
        slope = slope_of(loss, weight, 1e-4)
        yield below(f"encoder: slope of {name}, the aim held still", float(weight.grad) / slope - 1.0, 0.01)


def _held(stage: World, objective: VariationalCoupling) -> Iterator[Check]:
    """The divergence counts kl / (t - r) at the noisiest t, and a large one brings the encoder back to N(0, 1)."""
    pairs, high = objective.base.pairs, levels(stage.path, 2)[-1:]
    assert isinstance(pairs, MappedPairs)
    for step in (0, 99):
        r = pairs.below(high, pairs.stage(turn(step)))
        wanted = 1.0 / float(high - r)
        yield below(f"KL: weight at step {step}", objective.per_gap(stage.path, turn(step)) / wanted - 1.0, 1e-9)
    batch = stage.batch(COUNT)
    losses = []
    for kl in (0.0, objective.kl):
        cast, _ = _cast(stage, objective, _Encoder(push=0.3))
        losses.append(float(replace(objective, kl=kl).loss("encoder", cast, batch, turn(60))[0].detach()))
    size = batch.x0[0].numel()
    wanted = objective.kl * objective.per_gap(stage.path, turn(60)) * 0.5 * size * 0.3**2
    yield below("KL: what a mean of 0.3 adds to the loss", (losses[1] - losses[0]) / wanted - 1.0, 1e-4)
    for sign in (1.0, -1.0):
        encoder = _Encoder(push=0.3 * sign, spread=0.5 * sign)
        cast, _ = _cast(stage, objective, encoder)
        replace(objective, kl=1e6).loss("encoder", cast, batch, turn())[0].backward()
        for name in ("push", "spread"):
            slope = sign * float(getattr(encoder, name).grad)
            yield between(f"KL: pulls {name} back from {sign:+g}", slope, 1.0, float("inf"))
