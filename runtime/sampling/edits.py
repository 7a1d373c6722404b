"""A request's own picture: as tensors, what of it a new picture must have, and putting it back pixel by pixel.

Shapes: pictures [3, H, W] in [-1, 1], or [H, W, 3] uint8 where numpy; masks 1 where the picture is made anew.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .events import Picture
from .request import Edit

LUMINANCE = (0.2989, 0.5870, 0.1140)
BLOCK = 8
"""Pixels along a side of the blocks whose mean a "coarse" picture gives (consistency models' own patch size)."""
ROUNDS = 4
LONGEST = 8
"""Beyond this many times its short side a picture's ends, which CLIP never sees, are left out before resampling."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Source:
    """What a request brings beside its texts: its picture [3, H, W], that picture's latent [C, h, w] once encoded, its
    mask [1, h, w] at the latent's size, and the picture prompt as the image encoder reads it [3, S, S] and its tokens
    [T, D] once made, for `layers` cross-attentions."""

    picture: Tensor | None = None
    latent: Tensor | None = None
    mask: Tensor | None = None
    pixels: Tensor | None = None
    tokens: Tensor | None = None
    layers: int = 0


def picture_tensor(image: Any) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] float32 in [-1, 1], as diffusers' image processor makes it."""
    planes = torch.tensor(image).permute(2, 0, 1).contiguous().to(torch.float32)
    return planes.div_(255.0).mul_(2.0).sub_(1.0)


def clip_pixels(image: Any, side: int) -> Tensor:
    """[H, W, 3] uint8 -> [3, side, side] float32 as `CLIPImageProcessor` makes it: the shorter side made `side` by
    bicubic resampling, the middle cut out, CLIP's mean and spread.

    Of a picture longer than `LONGEST` times its short side only so much about its middle is resampled: of 28 x 84000
    pixels the whole would be 224 x 672000.
    """
    from PIL import Image

    short = min(image.shape[:2])
    down, across = (_middle(length, short, side) for length in image.shape[:2])
    part = np.ascontiguousarray(image[down.first : down.last, across.first : across.last])
    box = across.begin, down.begin, across.end, down.end
    small = np.asarray(Image.fromarray(part).resize((across.resized, down.resized), Image.Resampling.BICUBIC, box=box))
    cut = torch.tensor(small[down.cut : down.cut + side, across.cut : across.cut + side], dtype=torch.float32) / 255.0
    pixels: Tensor = ((cut - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(2, 0, 1).contiguous()
    return pixels


class _Middle(NamedTuple):
    """What of one axis is resampled: its pixels from `first` to before `last`, of them from `begin` to `end`, to
    `resized` pixels, of which those from `cut` on are wanted."""

    first: int
    last: int
    begin: float
    end: float
    resized: int
    cut: int


def _middle(length: int, short: int, side: int) -> _Middle:
    """Of `length` pixels, whose grid is such that `short` of them become `side`."""
    whole = int(side * length / short)
    resized = min(whole, LONGEST * side)
    if resized == whole:
        return _Middle(0, length, 0, length, whole, (whole - side) // 2)
    skipped, scale = (whole - resized) // 2, length / whole
    begin, end = skipped * scale, (skipped + resized) * scale
    reach = math.ceil(2 * max(1.0, scale)) + 1  # of the bicubic filter, which looks past the ends
    first, last = max(0, math.floor(begin) - reach), min(length, math.ceil(end) + reach)
    return _Middle(first, last, begin - first, end - first, resized, (whole - side) // 2 - skipped)


def latent_mask(mask: Any, factor: int) -> Tensor:
    """[H, W] uint8 -> [1, h, w]: a latent pixel is as new as the newest of its pixels; the kept are put back later."""
    found = torch.tensor(mask, dtype=torch.float32)[None] / 255.0
    small: Tensor = functional.max_pool2d(found, factor)
    return small


def keep_grey(made: Tensor, source: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] with the luminance of `source`: colourisation (Song et al. 2023, consistency models).

    In a basis whose first axis is the luminance's direction, that coordinate is the source's.
    """
    direction = torch.tensor(LUMINANCE, dtype=made.dtype, device=made.device)
    axis: Tensor = (direction / direction.norm()).reshape(1, 3, 1, 1)
    return made + axis * ((source - made) * axis).sum(dim=1, keepdim=True)


def keep_coarse(made: Tensor, source: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] whose 8x8 blocks have the means of `source`'s: super-resolution (Song et al. 2023)."""
    means = functional.avg_pool2d(source - made, BLOCK)
    return made + means.repeat_interleave(BLOCK, dim=2).repeat_interleave(BLOCK, dim=3)


RESTORE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"grey": keep_grey, "coarse": keep_coarse}


def restored(made: Tensor, sources: Tensor, keeps: list[str]) -> Tensor:
    """Each picture [B, 3, H, W], first brought into [-1, 1], with what its row keeps of its source."""
    made = made.clamp(-1.0, 1.0)
    out = made.clone()
    for keep in set(keeps):
        rows = [k for k, wanted in enumerate(keeps) if wanted == keep]
        out[rows] = RESTORE[keep](made[rows], sources[rows])
    return out


def put_back(made: Picture, edit: Edit) -> Picture:
    """The finished picture with what the edit keeps: pixels outside the mask, luminance, or block means.

    Where the mask is 0 the pixels are the edit's own. The luminance is within one level of the edit's; colours that
    leave the range are made greyer, not clipped. Block means are within a level but where the block is saturated.
    """
    if edit.mask is not None:
        share = np.asarray(edit.mask, np.float32)[..., None] / 255.0
        return _levels(share * made + (1.0 - share) * edit.image)
    if edit.keep == "grey":
        return _levels(_with_luminance(made.astype(np.float64), np.asarray(edit.image, np.float64)))
    if edit.keep == "coarse":
        found = torch.from_numpy(made.astype(np.float32)).permute(2, 0, 1)[None]
        wanted = torch.from_numpy(np.asarray(edit.image, np.float32)).permute(2, 0, 1)[None]
        for _ in range(ROUNDS):
            found = keep_coarse(found, wanted).clamp(0.0, 255.0)
        return _levels(found[0].permute(1, 2, 0).numpy())
    return made


def _with_luminance(made: Any, source: Any) -> Any:
    weights = np.asarray(LUMINANCE) / sum(LUMINANCE)
    grey = (source @ weights)[..., None]
    colour = made - (made @ weights)[..., None]  # without luminance
    room = np.where(colour > 0, 255.0 - grey, grey)
    fits = np.divide(room, np.abs(colour), out=np.full_like(colour, np.inf), where=colour != 0)
    return grey + colour * np.minimum(1.0, fits.min(axis=-1, keepdims=True))


def _levels(values: Any) -> Picture:
    found: Picture = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return found
