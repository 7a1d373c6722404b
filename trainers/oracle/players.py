"""The oracle of the loop: who changes when. Every recipe's own players are run, on networks of two weights."""

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.paths import VP

from ..distribution.control_terms import CONTROL
from ..loop.loop import LoopSettings, train
from ..loop.player import Decay, Player, PlayerSettings
from ..networks.watch import watch
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..recipes.recipe import Recipe, Stage
from .world import Bent, Check, MeanCritic, MeanReward, World, below, holds, liking, world

STEPS = 9
Weights = dict[str, Tensor]


@dataclass
class Watched:
    """A recipe's objective on small networks. Whenever a loss is asked for it notes all weights, and who is open.

    open: (whose turn, whose weights a gradient could reach).
    """

    stage: Stage
    players: tuple[Player, ...]
    cast: Cast
    frozen: Mapping[str, nn.Module]
    seen: list[tuple[int, str, Weights]] = field(default_factory=list)
    open: set[tuple[str, str]] = field(default_factory=set)

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        self.seen.append((turn.step, player, self.weights()))
        self.open |= {(player, p.name) for p in self.players if any(w.requires_grad for w in p.weights)}
        return self.stage.objective.loss(player, self.cast, batch, turn)

    def weights(self) -> Weights:
        modules: dict[str, nn.Module] = {p.name: p.module for p in self.players} | dict(self.frozen)
        for player in self.players:
            modules |= {f"{player.name}.{name}": average for name, average in player.averages.items()}
        return {name: torch.stack([w.detach().clone() for w in m.parameters()]) for name, m in modules.items()}


@dataclass(frozen=True)
class Samples:
    stage: World

    def batch(self, step: int) -> Batch:
        found = self.stage.batch(16, step)
        return replace(found, noise=found.x0.flip(0))  # any, for stages that learn from pairs


def checks(recipe: Recipe) -> Iterator[Check]:
    stage = recipe.stages[-1]
    watched = _watched(stage, recipe.fake.guidance_width is not None)
    settings = LoopSettings(steps=STEPS, bf16=False, checkpoint_every=0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        train(watched, Samples(world(VP(), "v")), settings, Path(folder))
    states = [*watched.seen, (STEPS, "", watched.weights())]
    yield from _turns(watched, stage)
    strangers: set[str] = set()
    for (_, actor, before), (_, _, after) in pairwise(states):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        merged = {p.name for p in watched.players if actor in p.settings.merge}
        strangers |= {name for name in changed if name.split(".")[0] not in {actor, *merged}}
        if actor not in changed:
            strangers.add(f"{actor} stood still")
    yield holds("players: gradients can reach only the one whose turn it is", all(a == b for a, b in watched.open))
    yield holds("players: only the one whose turn it is changes, its averages with it", not strangers)
    yield from _merges(watched, states)
    frozen = all(torch.equal(states[0][2][name], states[-1][2][name]) for name in watched.frozen)
    yield holds("players: the teacher is the same at the end", frozen)
    for player in watched.players:
        for name, decay in player.settings.ema.items():
            own = [(step / STEPS, weights[player.name]) for step, who, weights in states if who in (player.name, "")]
            gap = _average(own, decay) - states[-1][2][f"{player.name}.{name}"]
            yield below(f"players: average {name!r} of the {player.name}, closed form over its own steps", gap, 1e-9)
    left = [w for player in watched.players for w in player.weights if w.grad is not None or not w.requires_grad]
    yield holds("players: no gradient is left behind", not left)


def _merges(watched: Watched, states: list[tuple[int, str, Weights]]) -> Iterator[Check]:
    """T12: after each of the other's own steps, `theta <- l theta + (1 - l) theta_other`."""
    for player in watched.players:
        for name, keep in player.settings.merge.items():
            gaps = [
                float((keep * before[player.name] + (1 - keep) * after[name] - after[player.name]).abs().max())
                for (_, actor, before), (_, _, after) in pairwise(states)
                if actor == name
            ]
            yield below(f"players: the {player.name} merges with the {name} after its steps", max(gaps), 1e-9)


def _turns(watched: Watched, stage: Stage) -> Iterator[Check]:
    """T10: a player of ratio R makes floor(N / R) steps in N, all in the last of each R."""
    for player in watched.players:
        every = stage.player_settings[player.name].every
        acted = [step for step, who, _ in watched.seen if who == player.name]
        wanted = [step for step in range(STEPS) if step % every == every - 1]
        right = acted == wanted and player.own_steps == STEPS // every
        yield holds(f"players: turns of the {player.name}, one in {every}", right)


def _average(own: list[tuple[float, Tensor]], decay: float | Decay) -> Tensor:
    """`a <- d a + (1 - d) theta` after each own step n; a number is met as min(decay, (1 + n) / (10 + n)).

    own: (progress of the run, the weights before that step).
    """
    average = own[0][1]
    for n, ((progress, _), (_, weights)) in enumerate(pairwise(own), start=1):
        d = decay(n, progress) if callable(decay) else min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weights
    return average


def _watched(stage: Stage, scalar: bool) -> Watched:
    """Small networks for every role: players train, averages are roles of their own, the teacher is frozen.

    scalar: whether they take the scale of their condition in, as a fake score does that is told another scalar.
    """
    bench = world(VP(), "v")
    players, roles = [], {}
    for k, name in enumerate(stage.objective.players):
        settings: PlayerSettings = stage.player_settings[name]
        if name == "critic":
            players.append(Player(name, MeanCritic(), settings))
            continue
        if name == "proxy":
            players.append(Player(name, MeanReward(), settings))
            continue
        module = Bent(bench.teacher(takes_w=scalar), gain=0.1 * (k + 1), offset=0.2)
        player = Player(name, module, settings)
        players.append(player)
        roles[name] = module.denoiser()
        prefix = "" if name == "student" else f"{name}."
        roles |= {f"{prefix}{average}": _bent(m).denoiser() for average, m in player.averages.items()}
    teacher = Bent(bench.teacher()).requires_grad_(False)
    roles["teacher"] = teacher.denoiser()
    roles |= {role: teacher.denoiser() for role in stage.objective.roles if role not in roles}
    own: dict[str, nn.Module] = {player.name: player.module for player in players}
    critic: Any = own.get("critic")
    if critic is None and len(players) > 1:
        fake = _bent(own.get("fake", [module for module in own.values() if isinstance(module, Bent)][-1]))

        def critic(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            return (fake.gain * x + fake.offset).flatten(1).mean(1)

    seen = {"student": watch(players[0].module, {"": "whole"}), "teacher": watch(teacher, {"": "whole"})}
    rewards: dict[str, Any] = {"reward": liking, CONTROL: liking, "proxy": own.get("proxy")}
    return Watched(stage, tuple(players), Cast(roles, critic, seen, rewards=rewards), {"teacher": teacher})


def _bent(module: nn.Module) -> Bent:
    if not isinstance(module, Bent):
        raise TypeError(f"expected a network of the suite, got {type(module).__name__}")
    return module
