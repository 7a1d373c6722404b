"""Pictures on their way in: base64 and files of any size, unpacked within a bound and made to fit a request."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.events import Picture
from fewstep.runtime.sampling.images import MAX_PIXELS, decode, decode_rgba

FITS = ("stretch", "crop", "fill")
"""How a picture of another shape is made to fit: its sides as they come, its middle, or all of it on black."""


def file_bytes(text: str, field: str) -> bytes:
    """A file in base64, as it is or as a data URL. Addresses are not fetched: a caller could reach what only we can.

    Errors: `InvalidRequest` with `field`.
    """
    if text.startswith(("http://", "https://")):
        raise InvalidRequest(field, f"{field} is an address; this server fetches none: send the file's bytes in base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise InvalidRequest(field, f"{field} is not base64; send a picture file's bytes in base64") from None


def picture(text: str, field: str, max_pixels: int = MAX_PIXELS) -> Picture:
    """[H, W, 3] uint8 of a picture file in base64.

    Errors: `InvalidRequest` with `field`.
    """
    return decode(file_bytes(text, field), max_pixels=max_pixels, field=field)


def grey(text: str, field: str, max_pixels: int = MAX_PIXELS) -> Any:
    """[H, W] uint8 luminance of a picture file in base64; transparent is black.

    Errors: `InvalidRequest` with `field`.
    """
    return np.asarray(Image.fromarray(picture(text, field, max_pixels)).convert("L"))


def with_mask(file: bytes, field: str) -> tuple[Picture, Any]:
    """([H, W, 3], [H, W] uint8): a picture's colours, and 255 where it is transparent, which is where to paint."""
    rgba = decode_rgba(file, field=field)
    return np.ascontiguousarray(rgba[:, :, :3]), 255 - rgba[:, :, 3]


def fitted(image: Any, width: int, height: int, fit: str = "crop") -> Any:
    """[H, W, 3] or [H, W] uint8 -> the same of `height` and `width`. fit: one of `FITS`."""
    if image.shape[:2] == (height, width):
        return image
    drawn = Image.fromarray(image)
    size = width, height
    if fit == "stretch":
        return np.asarray(drawn.resize(size, Image.Resampling.LANCZOS))
    if fit == "fill":
        return np.asarray(ImageOps.pad(drawn, size, Image.Resampling.LANCZOS))
    return np.asarray(ImageOps.fit(drawn, size, Image.Resampling.LANCZOS))


def nearest_size(image: Any, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) of `sizes` whose shape is nearest to the picture's, and then whose area is."""
    height, width = image.shape[:2]

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        shape = abs(np.log(size[0] / size[1]) - np.log(width / height))
        return round(float(shape), 6), abs(float(np.log(size[0] * size[1] / (width * height))))

    return min(sizes, key=distance)
