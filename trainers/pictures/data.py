"""Training data as latents with token ids, and batches of it as a pure function of the step.

Two places it comes from: the built-in `scenes`, drawn on demand, and a user's own pictures in the ImageFolder
convention (a folder with `metadata.jsonl`, one `{"file_name", "text"}` a line). Both are encoded once by the teacher's
autoencoder and can be kept in one safetensors file.

Shapes: latents [N, C, h, w] as the denoiser sees them (scaled); what the text network is fed, by its names (`ids`,
`mask`, `ids_2`, ...), [N, K, L] of K phrasings each.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.models.bundle import Bundle
from fewstep.models.spec import SamplerSpec
from fewstep.runtime.sampling.loop import negative_text, size_conditions
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.sampling.text import tokenise

from ..errors import DataError
from ..parts.objective import WHOLE, Batch, Part, derive
from . import scenes

ENCODE_BATCH = 64
PROMPT = "prompt"
"""Name of the captions as a preference model's own tokens, where there is one."""


@dataclass(frozen=True)
class Latents:
    """An encoded data set. `feeds`: name -> [N, K, L]; `empty`: name -> [L], the same of the empty prompt."""

    latents: Tensor
    feeds: Mapping[str, Tensor]
    empty: Mapping[str, Tensor]

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def ids(self) -> Tensor:
        """Token ids of the first tokenizer, [N, K, L]."""
        return self.feeds["ids"]


class LatentSource:
    """Batches for the loop: samples and phrasings drawn by (seed, step), text encoded by the frozen text network.

    spec: the teacher's, by which the network is told the picture's size and its guidance scale, where it takes them.
    part: which rows of each batch this process sees.
    """

    def __init__(
        self, data: Latents, text_encoder: nn.Module, batch: int, *, seed: int = 0, bf16: bool = False,
        device: torch.device | str = "cpu", spec: SamplerSpec | None = None, part: Part = WHOLE,
    ) -> None:  # fmt: skip
        if len(data) == 0:
            raise DataError("the data set is empty; give at least one picture")
        self.data = data
        self.text_encoder = text_encoder.to(device)
        self.size = batch
        self.seed = seed
        self.bf16 = bf16
        self.device = torch.device(device)
        self.part = part
        self.w = spec.guidance.range if spec is not None and spec.guidance.mode == "embedded" else None
        self.sized = {} if spec is None else size_conditions(_asking(data.latents, spec), spec)
        nothing = self.encode_text({name: value[None] for name, value in data.empty.items()})
        if spec is not None and spec.guidance.zero_empty:
            nothing = {name: torch.zeros_like(value) for name, value in nothing.items()}
        self.nothing = nothing

    def batch(self, step: int) -> Batch:
        return self.gather(self.part.rows(self.choose(step)), derive(self.seed, step, "scale"), self.part)

    def joint(self, step: int) -> Batch:
        """The rows of all processes together."""
        return self.gather(self.choose(step), derive(self.seed, step, "scale"))

    def choose(self, step: int) -> Tensor:
        """[B, 2]: which samples, and which phrasing of each."""
        rng = torch.Generator().manual_seed(derive(self.seed, step, "data"))
        rows = torch.randint(len(self.data), (self.size,), generator=rng)
        phrasing = torch.randint(self.data.ids.shape[1], (self.size,), generator=rng)
        return torch.stack([rows, phrasing], dim=1)

    def gather(self, chosen: Tensor, scale_seed: int = 0, part: Part = WHOLE) -> Batch:
        """The batch of these samples and phrasings; scale_seed: of the guidance scales that the network is told, drawn
        for the joint batch of which these are a part."""
        rows, phrasing = chosen.unbind(1)
        x0 = self.data.latents[rows].float().to(self.device)
        cond = self.encode_text({name: value[rows, phrasing] for name, value in self.data.feeds.items()})
        uncond = {name: self.nothing[name].expand_as(value) for name, value in cond.items()}
        fixed = {name: value.to(self.device).expand(len(rows), -1) for name, value in self.sized.items()}
        if self.w is not None:
            low, high = self.w
            rng = torch.Generator().manual_seed(scale_seed)
            drawn = part.rows(torch.rand(part.count * len(rows), generator=rng))
            fixed["w"] = (low + (high - low) * drawn).to(self.device)
        if PROMPT in self.data.feeds:  # for whoever judges pictures; no denoiser reads it
            fixed[PROMPT] = self.data.feeds[PROMPT][rows, phrasing].to(self.device)
        return Batch(x0, {**cond, **fixed}, {**uncond, **fixed})

    def encode_text(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the text network gives, float32 by its names (`ctx`, `pooled`, ...), of feeds [B, L]."""
        net: Any = self.text_encoder
        given = [feeds[name].long().to(self.device) for name in net.inputs]
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out = net(*given)
        found = out if isinstance(out, tuple) else (out,)
        return {name: value.float() for name, value in zip(net.outputs, found, strict=True)}


def _asking(latents: Tensor, spec: SamplerSpec) -> GenerateRequest:
    """A request for pictures of the latents' size."""
    height, width = (side * spec.latent.factor for side in latents.shape[-2:])
    return GenerateRequest(prompt="-", width=width, height=height)


def encode_scenes(teacher: Bundle, count: int, *, seed: int = 0, phrasings: int = 2) -> Latents:
    """Draw `count` scenes and encode them. `phrasings` captions are made of each."""

    def draw() -> Iterator[tuple[Image.Image, list[str]]]:
        rng = random.Random(derive(seed, "scenes"))
        for _ in range(count):
            sample = scenes.sample(rng)
            others = (scenes.caption(sample.scene, sample.caption.relation, rng) for _ in range(phrasings - 1))
            yield scenes.render(sample.scene), [sample.caption.text, *(c.text for c in others)]

    return encode(teacher, draw(), count)


def encode_folder(teacher: Bundle, folder: Path, *, first: int | None = None) -> Latents:
    """Encode a user's pictures, or the first ones, each cut to the teacher's first size from its middle.

    Errors: `DataError` naming the file or line at fault.
    """
    rows = read_metadata(folder)[:first]
    width, height = teacher.spec.sizes[0]

    def read() -> Iterator[tuple[Image.Image, list[str]]]:
        for path, text in rows:
            yield read_picture(path, width, height), [text]

    return encode(teacher, read(), len(rows))


def encode(teacher: Bundle, samples: Iterable[tuple[Image.Image, list[str]]], count: int) -> Latents:
    """Pictures and their captions -> latents and token ids, in batches, without gradient."""
    encoder, tokenizers, spec = teacher.encoder(), teacher.tokenizers(), teacher.spec
    latents: list[Tensor] = []
    captions: list[dict[str, Tensor]] = []
    with torch.no_grad(), tqdm(total=count, desc="encode data", dynamic_ncols=True) as bar:
        for chunk in _chunks(samples, ENCODE_BATCH):
            pixels = torch.stack([to_pixels(picture) for picture, _ in chunk])
            latents.append(encoder(pixels).half())
            captions += [read_texts(tokenizers, spec, texts) for _, texts in chunk]
            bar.update(len(chunk))
    if not latents:
        raise DataError("the data set is empty; give at least one picture")
    feeds = {name: torch.stack([each[name] for each in captions]) for name in captions[0]}
    empty = read_texts(tokenizers, spec, [negative_text(GenerateRequest(prompt="-"), spec)])
    return Latents(torch.cat(latents), feeds, {name: value[0] for name, value in empty.items()})


def read_texts(tokenizers: Sequence[Any], spec: SamplerSpec, texts: Sequence[str]) -> dict[str, Tensor]:
    """What the text network is fed of each, [len(texts), L] int32 by name, as when it is served; long texts are cut."""
    reads = [replace(read, cut=True) for read in spec.text]
    found = [tokenise(tokenizers, text, "text", reads).feeds for text in texts]
    return {name: torch.tensor([each[name] for each in found], dtype=torch.int32) for name in found[0]}


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
    empty = {_empty_name(name): value for name, value in data.empty.items()}
    save_file({"latents": data.latents, **data.feeds, **empty}, path)


def load_latents(path: Path) -> Latents:
    """Errors: `DataError` where the file is missing, not safetensors, or lacks a tensor."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        feeds = {name: value for name, value in found.items() if name != "latents" and not name.startswith("empty")}
        empty = {name: found[_empty_name(name)] for name in feeds}
        return Latents(found["latents"], {"ids": found["ids"], **feeds}, empty)
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{path} is not a file of latents ({error}); delete it and it is made anew") from error


def _empty_name(name: str) -> str:
    return "empty" if name == "ids" else f"empty.{name}"


def write_pictures(folder: Path, pictures: Iterable[tuple[Image.Image, str]]) -> Path:
    """A folder as a user's, of pictures and their texts. `metadata.jsonl` comes last: where it is, the pictures are."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k, (picture, text) in enumerate(pictures):
        picture.save(folder / f"{k:03d}.png")
        rows.append(json.dumps({"file_name": f"{k:03d}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


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
