"""Pictures to bytes and bytes to pictures. Bytes come from users, so sizes are checked before pixels are unpacked."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .errors import InvalidRequest
from .events import Picture
from .png import write_png

FORMATS = ("png", "jpeg", "webp")
MAX_PIXELS = 4096 * 4096
_DESCRIPTION = 0x010E  # EXIF ImageDescription


def encode(
    picture: Picture,
    format: str = "png",
    *,
    level: int | None = None,
    quality: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """[H, W, 3] uint8 -> file bytes.

    level: PNG compression, 0 to 9; 1 if not given. 0 and 1 are `fewstep.runtime.png`'s, several times faster than the
    others, which are Pillow's and some per cent smaller (`docs/performance.md`).
    quality: of JPEG and WebP, 1 to 100; 90 if not given. metadata: PNG text chunks; the EXIF description, as JSON, of
    the others.

    Errors: `InvalidRequest` naming the setting.
    """
    if format not in FORMATS:
        raise InvalidRequest("format", f"format is {format!r}; use one of {', '.join(FORMATS)}")
    settings: dict[str, Any]
    if format == "png":
        if quality is not None:
            raise InvalidRequest("quality", f"quality is {quality}; png is lossless: leave it out or use jpeg or webp")
        level = _within("level", 1 if level is None else level, 0, 9)
        if level <= 1:
            return write_png(picture, compress=level == 1, texts=metadata)
        settings = {"compress_level": level}
        if metadata:
            settings["pnginfo"] = _text_chunks(metadata)
    else:
        if level is not None:
            raise InvalidRequest("level", f"level is {level}; it is a setting of png, not of {format}: leave it out")
        settings = {"quality": _within("quality", 90 if quality is None else quality, 1, 100)}
        if format == "webp":
            settings["method"] = 0  # the fastest search; 3 times the speed of the default
        if metadata:
            settings["exif"] = _exif(metadata)
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format, **settings)
    return out.getvalue()


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, field: str = "image") -> Picture:
    """File bytes (PNG, JPEG or WebP) -> [H, W, 3] uint8; transparency is laid over black.

    Errors: `InvalidRequest` with `field` where the bytes are no such picture, are damaged, or have more than
    `max_pixels` (checked before unpacking, so a small file cannot fill the memory).
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        width, height = image.size
        if width * height > max_pixels:
            raise InvalidRequest(field, f"{field} is {width}x{height}; at most {max_pixels} pixels: make it smaller")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        return np.array(image.convert("RGB"), dtype=np.uint8)
    except UnidentifiedImageError:
        raise InvalidRequest(field, f"{field} is not a PNG, JPEG or WebP picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequest(field, f"{field} has too many pixels; at most {max_pixels}: make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways of saying that a file is damaged
        raise InvalidRequest(field, f"{field} is damaged and cannot be read ({error}): save it again") from error


def _within(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidRequest(name, f"{name} is {value}; use {low} to {high}")
    return value


def _text_chunks(metadata: Mapping[str, str]) -> PngInfo:
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_itxt(key, value)
    return chunks


def _exif(metadata: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    exif[_DESCRIPTION] = json.dumps(dict(metadata))
    return exif
