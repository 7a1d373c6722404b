"""Contact sheets: pictures side by side with their words, for the eye and for the documents."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
_PAPER, _INK = (255, 255, 255), (32, 32, 32)
_GAP, _FONT_SIZE, _LINE = 6, 11, 14
"""Pixels: between tiles, height of the letters, and from one line of text to the next."""


def contact_sheet(
    pictures: Sequence[Picture], captions: Sequence[str] = (), *, columns: int = 8, scale: int = 2
) -> Image.Image:
    """Pictures [H, W, 3] uint8 of one size in rows of `columns`, each over its caption; enlarged `scale` times."""
    if not len(pictures):
        raise ValueError("a contact sheet needs at least one picture")
    if captions and len(captions) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures have {len(captions)} captions; give each its own, or none")
    tiles = [_enlarge(picture, scale) for picture in pictures]
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    texts = [_wrap(caption, width) for caption in captions]
    text_height = _LINE * max((len(lines) for lines in texts), default=0)
    pitch_x, pitch_y = width + _GAP, height + text_height + _GAP
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * pitch_x + _GAP, rows * pitch_y + _GAP), _PAPER)
    for k, tile in enumerate(tiles):
        x, y = _GAP + k % columns * pitch_x, _GAP + k // columns * pitch_y
        sheet.paste(tile, (x, y))
        _write(sheet, texts[k] if texts else [], x, y + height)
    return sheet


def comparison_sheet(rows: Mapping[str, Sequence[Picture]], captions: Sequence[str], *, scale: int = 2) -> Image.Image:
    """One labelled row of pictures per model or step count, one column per prompt, the prompts beneath."""
    if not rows or any(len(pictures) != len(captions) or not len(pictures) for pictures in rows.values()):
        raise ValueError(f"each row of a comparison needs one picture for each of the {len(captions)} captions")
    tiles = {label: [_enlarge(picture, scale) for picture in pictures] for label, pictures in rows.items()}
    width, height = next(iter(tiles.values()))[0].size
    font = ImageFont.load_default(_FONT_SIZE)
    margin = _GAP * 2 + int(max(font.getlength(line) for label in rows for line in label.split("\n")))
    texts = [_wrap(caption, width) for caption in captions]
    text_height = _LINE * max(len(lines) for lines in texts)
    size = (margin + len(captions) * (width + _GAP), len(rows) * (height + _GAP) + text_height + 2 * _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    for r, (label, line) in enumerate(tiles.items()):
        y = _GAP + r * (height + _GAP)
        words = label.split("\n")
        _write(sheet, words, _GAP, y + (height - _LINE * len(words)) // 2)
        for c, tile in enumerate(line):
            sheet.paste(tile, (margin + c * (width + _GAP), y))
    for c, lines in enumerate(texts):
        _write(sheet, lines, margin + c * (width + _GAP), _GAP + len(rows) * (height + _GAP) - _GAP)
    return sheet


def _enlarge(picture: Picture, scale: int) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _wrap(caption: str, width: int) -> list[str]:
    """Lines of a caption that fit under a tile of `width` pixels."""
    letter = ImageFont.load_default(_FONT_SIZE).getlength("e")
    return textwrap.wrap(caption, max(8, int(width / letter)))


def _write(sheet: Image.Image, lines: Sequence[str], x: int, y: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for k, line in enumerate(lines):
        draw.text((x, y + k * _LINE), line, fill=_INK, font=font)
