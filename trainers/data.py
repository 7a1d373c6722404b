"""Training data as latents with token ids, and batches of it as a pure function of the step.

Two places it comes from: the built-in `scenes`, drawn on demand, and a user's own pictures in the ImageFolder
convention (a folder with `metadata.jsonl`, one `{"file_name", "text"}` a line). Both are encoded once by the teacher's
autoencoder and can be kept in one safetensors file.

Shapes: latents [N, C, h, w] as the denoiser sees them (scaled); ids [N, K, L] token ids of K phrasings each.
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.models.bundle import Bundle

from . import scenes
from .errors import DataError
from .objective import Batch, derive

ENCODE_BATCH = 64


@dataclass(frozen=True)
class Latents:
    """An encoded data set. `empty` [L] are the token ids of the empty prompt."""

    latents: Tensor
    ids: Tensor
    empty: Tensor

    def __len__(self) -> int:
        return self.latents.shape[0]


class LatentSource:
    """Batches for the loop: samples and phrasings drawn by (seed, step), text encoded by the frozen text encoder."""

    def __init__(
        self, data: Latents, text_encoder: nn.Module, batch: int, *, seed: int = 0, bf16: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if len(data) == 0:
            raise DataError("the data set is empty; give at least one picture")
        self.data = data
        self.text_encoder = text_encoder.to(device)
        self.size = batch
        self.seed = seed
        self.bf16 = bf16
        self.device = torch.device(device)
        self.empty_ctx = self.encode_text(data.empty[None])

    def batch(self, step: int) -> Batch:
        rng = torch.Generator().manual_seed(derive(self.seed, step, "data"))
        rows = torch.randint(len(self.data), (self.size,), generator=rng)
        phrasing = torch.randint(self.data.ids.shape[1], (self.size,), generator=rng)
        x0 = self.data.latents[rows].float().to(self.device)
        ctx = self.encode_text(self.data.ids[rows, phrasing])
        return Batch(x0, {"ctx": ctx}, {"ctx": self.empty_ctx.expand_as(ctx)})

    def encode_text(self, ids: Tensor) -> Tensor:
        """[B, L] token ids -> ctx [B, L, D] float32."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out: Tensor = self.text_encoder(ids.long().to(self.device))
        return out.float()


def encode_scenes(teacher: Bundle, count: int, *, seed: int = 0, phrasings: int = 2) -> Latents:
    """Draw `count` scenes and encode them. `phrasings` captions are made of each."""

    def draw() -> Iterator[tuple[Image.Image, list[str]]]:
        rng = random.Random(derive(seed, "scenes"))
        for _ in range(count):
            sample = scenes.sample(rng)
            others = (scenes.caption(sample.scene, sample.caption.relation, rng) for _ in range(phrasings - 1))
            yield scenes.render(sample.scene), [sample.caption.text, *(c.text for c in others)]

    return encode(teacher, draw(), count)


def encode_folder(teacher: Bundle, folder: Path) -> Latents:
    """Encode a user's pictures, each cut to the teacher's first size from its middle.

    Errors: `DataError` naming the file or line at fault.
    """
    rows = read_metadata(folder)
    width, height = teacher.spec.sizes[0]

    def read() -> Iterator[tuple[Image.Image, list[str]]]:
        for path, text in rows:
            yield read_picture(path, width, height), [text]

    return encode(teacher, read(), len(rows))


def encode(teacher: Bundle, samples: Iterable[tuple[Image.Image, list[str]]], count: int) -> Latents:
    """Pictures and their captions -> latents and token ids, in batches, without gradient."""
    encoder, tokenizer = teacher.encoder(), teacher.tokenizer
    latents, ids = [], []
    with torch.no_grad(), tqdm(total=count, desc="encode data", dynamic_ncols=True) as bar:
        for chunk in _chunks(samples, ENCODE_BATCH):
            pixels = torch.stack([to_pixels(picture) for picture, _ in chunk])
            latents.append(encoder(pixels).half())
            ids.append(torch.stack([tokenize(tokenizer, texts) for _, texts in chunk]))
            bar.update(len(chunk))
    if not latents:
        raise DataError("the data set is empty; give at least one picture")
    return Latents(torch.cat(latents), torch.cat(ids), tokenize(tokenizer, [""])[0])


def to_pixels(picture: Image.Image) -> Tensor:
    """[3, H, W] float32 in [-1, 1]."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1)


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """[len(texts), L] int32, padded and cut to the tokenizer's length."""
    out = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return torch.tensor(out["input_ids"], dtype=torch.int32)


def save_latents(path: Path, data: Latents) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": data.latents, "ids": data.ids, "empty": data.empty}, path)


def load_latents(path: Path) -> Latents:
    """Errors: `DataError` where the file is missing, not safetensors, or lacks a tensor."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        return Latents(found["latents"], found["ids"], found["empty"])
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{path} is not a file of latents ({error}); delete it and it is made anew") from error


def read_metadata(folder: Path) -> list[tuple[Path, str]]:
    """(picture, text) of each line of `metadata.jsonl`.

    Errors: `DataError` naming the line, the field, or the file that does not exist.
    """
    table = folder / "metadata.jsonl"
    if not table.is_file():
        raise DataError(f'{table} does not exist; write one line {{"file_name": ..., "text": ...}} per picture')
    rows = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{table} line {number} is not JSON: {error}") from error
        for key in ("file_name", "text"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise DataError(f"{table} line {number} has no text field {key!r}")
        picture = folder / row["file_name"]
        if not picture.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{table} line {number} names {row['file_name']!r}, which lies outside {folder}")
        if not picture.is_file():
            raise DataError(f"{table} line {number} names {row['file_name']!r}, which does not exist")
        rows.append((picture, row["text"]))
    if not rows:
        raise DataError(f"{table} is empty; give at least one picture")
    return rows


def read_picture(path: Path, width: int, height: int) -> Image.Image:
    """The picture, upright, scaled to cover width x height and cut from its middle.

    Errors: `DataError` naming a file that is not a picture.
    """
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            return ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from error


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
