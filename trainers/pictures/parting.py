"""Conditions in disjoint parts, one student each (MSD, Song et al. 2024), by the router that serves them.

A prompt belongs to the nearest of K centroids of text embeddings (`fewstep.runtime.sampling.groups`), so the parts are
disjoint and no prompt is left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.models.denoiser import Condition

from ..errors import DataError, RecipeError
from ..parts.objective import Batch, derive
from .data import LatentSource

ROUNDS = 25
"""Of Lloyd's algorithm."""
CHUNK = 256


@dataclass(frozen=True)
class Cell:
    """The `index`-th of `of` parts of the conditions."""

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise RecipeError(f"part {self.index} of {self.of} is none; parts count from 0")


def embeddings(source: LatentSource) -> Tensor:
    """[N K, D]: what the router compares of each of K phrasings of N samples, one sample after another."""
    flat = {name: value.flatten(0, 1) for name, value in source.data.feeds.items()}
    count = source.data.ids.shape[0] * source.data.ids.shape[1]
    parts = [source.encode_text({n: v[i : i + CHUNK] for n, v in flat.items()}) for i in range(0, count, CHUNK)]
    return torch.cat([summary(part) for part in parts]).cpu()


def summary(cond: Condition) -> Tensor:
    """[B, D], as `fewstep.runtime.service.local.summary` has it of one text: its pooled vector or mean over tokens."""
    return cond["pooled"] if "pooled" in cond else cond["ctx"].mean(dim=1)


def centroids(points: Tensor, count: int, seed: int) -> Tensor:
    """[count, D]: k-means of [N, D], begun by k-means++ (Arthur & Vassilvitskii 2007).

    Errors: `DataError` for fewer different points than centroids.
    """
    if len(different := points.unique(dim=0)) < count:
        raise DataError(f"the data have {len(different)} different prompts, too few for {count} students; set students")
    rng = torch.Generator().manual_seed(derive(seed, "centroids"))
    chosen = points[torch.randint(len(points), (1,), generator=rng)]
    while len(chosen) < count:
        far = torch.cdist(points, chosen).min(1).values.square().double()
        chosen = torch.cat([chosen, points[torch.multinomial(far, 1, generator=rng)]])
    for _ in range(ROUNDS):
        owner = nearest(points, chosen)
        chosen = torch.stack([points[owner == k].mean(0) if (owner == k).any() else chosen[k] for k in range(count)])
    return chosen


def nearest(points: Tensor, chosen: Tensor) -> Tensor:
    """[N]: each point's centroid."""
    return torch.cdist(points.double(), chosen.double()).argmin(1)


class CellSource:
    """Batches of one part's samples and phrasings, as a pure function of the step."""

    def __init__(self, source: LatentSource, cell: Cell) -> None:
        self.source = source
        points = embeddings(source)
        self.centroids = centroids(points, cell.of, source.seed)
        own = (nearest(points, self.centroids) == cell.index).nonzero()[:, 0]
        phrasings = source.data.ids.shape[1]
        self.members = torch.stack([own // phrasings, own % phrasings], 1)

    def choose(self, step: int) -> Tensor:
        rng = torch.Generator().manual_seed(derive(self.source.seed, step, "cell"))
        return self.members[torch.randint(len(self.members), (self.source.size,), generator=rng)]

    def batch(self, step: int) -> Batch:
        part = self.source.part
        return self.source.gather(part.rows(self.choose(step)), derive(self.source.seed, step, "scale"), part)


def write_group(file: Path, students: list[Bundle], chosen: Tensor) -> Path:
    """The file that `fewstep serve --group` reads: each student with its centroid."""
    named = [
        {"model": student.name, "centroid": [round(v, 6) for v in centroid.tolist()]}
        for student, centroid in zip(students, chosen, strict=True)
    ]
    file.write_text(json.dumps({"name": f"{students[-1].name}-group", "students": named}) + "\n")
    return file
