"""Pairs of noise and the sample that a teacher makes of it, drawn once and kept: what reflow learns from.

Prompts are those of the training data, whose pictures are not looked at; a pair keeps which prompt it had, not its
embedding, since a large text encoder's take a thousand times the room of the sample.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.models.denoiser import Denoiser, times
from fewstep.models.files import write_whole

from ..errors import DataError
from .objective import WHOLE, Batch, Part, Turn, derive
from .times import EvenGrids, UniformScale, clean
from .transitions import ddim_chain, guided, pure_noise, with_scale


class Conditions(Protocol):
    """Training data by its entries: `trainers.pictures.data.LatentSource`."""

    def choose(self, step: int) -> Tensor:
        """[B, 2] entries, a pure function of the step."""
        ...

    def gather(self, chosen: Tensor) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How many pairs a stage has of its teacher, by how many first-order steps, under which guidance scales.

    The scale of a pair is told to the student, where it has an input for it.
    """

    count: int
    steps: int
    guidance: UniformScale


@dataclass(frozen=True)
class Drawn:
    """noise, made: [N, C, ...], the teacher's start and its sample; w: [N] guidance scales; chosen: [N, 2] entries of
    the data that gave the prompts."""

    noise: Tensor
    made: Tensor
    w: Tensor
    chosen: Tensor


def paired_noise(batch: Batch) -> Tensor:
    """The noise that a batch's samples were made from. Errors: `DataError` for a batch that is not of pairs."""
    if batch.noise is None:
        raise DataError("this method learns from a teacher's pairs, and the batch has no noise; give its stage pairs")
    return batch.noise


class PairSource:
    """Batches of drawn pairs, by (seed, step)."""

    def __init__(self, drawn: Drawn, conditions: Conditions, batch: int, *, seed: int = 0, part: Part = WHOLE) -> None:
        self.drawn, self.conditions, self.size, self.seed = drawn, conditions, batch, seed
        self.part = part

    def batch(self, step: int) -> Batch:
        rng = torch.Generator().manual_seed(derive(self.seed, step, "pairs"))
        rows = self.part.rows(torch.randint(len(self.drawn.made), (self.size,), generator=rng))
        found = self.conditions.gather(self.drawn.chosen[rows])
        made, noise, w = (
            value[rows].to(found.x0.device) for value in (self.drawn.made, self.drawn.noise, self.drawn.w)
        )
        return Batch(made, with_scale(found.cond, w), found.uncond, noise)


@torch.no_grad()
def draw_pairs(teacher: Denoiser, by_cfg: bool, plan: Pairs, conditions: Conditions, *, seed: int = 0) -> Drawn:
    """Draw noise, and walk each down the teacher's ODE to clean data.

    by_cfg: whether the teacher is guided by two evaluations; else its scale is told to it.
    """
    grid = [*EvenGrids((plan.steps,)).of(teacher.path)[plan.steps], clean(teacher.path)]
    parts: list[tuple[Tensor, ...]] = []
    left = plan.count
    with tqdm(total=plan.count, desc="draw pairs", dynamic_ncols=True) as bar:
        while left > 0:
            chosen = conditions.choose(-2 - len(parts))[:left]  # training's steps are 0 and up, -1 is shown in grids
            batch = conditions.gather(chosen)
            turn = Turn.of(seed, len(parts), 1, "pairs", batch.x0.device)
            noise, w = turn.noise(batch.x0), plan.guidance.draw(len(chosen), turn)
            solver = guided(teacher, batch.uncond, w) if by_cfg else teacher
            start = pure_noise(teacher.path, noise)
            made = ddim_chain(solver, start, tuple(times(t, start) for t in grid), with_scale(batch.cond, w))
            parts.append(tuple(value.cpu() for value in (noise, made, w, chosen)))
            left -= len(chosen)
            bar.update(len(chosen))
    return Drawn(*(torch.cat(column) for column in zip(*parts, strict=True)))


def save_pairs(path: Path, drawn: Drawn) -> None:
    """The file appears only when whole."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({name: getattr(drawn, name).contiguous() for name in ("noise", "made", "w", "chosen")}))


def load_pairs(path: Path) -> Drawn:
    """Errors: `DataError` where the file is missing, not safetensors, or lacks a tensor."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return Drawn(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise DataError(f"{path} is not a file of pairs ({error}); delete it and it is made anew") from error
