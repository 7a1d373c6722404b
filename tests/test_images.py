import contextlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.images import decode, decode_rgba, encode, read_metadata


@pytest.fixture
def picture():
    ramp = np.arange(48 * 32 * 3, dtype=np.int64).reshape(48, 32, 3)
    return (ramp % 251).astype(np.uint8)


def test_png_keeps_every_pixel_and_the_metadata(picture):
    data = encode(picture, metadata={"prompt": "a cat, größer", "seed": "3"})
    assert np.array_equal(decode(data), picture)
    assert Image.open(io.BytesIO(data)).text == {"prompt": "a cat, größer", "seed": "3"}


def test_png_is_written_at_level_one_by_default(picture):
    assert encode(picture) == encode(picture, "png", level=1)
    assert len(encode(picture, level=9)) < len(encode(picture)) < len(encode(picture, level=0))


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_lossy_formats_come_close_and_obey_quality(picture, format):
    smooth = np.array(Image.fromarray(picture).resize((32, 48)).reduce(4).resize((128, 128), Image.BICUBIC))
    data = encode(smooth, format, metadata={"seed": "3"})
    image = Image.open(io.BytesIO(data))
    assert image.format.lower() == format
    assert json.loads(image.getexif()[0x010E]) == {"seed": "3"}
    assert np.abs(decode(data).astype(int) - smooth).mean() < 4
    assert len(encode(smooth, format, quality=20)) < len(encode(smooth, format, quality=95))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"format": "gif"}, "format"),
        ({"format": "png", "quality": 90}, "quality"),
        ({"format": "jpeg", "level": 1}, "level"),
        ({"format": "png", "level": 10}, "level"),
        ({"format": "webp", "quality": 0}, "quality"),
    ],
)
def test_settings_are_refused_by_name(picture, settings, field):
    with pytest.raises(InvalidRequest) as caught:
        encode(picture, **settings)
    assert caught.value.field == field


def test_transparent_and_grey_pictures_become_rgb():
    grey = io.BytesIO()
    Image.new("L", (3, 2), 7).save(grey, "png")
    assert decode(grey.getvalue()).tolist() == [[[7, 7, 7]] * 3] * 2
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 255, 255, 0)).save(clear, "png")
    assert decode(clear.getvalue()).max() == 0


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_claiming(width: int, height: int) -> bytes:
    """A picture of a few hundred bytes that unpacks to gigabytes."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [5_000, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side):
    with pytest.raises(InvalidRequest, match="pixels") as caught:
        decode(_png_claiming(side, side), field="control.edge")
    assert caught.value.field == "control.edge"


def test_bad_bytes_are_refused(picture):
    for data in (b"", b"GIF89a", b"hello" * 100):
        with pytest.raises(InvalidRequest, match="not a PNG"):
            decode(data)
    with pytest.raises(InvalidRequest, match="damaged"):
        decode(encode(picture)[:200])
    with pytest.raises(InvalidRequest, match="32x48"):
        decode(encode(picture), max_pixels=1000)


def _with_exif(form="JPEG", **tags):
    exif = Image.Exif()
    for number, value in tags.items():
        exif[int(number[1:], 16)] = value
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 100, 0)).save(out, form, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("said", ["2024", "[1]", "null", '"words"', "a holiday", "[" * 20_000, "{", "NaN", ""])
def test_a_description_that_is_no_object_of_ours_is_none(said):
    assert read_metadata(_with_exif(x010E=said)) == {}
    assert read_metadata(_with_exif(x010E='{"seed": 3}')) == {"seed": "3"}


def _wrong_resolution(form):
    """A picture to be turned, whose XResolution is text: Pillow cannot write the tags of the turned one."""
    data = _with_exif(form, x0112=6, x011A=72.0)
    rational = data.index(b"\x01\x1a\x00\x05") if b"MM\x00*" in data else data.index(b"\x1a\x01\x05\x00")
    kind = b"\x00\x02" if b"MM\x00*" in data else b"\x02\x00"
    return data[: rational + 2] + kind + data[rational + 4 :]


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
@pytest.mark.parametrize("read", [decode, decode_rgba, read_metadata])
def test_tags_of_the_wrong_kind_are_the_files_fault(form, read):
    with pytest.raises(InvalidRequest, match=r"edit\.image is damaged") as caught:
        read(_wrong_resolution(form), field="edit.image")
    assert caught.value.field == "edit.image" and isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_altered_files_are_pictures_or_are_refused(picture, form):
    """Pillow has no error of its own for damage, and raises whatever its parsers trip over."""
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encode(picture, form, metadata={"prompt": "a", "parameters": "b"}), np.uint8)
    for _ in range(300):
        data = whole.copy()
        data[rng.integers(0, min(len(data), 300), 3)] = rng.integers(0, 256, 3)
        for read in (decode, decode_rgba, read_metadata):
            with contextlib.suppress(InvalidRequest):
                read(data.tobytes(), max_pixels=10_000)
