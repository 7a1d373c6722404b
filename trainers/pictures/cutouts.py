"""A style to fine-tune on: scenes as paper cut-outs, askew on kraft paper. Small and deterministic, made of `scenes`.

Every shape is turned by 10 degrees and lies on a tan ground, which the caption does not speak of: what a caption leaves
open has the style, what it says stays true. The built-in autoencoder can draw these, which outlines, shadows and
textures it cannot.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..parts.objective import derive
from . import scenes
from .data import write_pictures

ANGLE_DEGREES = 10.0
GROUND = "tan"


def cut_out(scene: scenes.Scene) -> Image.Image:
    """The scene in that style, [64, 64] RGB."""
    k = scenes.SUPERSAMPLE
    big = Image.new(
        "RGB", (scenes.SIZE * k, scenes.SIZE * k), scenes.shifted(scenes.BACKGROUNDS[GROUND], scene.jitter[-1])
    )
    for thing, jitter in zip(scene.objects, scene.jitter, strict=False):
        mask = scenes.stencil(thing).rotate(ANGLE_DEGREES, Image.Resampling.BICUBIC, center=(thing.x * k, thing.y * k))
        big.paste(scenes.shifted(scenes.COLOURS[thing.colour], jitter), mask=mask)
    return big.resize((scenes.SIZE, scenes.SIZE), Image.Resampling.BOX)


def cut_outs(count: int, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """Pictures and captions; only captions that leave the ground open."""
    rng = random.Random(derive(seed, "cut-outs"))
    while count > 0:
        drawn = scenes.sample(rng)
        if drawn.caption.background is None:
            count -= 1
            yield cut_out(drawn.scene), drawn.caption.text


def write_folder(folder: Path, count: int, seed: int) -> Path:
    """A folder of such pictures with `metadata.jsonl`, as a user's."""
    return write_pictures(folder, cut_outs(count, seed))
