"""The picture prompt as CLIP reads it: of a long one its middle alone is resampled, to the same pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.runtime.sampling.edits import CLIP_MEAN, CLIP_STD, LONGEST, clip_pixels

rng = np.random.default_rng(0)


def whole(image, side):
    """All of the picture resampled, then the middle cut out: [side, side, 3] uint8."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = (side, int(side * height / short)) if width == short else (int(side * width / short), side)
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (small.shape[0] - side) // 2, (small.shape[1] - side) // 2
    return small[top : top + side, left : left + side]


def levels(pixels):
    """CLIP's numbers back as levels 0 to 255: [side, side, 3]."""
    found = pixels.permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    return (found * 255.0).round().to(torch.int32).numpy()


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize(
    "size", [(64, 64), (31, 31), (50, 97), (97, 50), (300, 201), (333, 640), (1000, 224), (225, 224), (8, 64)]
)
def test_ordinary_pictures_are_resampled_as_a_whole(size, side):
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    assert np.array_equal(levels(clip_pixels(image, side)), whole(image, side))


@pytest.mark.parametrize("side", [8, 32, 224])
@pytest.mark.parametrize("size", [(64, 520), (520, 64), (5, 400), (1, 90), (901, 100), (30, 2_001)])
def test_the_middle_of_a_long_picture_gives_the_pixels_of_the_whole(size, side):
    noise = rng.integers(0, 256, (*size, 3), np.uint8)
    smooth = np.sort(noise, axis=int(size[1] > size[0]))
    for image in (noise, smooth):
        apart = levels(clip_pixels(image, side)) - whole(image, side).astype(int)
        assert np.abs(apart).max() <= 1  # Pillow goes down first where a picture is tall, and rounds in between


@pytest.mark.parametrize("size", [(84_000, 28), (28, 84_000), (1, 2**24), (2**24, 1)])
def test_a_strip_costs_no_more_than_its_middle(size, monkeypatch):
    seen, resize = [], Image.Image.resize

    def counted(image, wanted, *rest, **options):
        seen.append((image.size, wanted))
        return resize(image, wanted, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    image = np.zeros((*size, 3), np.uint8)
    top, left = max(0, size[0] // 2 - 20), max(0, size[1] // 2 - 20)
    image[top : top + 40, left : left + 40] = 200
    assert (levels(clip_pixels(image, 224)) == 200).all()
    ((read, made),) = seen
    assert min(made) == 224 and max(made) == LONGEST * 224 and max(read) <= LONGEST * 28 + 8
