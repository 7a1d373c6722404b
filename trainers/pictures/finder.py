"""A network that finds the objects of a scene: how many of each kind, and where. The reward `objects` looks through it.

Compliance is measured by a geometric reader without a gradient (`compliance`). This network has one, and shares nothing
with that reader but the data's words: it learned from scenes as they are drawn and as the shipped autoencoder gives
them back, blurred and noised, what they hold. Half of them are crowds that no caption speaks of: a network that knows
captioned scenes alone takes two stars beside a ring for one, and students that please it draw both. `train_finder` made
the shipped weights: `python -m fewstep.trainers.pictures.finder OUT`.

Shapes: pictures [B, 3, H, W]; K = 48 kinds, a colour and a shape each; C = 64 cells of 8 by 8 pixels; centres in pixels
of a 64x64 scene. No cell holds the centres of two objects, as these stand further apart.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.models.bundle import Bundle, load_bundle

from . import scenes
from .features import as_input, read_half, rendered, wear, write_half

WEIGHTS = Path(__file__).parent / "reference_finder.safetensors"
KINDS = tuple((colour, shape) for colour in scenes.COLOURS for shape in scenes.SHAPES)
MOST = 4
"""Objects of one kind that are told apart by number; more count as so many."""
STRONGEST_NOISE = 64.0
"""Of the training pictures, in units of 1/255: no answer hangs on a few pixels then, and the gradient is broad."""
CELL = 8
"""Pixels to a cell's side: two objects are at least 17 apart."""
_WIDTH, _DEPTH = 80, 4


@dataclass(frozen=True)
class Found:
    """held: [B, C, K + 1], log-probabilities of what has its centre in a cell: one of each kind, or, last, nothing.
    centres: [B, C, 2], x and y of that centre."""

    held: Tensor
    centres: Tensor

    def counts(self) -> Tensor:
        """Probabilities [B, K, 5] of 0, 1, 2, 3, or more objects of a kind, cells being independent."""
        odds = self.held[..., :-1].exp()
        none = torch.ones_like(odds[:, 0])
        share = [none, *[torch.zeros_like(none)] * MOST]
        for here in odds.unbind(1):
            last = share[-1] + here * share[-2]
            share = [
                one * (1.0 - here) + (0.0 if n == 0 else here * share[n - 1]) for n, one in enumerate(share[:-1])
            ]  # fmt: skip
            share.append(last)
        return torch.stack(share, 2)

    def places(self) -> Tensor:
        """[B, K, 2]: the mean over cells of where an object of a kind has its centre; for one that is there once."""
        odds = self.held[..., :-1].exp() + 1e-6
        return torch.einsum("bck,bcd->bkd", odds / odds.sum(1, keepdim=True), self.centres)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


class ObjectFinder(nn.Module):
    """Pictures -> `Found`. Pictures of another size are resized to 64x64 first."""

    def __init__(self) -> None:
        super().__init__()
        side = scenes.SIZE // CELL
        self.enter = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.Conv2d(64, _WIDTH, 3, stride=2, padding=1),
        )  # fmt: skip
        self.places = nn.Parameter(torch.zeros(1, _WIDTH, side, side))
        self.body = nn.Sequential(*(_Block(_WIDTH) for _ in range(_DEPTH)), nn.GroupNorm(8, _WIDTH), nn.SiLU())
        self.what = nn.Conv2d(_WIDTH, len(KINDS) + 1, 1)
        self.where = nn.Conv2d(_WIDTH, 2, 1)

    def forward(self, pictures: Tensor) -> Found:
        seen = self.body(self.enter(as_input(pictures)) + self.places)
        held = self.what(seen).float().flatten(2).transpose(1, 2).log_softmax(2)
        within = self.where(seen).float().sigmoid().flatten(2).transpose(1, 2)
        return Found(held, CELL * (within + corners().to(within)))


def corners() -> Tensor:
    """[C, 2]: x and y of each cell's corner, in cells."""
    along = torch.arange(scenes.SIZE // CELL, dtype=torch.float32)
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def load_finder(file: Path = WEIGHTS) -> ObjectFinder:
    """The shipped network, float32, ready for evaluation."""
    return read_half(ObjectFinder(), file)


@dataclass(frozen=True)
class _Scenes:
    """pictures [N, 3, 64, 64] uint8; held [N, C] and centres [N, C, 2], as `answers` has them."""

    pictures: Tensor
    held: Tensor
    centres: Tensor


def train_finder(
    out: Path = WEIGHTS,
    *,
    teacher: Bundle | None = None,
    scenes_drawn: int = 20_000,
    steps: int = 1_500,
    batch: int = 128,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> ObjectFinder:
    """Train the network from nothing and write it to `out` (safetensors, half precision).

    teacher: whose autoencoder every second scene passes through; the shipped one if None.
    """
    torch.manual_seed(seed)
    data = _draw(scenes_drawn, seed, load_bundle("scenes-teacher") if teacher is None else teacher)
    kept = max(1, min(1_000, scenes_drawn // 10))
    net = ObjectFinder().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.02)
    for step in range(steps):
        pace = min(1.0, (step + 1) / 100) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * pace
        rows = torch.randint(len(data.pictures) - kept, (batch,))
        worn, _ = wear(as_input(data.pictures[rows]), STRONGEST_NOISE)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(worn.contiguous(memory_format=torch.channels_last))
        loss = finding_loss(found, data.held[rows], data.centres[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 249 or step == steps - 1:
            report(f"step {step + 1}: loss {loss.item():.3f}, {_accuracy(net, data, kept)}")
    net = net.to(memory_format=torch.contiguous_format)
    write_half(net, out)
    return load_finder(out)


def finding_loss(found: Found, held: Tensor, centres: Tensor) -> Tensor:
    """Cross-entropy of all cells of a picture, and how far off its centres are, in twentieths of a pixel."""
    missed = functional.nll_loss(found.held.flatten(0, 1), held.flatten(), reduction="sum") / len(held)
    there = held < len(KINDS)
    return missed + 0.05 * (found.centres - centres).abs().sum(2)[there].sum() / there.sum().clamp(min=1)


def answers(scene: scenes.Scene) -> tuple[Tensor, Tensor]:
    """What is to be found in a scene: held [C], the kind with its centre in each cell, K for none; centres [C, 2]."""
    side = scenes.SIZE // CELL
    held, centres = torch.full((side**2,), len(KINDS)), torch.zeros(side**2, 2)
    for thing in scene.objects:
        cell = int(thing.y // CELL) * side + int(thing.x // CELL)
        held[cell] = KINDS.index((thing.colour, thing.shape))
        centres[cell] = torch.tensor([thing.x, thing.y])
    return held, centres


@torch.inference_mode()
def _draw(count: int, seed: int, teacher: Bundle) -> _Scenes:
    rng = random.Random(seed)
    drawn = [scenes.crowd(rng) if k % 4 > 1 else scenes.sample(rng).scene for k in range(count)]
    pictures = rendered(drawn)
    encoder, decoder = teacher.encoder(), teacher.decoder()
    for start in range(0, count, 128):
        some = pictures[start : start + 128 : 2]
        again = decoder(encoder(as_input(some))).clamp(-1.0, 1.0)
        pictures[start : start + 128 : 2] = again.add(1.0).mul(127.5).round().byte()
    held, centres = zip(*(answers(scene) for scene in drawn), strict=True)
    return _Scenes(pictures, torch.stack(held), torch.stack(centres))


@torch.inference_mode()
def _accuracy(net: ObjectFinder, data: _Scenes, kept: int) -> str:
    said = [net(as_input(part)) for part in data.pictures[-kept:].split(256)]
    held, centres = torch.cat([s.held for s in said]), torch.cat([s.centres for s in said])
    exact = (kinds_in(held.argmax(2)) == kinds_in(data.held[-kept:])).all(1).float().mean()
    there = data.held[-kept:] < len(KINDS)
    off = (centres - data.centres[-kept:]).abs()[there].mean()
    return f"held-out scenes with all counts right {exact:.3f}, centres {off:.2f} pixels off"


def kinds_in(held: Tensor) -> Tensor:
    """[N, K]: how many objects of each kind the cells [N, C] hold."""
    return functional.one_hot(held, len(KINDS) + 1).sum(1)[:, :-1]


if __name__ == "__main__":
    import sys

    train_finder(Path(sys.argv[1]))
