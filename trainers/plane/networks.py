"""The plane's networks of a stage, each asked through a count of its evaluations."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import Path

from ..distribution.control_terms import CONTROL
from ..loop.player import Player
from ..networks.critics import CriticPlan
from ..networks.partners import SCORES
from ..networks.student import PLAIN
from ..parts.objective import Reward
from ..recipes.recipe import Recipe, Stage
from .control import Likelihood
from .critic import PlaneCritic, PlaneFake
from .net import PlaneNet, plane_student
from .partners import PlaneReward, plane_partner
from .plane import Plane
from .rewards import plane_reward
from .sources import moved_plane


@dataclass
class Count:
    """Network evaluations, by rows: the student's and its copies', the teacher's."""

    student: int = 0
    teacher: int = 0

    def watch(self, denoiser: Denoiser, who: str) -> Denoiser:
        def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            setattr(self, who, getattr(self, who) + x.shape[0])
            return denoiser.raw(x, t, cond)

        return replace(denoiser, net=net)


@dataclass(frozen=True)
class PlaneNetworks:
    """`recipes.casting.Networks` of points. held: the stage's teacher where that is a network; None is the closed form.
    start: what every other network begins as. rate: factor on learning rates."""

    recipe: Recipe
    stage: Stage
    learner: PlaneNet
    held: PlaneNet | None
    start: PlaneNet
    path: Path
    data: Plane
    count: Count
    rate: float
    seed: int

    def player(self, name: str, module: nn.Module, body: nn.Module | None = None) -> Player:
        own = self.stage.player_settings[name]
        return Player(name, module.train(), replace(own, lr=own.lr * self.rate), body)

    def ask(self, network: Any) -> Denoiser:
        asked = network.net if isinstance(network, PlaneFake) else network
        return self.count.watch(asked.denoiser(), "student")

    def teacher(self) -> Denoiser:
        if self.held is not None:
            return self.ask(deepcopy(self.held).requires_grad_(False))
        return self.count.watch(self.data.teacher(self.path), "teacher")

    def partner(self, name: str) -> Any:
        return plane_partner(name, self.start if name in SCORES else self.learner, path=self.path, seed=self.seed)

    def fake(self, plan: CriticPlan) -> tuple[Any, Any]:
        network = plane_student(self.start, self.recipe.fake, path=self.path, seed=self.seed)
        return PlaneFake(network, plan), network

    def critic(self, plan: CriticPlan) -> Any:
        return PlaneCritic(plan, plane_student(self.start, PLAIN, path=self.path, seed=self.seed))

    def proxy(self) -> Any:
        torch.manual_seed(self.seed)
        return PlaneReward()

    def rewards(self) -> dict[str, Reward]:
        found: dict[str, Reward] = {}
        if self.recipe.reward is not None:
            found["reward"] = plane_reward(self.recipe.reward, self.data)
        if self.recipe.student.control:
            found[CONTROL] = Likelihood()
        return found

    def adapted(self) -> Denoiser:
        return self.count.watch(moved_plane(self.data).teacher(self.path), "teacher")
