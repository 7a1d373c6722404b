"""An objective with the networks it asks and the players it trains: what the loop runs."""

from dataclasses import dataclass

from torch import Tensor

from ..parts.objective import Batch, Cast, Metrics, Objective, Turn
from .player import Player


@dataclass(frozen=True)
class Assembled:
    """An objective with its cast and players: what the loop runs."""

    objective: Objective
    cast: Cast
    players: tuple[Player, ...]

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        return self.objective.loss(player, self.cast, batch, turn)
