"""Networks of a stage on pictures: of the teacher bundle's family, as their own class, spread over the processes."""

from typing import Any

import torch
from torch import nn

from fewstep.models.bundle import Bundle
from fewstep.models.denoiser import Denoiser
from fewstep.models.negative_adapter import avoids
from fewstep.models.net_negative import Negative, NegativeDenoiser
from fewstep.models.networks import as_network

from ..distribution.adaptation import adapted_network
from ..loop.player import Player
from ..loop.ranks import ALONE, Ranks
from ..networks.bank import can_share, share
from ..networks.critics import CriticPlan, FakeWithCritic, picture_critic
from ..networks.partners import picture_partner, picture_proxy
from ..networks.rewards import picture_reward
from ..networks.student import fake_of
from ..parts.objective import Reward
from ..recipes.recipe import Recipe, Stage


class PictureNetworks:
    """`recipes.casting.Networks` of a teacher bundle.

    Where student and fake score are the teacher with LoRA, all are one network in memory (`networks.bank`). learner:
    the student's network.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, teacher: Bundle, frozen: Any, learner: Any, ranks: Ranks = ALONE
    ) -> None:
        self.recipe, self.stage, self.bundle, self.ranks = recipe, stage, teacher, ranks
        self.frozen, self._heard, self.learner = frozen, frozen, learner
        self._fake: Any = None
        if "fake" in stage.objective.players:
            self._fake = fake_of(frozen, recipe.fake, teacher.spec.path)
            if not ranks.sharded and can_share(frozen, learner, self._fake):
                self._heard, self.learner, self._fake = share(frozen, learner, self._fake)

    @property
    def device(self) -> torch.device:
        found: torch.device = self.frozen.device
        return found

    def player(self, name: str, module: nn.Module, body: nn.Module | None = None) -> Player:
        return Player(name, module.train(), self.stage.player_settings[name], body, self.ranks)

    def ask(self, network: Any) -> Denoiser:
        asked = network.network if isinstance(network, FakeWithCritic) else network
        family, spec = self.bundle.family, self.bundle.spec
        net: Any = NegativeDenoiser(asked, Negative(method="sun")) if avoids(asked) else family.denoiser(asked, False)
        net = net.train(asked.training).to(self.learner.device)
        return Denoiser(as_network(net), spec.path, spec.prediction)

    def teacher(self) -> Denoiser:
        return self.ask(self._heard.eval())

    def partner(self, name: str) -> Any:
        return picture_partner(name, self.recipe.name, self.bundle).to(device=self.learner.device)

    def fake(self, plan: CriticPlan) -> tuple[Any, Any]:
        fake = FakeWithCritic(self._fake, self.ask(self._fake).net, plan).to(self.device)
        return fake, self._fake

    def critic(self, plan: CriticPlan) -> Any:
        return picture_critic(plan, self.bundle, self.frozen, self.ask(self._heard).net).to(self.device)

    def proxy(self) -> Any:
        return picture_proxy(self.bundle).to(self.device)

    def rewards(self) -> dict[str, Reward]:
        if self.recipe.reward is None:
            return {}
        return {"reward": picture_reward(self.recipe.reward, self.bundle, self.device)}

    def adapted(self) -> Denoiser:
        network = adapted_network(self.recipe.adapted, self.recipe.name, self.bundle)
        return self.ask(network.to(self.learner.device))
