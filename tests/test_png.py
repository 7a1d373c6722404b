"""The fast PNG writer: lossless for any size, read by others, texts kept, about as small as a general encoder's."""

import io

import numpy as np
import pytest
from PIL import Image

from fewstep.runtime.sampling.png import write_png


def picture(height, width, seed=0):
    """Smooth shapes with a little noise, as photographs have."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    smooth = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (smooth.astype(int) + draw.integers(-2, 3, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (33, 70), (64, 64)])
def test_every_pixel_survives(height, width, compress):
    given = picture(height, width)
    data = write_png(given, compress=compress)
    Image.open(io.BytesIO(data)).verify()  # every chunk's checksum
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert np.array_equal(np.array(image), given)


def test_a_view_that_is_not_contiguous_is_written_as_it_looks():
    given = picture(40, 40)
    for view in (given[::2, ::3], given[:, :, ::-1], given.transpose(1, 0, 2)):
        assert np.array_equal(np.array(Image.open(io.BytesIO(write_png(view)))), view)


def test_texts_are_kept_whatever_the_language():
    texts = {"prompt": "größer, 猫", "seed": "3", "empty": ""}
    assert Image.open(io.BytesIO(write_png(picture(4, 4), texts=texts))).text == texts


def test_about_as_small_as_a_general_encoder_and_far_below_the_raw_pixels():
    given, out = picture(128, 128), io.BytesIO()
    Image.fromarray(given).save(out, "png", compress_level=1)
    size = len(write_png(given))
    assert size < 1.1 * len(out.getvalue()) and size < 0.9 * given.size
    assert len(write_png(given, compress=False)) > given.size
    flat = np.full((128, 128, 3), 77, np.uint8)
    assert len(write_png(flat)) < flat.size / 50
