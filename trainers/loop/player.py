"""One set of weights that trains: its optimiser, its turn in the order of steps, and its running averages."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, RecipeError
from ..parts.curricula import Curriculum
from ..parts.objective import Turn
from .ranks import ALONE, Ranks, is_shard, local, put


class Decay(Protocol):
    """A decay that changes: of the own step n, from 1, and the progress of the run."""

    def __call__(self, n: int, progress: float) -> float: ...


@dataclass(frozen=True)
class TiedDecay:
    """Consistency training's target (Song et al. 2023): `exp(s0 ln mu0 / (N - 1))`, N the grid points that hold now."""

    first: float
    curriculum: Curriculum
    s0: int = 2

    def __call__(self, n: int, progress: float) -> float:
        points = self.curriculum(Turn(round(progress * 1_000_000), 1_000_000, torch.Generator()))
        return math.exp(self.s0 * math.log(self.first) / max(1, points - 1))


@dataclass(frozen=True)
class PowerDecay:
    """Karras et al. 2023 (EDM2): `(1 - 1/n)^(gamma + 1)`, an average whose width is a share of the run's length."""

    gamma: float = 6.94

    def __call__(self, n: int, progress: float) -> float:
        return float((1.0 - 1.0 / n) ** (self.gamma + 1.0))


def decay_at(rule: "float | Decay", n: int, progress: float) -> float:
    """The decay at own step n; a plain number d counts as `min(d, (1 + n) / (10 + n))`, so it forgets the start."""
    return rule(n, progress) if callable(rule) else min(rule, (1 + n) / (10 + n))


@dataclass(frozen=True, kw_only=True)
class PlayerSettings:
    """How one player learns.

    every: it acts in the last of each `every` steps, so N steps hold floor(N / every) of its own. warmup: own steps
    over which the rate rises. cooldown: last fraction of the run over which it falls to zero. ema: name -> decay of a
    running average of the weights, stepped on own steps only. slow: prefix of weights' names -> factor on their rate.
    merge: another player's name -> decay l of `theta <- l theta + (1 - l) theta_other` after each of that one's own
    steps, by which a fake score keeps up with its student (implicit distribution alignment, SenseFlow, Ge et al. 2025).
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    every: int = 1
    warmup: int = 0
    cooldown: float = 0.0
    ema: Mapping[str, float | Decay] = field(default_factory=dict)
    slow: Mapping[str, float] = field(default_factory=dict)
    merge: Mapping[str, float] = field(default_factory=dict)


class Player:
    """A module that trains, with its optimiser state and averages. Only weights that ask for gradients train."""

    def __init__(
        self, name: str, module: nn.Module, settings: PlayerSettings, body: nn.Module | None = None,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        """body: the part of the module that is shaped as other players' are, where that is not all of it. ranks: who
        else trains it; module and averages are spread over them in place."""
        self.name = name
        self.module = module
        self.body = module if body is None else body
        self.settings = settings
        self.ranks = ranks
        self.averages = {name: deepcopy(module).requires_grad_(False) for name in settings.ema}
        for network in (module, *self.averages.values()):
            ranks.spread(network)
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._groups(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self._averaged = {name: _matched(average, module) for name, average in self.averages.items()}
        self.own_steps = 0

    def _groups(self) -> list[dict[str, Any]]:
        """Weights by the factor on their learning rate, and by whether they are shards."""
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, weight in self.module.named_parameters():
            if weight.requires_grad:
                factor = next((f for prefix, f in self.settings.slow.items() if name.startswith(prefix)), 1.0)
                groups.setdefault((factor, is_shard(weight)), []).append(weight)
        return [{"params": weights, "factor": factor} for (factor, _), weights in groups.items()]

    def roles(self) -> dict[str, nn.Module]:
        """Its averages by the roles they play, "PLAYER.AVERAGE"."""
        return {f"{self.name}.{average}": module for average, module in self.averages.items()}

    def acts(self, step: int) -> bool:
        return (step + 1) % self.settings.every == 0

    def gradients(self, wanted: bool) -> None:
        """Let losses reach these weights or not: one player's turn must leave no gradient in another's weights."""
        for weight in self.weights:
            weight.requires_grad_(wanted)

    def rate(self, progress: float) -> float:
        """Learning rate now; progress is the share of the run that is done, 0 .. 1."""
        s = self.settings
        rise = min(1.0, (self.own_steps + 1) / s.warmup) if s.warmup else 1.0
        left = min(1.0, max(0.0, (1.0 - progress) / s.cooldown)) if s.cooldown else 1.0
        return s.lr * rise * left

    def update(self, loss: Tensor, progress: float) -> float:
        """Backward and one optimiser step; returns the gradient norm. Non-finite gradients change nothing."""
        self.forget()
        self.learn(loss)
        return self.step(progress)

    def forget(self) -> None:
        """Drop the gradients that are there."""
        self.optimizer.zero_grad(set_to_none=True)

    def learn(self, loss: Tensor) -> None:
        """Add a loss's gradients to those that are there."""
        loss.backward()

    def step(self, progress: float) -> float:
        """One optimiser step along the gradients, averaged over all processes; returns their norm and drops them.

        Non-finite gradients change nothing, in no process: all see the same ones.
        """
        self.ranks.average_gradients(self.weights)
        norm = self._clipped()
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(progress) * group["factor"]
            self.optimizer.step()
            self.own_steps += 1
            self._average(progress)
        self.forget()
        return norm

    def _clipped(self) -> float:
        """The norm of all gradients, which are brought down to `clip_norm`."""
        if not self.ranks.sharded:
            return float(nn.utils.clip_grad_norm_(self.weights, self.settings.clip_norm))
        norm = self.ranks.norm(self.weights)
        gradients = [local(weight.grad) for weight in self.weights if weight.grad is not None]
        torch._foreach_mul_(gradients, (self.settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)

    @torch.no_grad()
    def _average(self, progress: float) -> None:
        """`a <- d a + (1 - d) theta`, d by `decay_at`."""
        for name, rule in self.settings.ema.items():
            torch._foreach_lerp_(*self._averaged[name], 1 - decay_at(rule, self.own_steps, progress))

    @torch.no_grad()
    def follow(self, other: "Player") -> None:
        """Merge with another player that has just stepped, where the settings say so.

        Weights that it alone has, of a further input, stay its own.

        Errors: `RecipeError` where the other's weights are not among its own.
        """
        if other.name not in self.settings.merge:
            return
        own, theirs = dict(self.body.named_parameters()), dict(other.body.named_parameters())
        if any(n not in own or own[n].shape != weight.shape for n, weight in theirs.items()):
            raise RecipeError(
                f"the player {self.name!r} merges with {other.name!r}, whose weights are of another shape; give both "
                "the same student plan, or leave merge out"
            )
        mine, aims = [local(own[name]) for name in theirs], [local(weight) for weight in theirs.values()]
        torch._foreach_lerp_(mine, aims, 1 - self.settings.merge[other.name])

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, by names that depend on no number of processes: weights, averages, moments."""
        found = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        for average, module in self.averages.items():
            found |= {f"averages.{average}.{name}": value for name, value in module.state_dict().items()}
        for name, weight in self.module.named_parameters():
            for key, value in self.optimizer.state.get(weight, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        return found

    def load(self, tensors: Mapping[str, Tensor], own_steps: int) -> None:
        """Take back what `tensors` gave, here or in another number of processes.

        Errors: `CheckpointError` where a tensor is missing or of another shape.
        """
        for name, weight in self.module.named_parameters():
            if f"optimizer.{name}.step" in tensors and weight.requires_grad:
                self.optimizer.state[weight] = {
                    "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                    "exp_avg": torch.zeros_like(weight, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(weight, requires_grad=False),
                }
        with torch.no_grad():
            for name, own in self.tensors().items():
                value = tensors.get(name)
                if value is None or value.shape != own.shape:
                    kept = "nothing" if value is None else f"a tensor of shape {tuple(value.shape)}"
                    raise CheckpointError(
                        f"the checkpoint has {kept} for {self.name}'s {name}, which is of shape {tuple(own.shape)}; "
                        "leave it out to start anew"
                    )
                put(own, value)
        self.own_steps = own_steps


def _matched(average: nn.Module, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Both networks' weights in one order, found once: walking two trees of modules costs as much as the averaging."""
    now = dict(module.named_parameters())
    theirs = [local(now[name]) for name, _ in average.named_parameters()]
    return [local(weight) for weight in average.parameters()], theirs
