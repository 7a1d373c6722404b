"""The best linear combination of checkpoints saved along a run (LCSC, Liu et al. 2024), by evolutionary search.

theta = sum_k alpha_k theta_k with sum alpha = 1; coefficients may be negative or above 1. A running average is one such
combination, so the search begins among averages and goes on from there by a score alone, without gradients.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fewstep.models.files import write_whole

from ..errors import RecipeError
from ..parts.objective import Batch, Metrics, Turn, derive
from .loop import Method
from .player import Player

Weights = Mapping[str, Tensor]
Score = Callable[[Tensor], float]
"""Coefficients [K] -> how far samples of the combination are from what they should be; lower is better."""
DECAYS = (0.0, 0.3, 0.6, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is saved and how it is searched.

    saved: checkpoints, evenly over the last `window` of the stage, and its end beside. population: combinations that
    are kept; rounds: new ones tried. spread: standard deviation of a mutation. steps: step counts at which samples are
    scored; samples: how many of them.
    """

    saved: int = 12
    window: float = 0.6
    population: int = 10
    rounds: int = 80
    spread: float = 0.15
    steps: tuple[int, ...] = (1, 2, 4)
    samples: int = 256

    def __post_init__(self) -> None:
        counts = {"saved": self.saved, "population": self.population, "samples": self.samples}
        for name, count in counts.items():
            if count < 2:
                raise RecipeError(f"{name} is {count}; a search among saved checkpoints needs at least 2")
        if not 0.0 < self.window <= 1.0 or self.spread <= 0.0 or self.rounds < 0:
            raise RecipeError(
                f"window is {self.window}, spread {self.spread}, rounds {self.rounds}; use a share of the stage "
                "above 0 up to 1, a spread above 0 and rounds from 0"
            )

    def place(self, progress: float) -> int | None:
        """Which checkpoint is due at this progress of the stage; None before the window."""
        along = (progress - (1.0 - self.window)) / self.window
        return None if along < 0.0 else min(self.saved - 1, math.floor(along * self.saved))


class Shelf(Protocol):
    """Where checkpoints are kept, by their place."""

    def has(self, place: int) -> bool: ...

    def put(self, place: int, weights: Weights) -> None: ...


@dataclass(frozen=True)
class Saving:
    """A method whose student's weights are put on a shelf as the run goes on; otherwise as it was.

    average: the running average that is saved, None for the weights themselves. A checkpoint that is there already is
    left: a resumed run comes by the same weights again.
    """

    method: Method
    search: Search
    average: str | None
    shelf: Shelf

    @property
    def players(self) -> Sequence[Player]:
        return self.method.players

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        place = self.search.place(turn.progress)
        if player == "student" and place is not None and not self.shelf.has(place):
            self.shelf.put(place, weights_of(self.players[0], self.average))
        return self.method.loss(player, batch, turn)


def weights_of(student: Player, average: str | None) -> Weights:
    """A copy of the student's weights, or of an average of them."""
    module = student.module if average is None else student.averages[average]
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def combined(saved: Sequence[Weights], alpha: Tensor) -> dict[str, Tensor]:
    """`sum_k alpha_k theta_k` over checkpoints, in float64; what is not a number of its own is the last one's."""
    out = {}
    for name, last in saved[-1].items():
        if not last.is_floating_point():
            out[name] = last
            continue
        total = sum(float(a) * each[name].double() for a, each in zip(alpha, saved, strict=True))
        assert isinstance(total, Tensor)
        out[name] = total.to(last.dtype)
    return out


def average_coefficients(count: int, decay: float) -> Tensor:
    """[count]: those of a running average of this decay over the checkpoints, begun at the first."""
    alpha = (1.0 - decay) * decay ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
    alpha[0] = decay ** (count - 1)
    return alpha


@dataclass(frozen=True)
class Found:
    """The best coefficients [K], their score, and that of the last checkpoint alone."""

    alpha: Tensor
    score: float
    plain: float = field(default=math.nan)


def search(score: Score, count: int, plan: Search, seed: int) -> Found:
    """Evolve coefficients of `count` checkpoints: averages first, then crossings of two good ones, each mutated.

    A child takes each coefficient from a random blend of its parents, and a normal step of size `spread` spread over a
    random few of them; the last coefficient makes the sum 1. The best `population` live on.
    """
    rng = torch.Generator().manual_seed(derive(seed, "search"))
    alive = [(score(alpha), alpha) for alpha in (average_coefficients(count, decay) for decay in DECAYS)]
    plain = alive[0][0]
    alive.sort(key=lambda each: each[0])
    for _ in range(plan.rounds):
        a, b = (alive[k][1] for k in torch.randint(len(alive), (2,), generator=rng).tolist())
        child = crossed(a, b, plan.spread, rng)
        value = score(child)
        if math.isfinite(value):
            alive.append((value, child))
            alive.sort(key=lambda each: each[0])
            del alive[plan.population :]
    return Found(alive[0][1], alive[0][0], plain)


def crossed(a: Tensor, b: Tensor, spread: float, rng: torch.Generator) -> Tensor:
    """A child of two combinations, its sum 1."""
    share = torch.rand((), generator=rng, dtype=torch.float64) * 1.5 - 0.25  # may lie beyond either
    child = share * a + (1.0 - share) * b
    some = torch.rand(len(a), generator=rng) < max(0.3, 2.0 / len(a))
    step = spread * torch.rand((), generator=rng, dtype=torch.float64)
    child = child + some * step * torch.randn(len(a), generator=rng, dtype=torch.float64)
    child[-1] = 1.0 - child[:-1].sum()
    return child


@dataclass(frozen=True)
class Kept:
    """A shelf in memory."""

    weights: dict[int, Weights] = field(default_factory=dict)

    def has(self, place: int) -> bool:
        return place in self.weights

    def put(self, place: int, weights: Weights) -> None:
        self.weights[place] = weights

    def all(self) -> list[Weights]:
        return [self.weights[place] for place in sorted(self.weights)]


@dataclass(frozen=True)
class Elsewhere:
    """Another process keeps them."""

    def has(self, place: int) -> bool:
        return True

    def put(self, place: int, weights: Weights) -> None:
        return


@dataclass(frozen=True)
class KeptFiles:
    """A shelf of safetensors files, `PLACE.safetensors` each, which appear only when whole."""

    folder: Path

    def has(self, place: int) -> bool:
        return self._file(place).is_file()

    def put(self, place: int, weights: Weights) -> None:
        from safetensors.torch import save

        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._file(place), save({name: value.contiguous().cpu() for name, value in weights.items()}))

    def all(self) -> list[Weights]:
        from safetensors.torch import load_file

        return [load_file(file) for file in sorted(self.folder.glob("*.safetensors"))]

    def _file(self, place: int) -> Path:
        return self.folder / f"{place:04d}.safetensors"


def settle(
    plan: Search, saved: Sequence[Weights], network: nn.Module, score: Callable[[nn.Module], float], seed: int
) -> Found:
    """Leave the best combination of the checkpoints in `network`, whose samples `score` measures."""

    def of(alpha: Tensor) -> float:
        network.load_state_dict(combined(saved, alpha))
        return score(network)

    found = search(of, len(saved), plan, seed)
    network.load_state_dict(combined(saved, found.alpha))
    return found
