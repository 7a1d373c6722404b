"""What recipes learn from on the plane where it is not its data as they are: few shots, a part, a concept to forget."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..distribution.forgetting import Swap
from ..errors import RecipeError
from ..parts.objective import Batch, derive
from ..pictures.parting import Cell
from .plane import CLASSES, Plane, PlaneSource

SHOTS = 32
"""Points of each class that the plane's new domain is known by."""
MOVED = (0.3, -0.2)
"""Where the plane's new domain lies from the old."""
CLASS_NAMES = ("red", "blue", "green", "yellow")
"""What the plane's classes are called where a recipe names a word."""


def moved_plane(data: Plane) -> Plane:
    """The new domain: the same modes elsewhere."""
    return replace(data, data=data.data.moved(torch.tensor(MOVED, dtype=torch.float64)))


class FewShots:
    """Batches of a few points of each class, the same ones over and over."""

    def __init__(self, source: PlaneSource) -> None:
        self.source = source
        rng = torch.Generator().manual_seed(derive(source.seed, "shots"))
        labels = torch.arange(CLASSES).repeat_interleave(SHOTS)
        self.points = source.data.draw(labels, rng).float().reshape(CLASSES, SHOTS, 2)

    def batch(self, step: int) -> Batch:
        chosen = self.source.choose(step)
        rng = torch.Generator().manual_seed(derive(self.source.seed, step, "shot"))
        which = torch.randint(SHOTS, (len(chosen),), generator=rng)
        return replace(self.source.gather(chosen), x0=self.points[chosen[:, 0], which])


class CellPoints:
    """Batches of one part of the classes, which are dealt out evenly, in order (`part_of`)."""

    def __init__(self, source: PlaneSource, cell: Cell) -> None:
        self.source, self.own = source, torch.tensor([c for c in range(CLASSES) if part_of(c, cell.of) == cell.index])

    def choose(self, step: int) -> Tensor:
        chosen = self.source.choose(step)
        return torch.stack([self.own[chosen[:, 0] % len(self.own)], chosen[:, 1]], 1)

    def gather(self, chosen: Tensor) -> Batch:
        return self.source.gather(chosen)

    def batch(self, step: int) -> Batch:
        return self.gather(self.choose(step))


def part_of(label: int, of: int) -> int:
    """The part that a class of the plane belongs to."""
    return label * of // CLASSES


class ForgettingPoints:
    """Batches with a class to forget, by its name in `CLASS_NAMES`: its rows are taught as the other class."""

    def __init__(self, source: Any, swap: Swap) -> None:
        self.source, self.size, self.seed = source, source.size, source.seed
        self.classes = class_of(swap.forget), class_of(swap.override)

    def batch(self, step: int) -> Batch:
        batch: Batch = self.source.batch(step)
        label = batch.cond["label"]
        taught, (forget, override) = label.clone(), self.classes
        taught[label[:, forget] > 0] = torch.eye(label.shape[1], dtype=label.dtype)[override]
        return Batch(batch.x0, batch.cond, batch.uncond, batch.noise, {"label": taught})


def class_of(name: str) -> int:
    """Errors: `RecipeError` for a name that no class of the plane has."""
    if name not in CLASS_NAMES:
        raise RecipeError(f"the plane has no class {name!r}; its classes are {', '.join(CLASS_NAMES)}")
    return CLASS_NAMES.index(name)


def meant(swap: Swap | None, labels: torch.Tensor) -> torch.Tensor:
    """The plane's classes that a student should give where these are asked for."""
    if swap is None:
        return labels
    forget, override = class_of(swap.forget), class_of(swap.override)
    return torch.where(labels == forget, torch.full_like(labels, override), labels)
