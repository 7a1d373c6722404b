"""Pictures to bytes and bytes to pictures. Bytes come from users, so sizes are checked before pixels are unpacked."""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..errors import InvalidRequest
from .events import Picture
from .png import write_png

FORMATS = ("png", "jpeg", "webp")
MAX_PIXELS = 4096 * 4096
PARAMETERS = "parameters"
"""The key under which web UIs look for `fewstep.runtime.sampling.infotext`."""
_DESCRIPTION, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x8769, 0x9286  # EXIF ImageDescription, Exif IFD, its UserComment
_UNICODE = b"UNICODE\0"
_DESCRIPTION_BYTES = 16_384
"""A JPEG has room for 64 KiB of EXIF; the prompts, which `parameters` holds as well, leave a longer description."""


def encode(
    picture: Picture,
    format: str = "png",
    *,
    level: int | None = None,
    quality: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """[H, W, 3] uint8 -> file bytes.

    level: PNG compression, 0 to 9; 1 if not given. 0 and 1 are `fewstep.runtime.sampling.png`'s, several times faster
    than the others, which are Pillow's and some per cent smaller (`docs/performance.md`).
    quality: of JPEG and WebP, 1 to 100; 90 if not given. metadata: PNG text chunks; the EXIF description, as JSON, of
    the others, whose `parameters` are the EXIF user comment, where web UIs look for them. `read_metadata` reads it.

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
    with _opened(data, max_pixels, field) as image:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        return np.array(image.convert("RGB"), dtype=np.uint8)


def decode_rgba(data: bytes, *, max_pixels: int = MAX_PIXELS, field: str = "image") -> Picture:
    """File bytes -> [H, W, 4] uint8: colours as they are under the transparency, and 255 where it is opaque.

    Errors: as `decode`.
    """
    with _opened(data, max_pixels, field) as image:
        return np.array(image.convert("RGBA"), dtype=np.uint8)


def read_metadata(data: bytes, *, max_pixels: int = MAX_PIXELS, field: str = "image") -> dict[str, str]:
    """What `encode` was given as metadata, or another program wrote at the same places.

    Errors: as `decode`.
    """
    with _opened(data, max_pixels, field) as image:
        found = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        found |= {key: str(value) for key, value in getattr(image, "text", {}).items()}
        exif = image.getexif()
        found |= _described(exif.get(_DESCRIPTION))
        comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
        if isinstance(comment, bytes) and comment.startswith(_UNICODE):
            found[PARAMETERS] = comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
        return {_whole(key): _whole(value) for key, value in found.items()}


def _described(text: Any) -> dict[str, str]:
    """What a description says that is a JSON object, as `encode` writes it; other programs write words there."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _whole(text: str) -> str:
    """Text that can be sent on: JSON may hold halves of surrogate pairs, which no encoding takes."""
    return text.encode("utf-8", "replace").decode()


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int, field: str) -> Iterator[Image.Image]:
    """The picture as it is seen: turned as its camera was held."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        width, height = image.size
        if width * height > max_pixels:
            raise InvalidRequest(field, f"{field} is {width}x{height}; at most {max_pixels} pixels: make it smaller")
        ImageOps.exif_transpose(image, in_place=True)
        yield image
    except InvalidRequest:
        raise
    except UnidentifiedImageError:
        raise InvalidRequest(field, f"{field} is not a PNG, JPEG or WebP picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequest(field, f"{field} has too many pixels; at most {max_pixels}: make it smaller") from None
    except Exception as error:  # Pillow's ways to say damaged: of altered files also TypeError and AssertionError
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
    rest = {key: value for key, value in metadata.items() if key != PARAMETERS}
    if len(json.dumps(rest)) > _DESCRIPTION_BYTES:
        rest = {key: value for key, value in rest.items() if not key.endswith("prompt")}
    exif = Image.Exif()
    exif[_DESCRIPTION] = json.dumps(rest)
    if PARAMETERS in metadata:
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + metadata[PARAMETERS].encode("utf-16-be")
    return exif
