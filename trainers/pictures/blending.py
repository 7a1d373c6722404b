"""Batches of a user's few pictures among samples of what a model could do before, so that it goes on being able to."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.models.bundle import Bundle

from ..errors import DataError, RecipeError
from ..parts.objective import Batch, derive
from .data import Latents, LatentSource, encode, encode_folder, encode_scenes


@dataclass(frozen=True, kw_only=True)
class Blend:
    """others: share of the rows that are of the old domain. dropped: share of the rows that are told no prompt, so that
    what guidance subtracts is tuned too. prior: where the old domain comes from, a folder of pictures as the user's, or
    a text file of prompts, whose pictures the teacher draws; None for the built-in scenes. count: how many of them.
    """

    others: float = 0.0
    dropped: float = 0.0
    prior: str | None = None
    count: int = 512

    def __post_init__(self) -> None:
        for name in ("others", "dropped"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise RecipeError(f"{name} is {getattr(self, name)}, a share of the rows; set it to 0 .. 1")
        if self.count < 1:
            raise RecipeError(f"count is {self.count} samples of the old domain; set it to 1 or more")


class BlendedSource:
    """Batches as a pure function of the step: which rows are of the old domain, and which lose their prompt, too."""

    def __init__(self, source: LatentSource, plan: Blend, teacher: Bundle) -> None:
        self.plan, self.own = plan, len(source.data)
        data = joined(source.data, old_domain(plan, teacher, source.seed)) if plan.others else source.data
        self.source = LatentSource(
            data, source.text_encoder, source.size, seed=source.seed, bf16=source.bf16, device=source.device,
            spec=teacher.spec, part=source.part,
        )  # fmt: skip

    def choose(self, step: int) -> torch.Tensor:
        """[B, 2]: rows of the user's pictures, then of the old domain behind them; and phrasings."""
        chosen = self.source.choose(step)
        rng = torch.Generator().manual_seed(derive(self.source.seed, step, "blend"))
        old = torch.rand(len(chosen), generator=rng) < self.plan.others
        rows = chosen[:, 0]
        theirs = self.own + rows % max(1, len(self.source.data) - self.own)
        return torch.stack([torch.where(old, theirs, rows % self.own), chosen[:, 1]], 1)

    def batch(self, step: int) -> Batch:
        part = self.source.part
        found = self.source.gather(part.rows(self.choose(step)), derive(self.source.seed, step, "scale"), part)
        rng = torch.Generator().manual_seed(derive(self.source.seed, step, "dropped"))
        kept = part.rows(torch.rand(self.source.size, generator=rng) >= self.plan.dropped).to(found.x0.device)
        cond = {
            name: torch.where(kept.reshape(-1, *([1] * (value.ndim - 1))), value, found.uncond.get(name, value))
            for name, value in found.cond.items()
        }
        return Batch(found.x0, cond, found.uncond)


def old_domain(plan: Blend, teacher: Bundle, seed: int) -> Latents:
    """Samples of what the teacher was made for.

    Errors: `DataError` for a file or folder that is not there or is empty.
    """
    if plan.prior is None:
        return encode_scenes(teacher, plan.count, seed=derive(seed, "prior"), phrasings=1)
    if Path(plan.prior).is_dir():
        return encode_folder(teacher, Path(plan.prior), first=plan.count)
    if not Path(plan.prior).is_file():
        raise DataError(f"prior is {plan.prior!r}; name a folder with metadata.jsonl, or a text file of prompts")
    texts = [line.strip() for line in Path(plan.prior).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise DataError(f"{plan.prior} has no prompts; write one a line")
    return encode_drawn(teacher, [texts[k % len(texts)] for k in range(plan.count)])


def encode_drawn(teacher: Bundle, texts: list[str]) -> Latents:
    """What the teacher itself draws of the prompts, encoded."""
    from PIL import Image

    from .quality import sample_pictures

    steps = min(25, teacher.spec.spacing.max_steps) if teacher.spec.spacing is not None else max(teacher.spec.steps)
    drawn = sample_pictures(teacher, texts, range(len(texts)), steps, progress=True)
    return encode(teacher, ((Image.fromarray(p), [text]) for p, text in zip(drawn, texts, strict=True)), len(texts))


def joined(first: Latents, second: Latents) -> Latents:
    """Both, one behind the other, with the first's empty prompt; a phrasing that one has fewer of is repeated.

    Errors: `DataError` where the samples or the prompts are not of one shape.
    """
    if first.latents.shape[1:] != second.latents.shape[1:] or set(first.feeds) != set(second.feeds):
        raise DataError(
            f"the pictures are {list(first.latents.shape[1:])} with {sorted(first.feeds)}, those of the old domain "
            f"{list(second.latents.shape[1:])} with {sorted(second.feeds)}; encode both by one teacher"
        )
    phrasings = max(first.ids.shape[1], second.ids.shape[1])
    repeats = torch.arange(phrasings)
    feeds = {
        name: torch.cat([value[:, repeats % value.shape[1]], second.feeds[name][:, repeats % second.ids.shape[1]]])
        for name, value in first.feeds.items()
    }
    return Latents(torch.cat([first.latents, second.latents]), feeds, first.empty)
