"""Batches with a concept to forget: what the teacher is asked for where a prompt names it."""

import re
from typing import Any

import torch

from fewstep.models.bundle import Bundle

from ..distribution.forgetting import Swap
from ..errors import RecipeError
from ..parts.objective import Batch, derive
from ..pictures.data import LatentSource, read_texts


class ForgettingSource:
    """A source of latents; rows whose prompt has the word are taught with the other word in its place.

    Errors: `RecipeError` where no prompt has the word.
    """

    def __init__(self, source: LatentSource, swap: Swap, teacher: Bundle) -> None:
        self.source, self.swap = source, swap
        self.tokenizers, self.spec = teacher.tokenizers(), teacher.spec
        self.word = re.compile(rf"\b{re.escape(swap.forget)}\b", re.IGNORECASE)
        ids = source.data.ids
        texts = self._texts(ids.flatten(0, 1))
        self.gone = torch.tensor([bool(self.word.search(text)) for text in texts]).reshape(ids.shape[:2])
        if not bool(self.gone.any()):
            raise RecipeError(
                f"no prompt of the {len(texts)} has the word {swap.forget!r}, so there is nothing to forget; set "
                "forget to a word that they use"
            )

    @property
    def seed(self) -> int:
        return self.source.seed

    def batch(self, step: int) -> Batch:
        chosen = self.source.part.rows(self.source.choose(step))
        batch = self.source.gather(chosen, derive(self.source.seed, step, "scale"), self.source.part)
        rows, phrasing = chosen.unbind(1)
        gone = self.gone[rows, phrasing]
        taught = {name: value.clone() for name, value in batch.cond.items()}
        if bool(gone.any()):  # in every part of a batch there is something taught, so that all have the same metrics
            said = self._texts(self.source.data.ids[rows, phrasing][gone])
            other = [self.word.sub(lambda found: self.swap.override, text) for text in said]
            told = self.source.encode_text(read_texts(self.tokenizers, self.spec, other))
            for name, value in told.items():
                taught[name][gone.to(value.device)] = value
        return Batch(batch.x0, batch.cond, batch.uncond, batch.noise, taught)

    def _texts(self, ids: torch.Tensor) -> list[str]:
        tokenizer: Any = self.tokenizers[0]
        found: list[str] = tokenizer.batch_decode(ids.long(), skip_special_tokens=True)
        return found
