"""PNG files written fast: one filter for all rows and run-length matching, losslessly, with nothing but zlib.

General encoders try five filters per row and search for long matches. On pictures that gains a few per cent of size for
2 to 5 times the time (`docs/performance.md`). Format: https://www.w3.org/TR/png-3/.
"""

import struct
import zlib
from collections.abc import Mapping

import numpy as np

from .events import Picture

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP = 2
"""The filter that keeps each pixel's difference from the one above it."""
_BITS, _MEMORY = 15, 9
"""zlib's largest window and tables."""


def write_png(picture: Picture, *, compress: bool = True, texts: Mapping[str, str] | None = None) -> bytes:
    """[H, W, 3] uint8 -> the bytes of a PNG file; without `compress` the pixels are only stored.

    texts: keyword (Latin-1, 1 to 79 characters) -> text (any), as iTXt chunks.
    """
    height, width, _ = picture.shape
    flat = picture.reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    deflate = zlib.compressobj(int(compress), zlib.DEFLATED, _BITS, _MEMORY, zlib.Z_RLE)
    data = deflate.compress(rows.data) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, colour, deflate, filters, not interlaced
    notes = [_chunk(b"iTXt", _text(key, value)) for key, value in (texts or {}).items()]
    return b"".join((_SIGNATURE, _chunk(b"IHDR", header), *notes, _chunk(b"IDAT", data), _chunk(b"IEND", b"")))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))))


def _text(key: str, value: str) -> bytes:
    """Keyword; not compressed; no language; no translated keyword; text."""
    return key.encode("latin-1") + b"\0\0\0\0\0" + value.encode()
