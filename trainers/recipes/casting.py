"""Who takes part in a stage: players, roles, critic and rewards, the same on pictures, the plane and under a control.

A `Networks` makes what the stage's objective asks for; this file knows who that is.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from fewstep.models.denoiser import Denoiser

from ..distribution.adaptation import ADAPTED
from ..errors import RecipeError
from ..loop.method import Assembled
from ..loop.player import Player
from ..networks.critics import MIDDLE, CriticPlan
from ..parts.objective import Cast, Critic, Reward
from .recipe import Recipe, Stage

KNOWN = ("student", "fake", "critic", "proxy")
"""Players that are made each in its own way; every other is a partner."""


class Networks(Protocol):
    """A stage, and networks of one kind of data for it. What it makes is trainable, and where it trains."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def stage(self) -> Stage: ...

    @property
    def learner(self) -> Any:
        """The student's network."""
        ...

    def player(self, name: str, module: nn.Module, body: nn.Module | None = None) -> Player:
        """A player with the stage's settings. body: the network in it, where that is not all of the module."""
        ...

    def ask(self, network: Any) -> Denoiser:
        """A network, or the module of a player or of its average, as it is evaluated."""
        ...

    def teacher(self) -> Denoiser:
        """What the stage learns from, frozen."""
        ...

    def partner(self, name: str) -> Any:
        """The network of a further player. Errors: `RecipeError` for one that is not known."""
        ...

    def fake(self, plan: CriticPlan) -> tuple[Any, Any]:
        """(the fake score as a player, which judges too where it has `judge`; the network in it)."""
        ...

    def critic(self, plan: CriticPlan) -> Any:
        """A critic of its own, with `judge`."""
        ...

    def proxy(self) -> Any:
        """A network that learns to judge as the reward does."""
        ...

    def rewards(self) -> Mapping[str, Reward]:
        """Who judges samples and never trains, by name."""
        ...

    def adapted(self) -> Denoiser:
        """The second teacher, of the new domain."""
        ...


def assemble_stage(networks: Networks) -> Assembled:
    """The stage's objective with its cast and players, the student first.

    Errors: `RecipeError` for a role that nothing in the recipe makes, and those of `Networks`.
    """
    objective, plan = networks.stage.objective, networks.recipe.critic or MIDDLE
    wanted = objective.players
    student = networks.player("student", networks.learner)
    players: list[Player] = [student]
    critic: Critic | None = None
    roles = {"student": networks.ask(networks.learner), "teacher": networks.teacher()}
    roles |= {name: networks.ask(average) for name, average in student.averages.items()}
    for name in wanted:
        if name not in KNOWN:
            partner = networks.partner(name)
            players.append(networks.player(name, partner))
            roles |= {name: networks.ask(partner), **_averages(networks, players[-1])}
    if "fake" in wanted:
        fake, network = networks.fake(plan)
        players.append(networks.player("fake", fake, network))
        roles |= {"fake": networks.ask(fake), **_averages(networks, players[-1])}
        critic = getattr(fake, "judge", None)
    if "critic" in wanted:
        own = networks.critic(plan)
        players.append(networks.player("critic", own))
        critic = own.judge
    rewards = dict(networks.rewards())
    if "proxy" in wanted:
        rewards["proxy"] = proxy = networks.proxy()
        players.append(networks.player("proxy", proxy))
    if ADAPTED in objective.roles:
        roles[ADAPTED] = networks.adapted()
    if absent := [role for role in objective.roles if role not in roles]:
        name = networks.recipe.name
        raise RecipeError(f"recipe {name!r} asks for the role {absent[0]!r}, which its settings do not make")
    return Assembled(objective, Cast(roles, critic, rewards=rewards), tuple(players))


def _averages(networks: Networks, player: Player) -> dict[str, Denoiser]:
    return {role: networks.ask(average) for role, average in player.roles().items()}
