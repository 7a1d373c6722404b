"""The reward `objects`: how surely the objects that a caption names are found in a picture of it, and where it puts
them.

Of the kind that a detector gives (GenEval, Ghosh et al. 2023), with a gradient. It is for the built-in scenes: it reads
captions as `scenes.describe` phrases them, and looks through `finder.ObjectFinder`, which knows their objects alone.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fewstep.models.denoiser import Condition

from ..errors import RecipeError
from ..pictures.data import PROMPT
from ..pictures.finder import KINDS, MOST, Found, ObjectFinder
from ..pictures.scenes import WAYS, Caption, read_caption

PLACES = 3.0
"""What a relation weighs beside the objects, whose gradient is the greater."""
SLACK = 6.0
"""Pixels by which a relation may be missed before it counts as such."""
LEAST = 2.5e-3
"""Added to the probability of each kind's count: beyond it more of the same is hardly worse."""


@dataclass(frozen=True)
class ShowsObjects:
    """`sum_k log(p(n_k) + LEAST) + PLACES mean log sigmoid(m / SLACK)`, [B]; about 0 is a picture beyond doubt.

    n_k: how many objects of kind k the caption names, most often none. m: by how many pixels each step from an object
    to the next one named goes more along the relation's axis than across, over objects that are found once.

    Errors: `RecipeError` for prompts that name no object of the scenes.
    """

    decoder: Any
    finder: ObjectFinder
    tokenizer: Any
    _read: dict[tuple[int, ...], Caption] = field(default_factory=dict)

    def __call__(self, x: Tensor, cond: Condition) -> Tensor:
        captions = [self.caption(tuple(row)) for row in cond[PROMPT].tolist()]
        found: Found = self.finder(self.decoder(x).float())
        wanted = torch.stack([counts_named(caption) for caption in captions]).to(x.device)
        sure: Tensor = (found.counts().gather(2, wanted[..., None])[..., 0] + LEAST).log().sum(1)
        return sure + PLACES * placed(found, captions)

    def caption(self, ids: tuple[int, ...]) -> Caption:
        """What the tokens of a row say."""
        if ids not in self._read:
            caption = read_caption(self.tokenizer.decode(ids, skip_special_tokens=True))
            if not caption.objects:
                raise RecipeError(
                    f"the reward objects finds none of its own in the prompt {caption.text!r}; it is for captions of "
                    "the built-in scenes: take another reward"
                )
            self._read[ids] = caption
        return self._read[ids]


def counts_named(caption: Caption) -> Tensor:
    """[K]: how many objects of each kind a caption names."""
    counts = torch.zeros(len(KINDS), dtype=torch.long)
    for claim in caption.objects:
        counts[KINDS.index((claim.colour, claim.shape))] += 1
    return counts.clamp(max=MOST)


def placed(found: Found, captions: list[Caption]) -> Tensor:
    """[B]: the mean over a caption's steps of `log sigmoid(m / SLACK)`; 0 where it puts nothing anywhere."""
    places = found.places()
    judged = places.new_zeros(len(captions))
    steps = [(row, *step) for row, caption in enumerate(captions) for step in steps_named(caption)]
    if not steps:
        return judged
    rows, first, second, axis, sign, of = torch.tensor(steps, device=judged.device).unbind(1)
    step = places[rows, second] - places[rows, first]
    along, across = (step.gather(1, which[:, None])[:, 0] for which in (axis, 1 - axis))
    return judged.index_add(0, rows, logsigmoid((sign * along - across.abs()) / SLACK) / of)


def steps_named(caption: Caption) -> list[tuple[int, int, int, int, int]]:
    """(kind, next kind, axis, sign, number of steps) of the steps that a relation speaks of; none of objects alike."""
    kinds = [KINDS.index((claim.colour, claim.shape)) for claim in caption.objects]
    if caption.relation is None or len(set(kinds)) < len(kinds):
        return []
    return [(*pair, *WAYS[caption.relation], len(kinds) - 1) for pair in itertools.pairwise(kinds)]
