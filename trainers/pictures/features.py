"""A small feature network for pictures, trained here on scenes: the eye behind Frechet distance and diversity.

An Inception network sees little in a 64x64 drawing. This one was trained to tell what a scene holds (objects, places,
background) and how worn the picture is (blur, noise), so its features move both when a picture shows the wrong thing
and when it shows it badly. `train_features` made the shipped weights: `python -m fewstep.trainers.pictures.features
OUT`.

Shapes: pictures [B, 3, H, W] uint8; features [B, 64], each with mean 0 and variance 1 over real scenes.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from . import scenes

FEATURES = 64
WEIGHTS = Path(__file__).parent / "reference_features.safetensors"
Net = TypeVar("Net", bound=nn.Module)
_PLACES = 4
"""Places are read on a grid of 4x4 cells."""
MAX_NOISE = 24.0
"""Strongest noise of the training pictures, standard deviation in units of 1/255."""


class FeatureNet(nn.Module):
    """Picture -> 64 features. Pictures of another size are resized to 64x64 first."""

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 72, 72)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(72, 48, 1), nn.SiLU(), nn.Flatten())
        self.out = nn.Linear(48 * (scenes.SIZE // 16) ** 2, FEATURES)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.out(self.body(as_input(pictures)))  # type: ignore[no-any-return]


def as_input(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, 64, 64] in [-1, 1]; floats are taken to be in that range already."""
    x = pictures.float().div(127.5).sub(1.0) if pictures.dtype == torch.uint8 else pictures
    if x.shape[-2:] != (scenes.SIZE, scenes.SIZE):
        x = functional.interpolate(x, (scenes.SIZE, scenes.SIZE), mode="bilinear", antialias=True, align_corners=False)
    return x


def load_features(file: Path = WEIGHTS) -> FeatureNet:
    """The shipped network, float32, ready for evaluation."""
    return read_half(FeatureNet(), file)


def read_half(net: Net, file: Path) -> Net:
    """The network with the weights that `write_half` wrote, float32, ready for evaluation."""
    net.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return net.requires_grad_(False).eval()


def write_half(net: nn.Module, file: Path) -> None:
    """Its weights in half precision, as safetensors."""
    save_file({name: value.half().contiguous() for name, value in net.state_dict().items()}, file)


def extract(net: FeatureNet, pictures: NDArray[np.uint8], batch: int = 256) -> Tensor:
    """Features [N, 64] of pictures [N, H, W, 3] uint8."""
    starts = range(0, len(pictures), batch)
    with torch.inference_mode():
        # a copy, since arrays of pictures may be read-only or views
        return torch.cat([net(torch.from_numpy(np.array(pictures[i : i + batch])).permute(0, 3, 1, 2)) for i in starts])


def train_features(
    out: Path = WEIGHTS,
    *,
    scenes_drawn: int = 24_000,
    steps: int = 8_000,
    batch: int = 64,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> FeatureNet:
    """Train the network from nothing and write it to `out` (safetensors, half precision).

    The task is to name what a scene holds and how worn the picture is; the head that answers is thrown away. Afterwards
    the last layer is rescaled so that each feature has mean 0 and variance 1 on scenes that were not trained on.
    """
    torch.manual_seed(seed)
    pictures, answers = _draw(scenes_drawn, seed)
    held_out = _draw(min(2_000, scenes_drawn), seed + 1)
    net, head = FeatureNet(), nn.Linear(FEATURES, answers.shape[1] + 2)
    weights = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        chosen = torch.randint(len(pictures), (batch,))
        worn, amounts = wear(as_input(pictures[chosen]))
        said = head(net(worn))
        loss = functional.binary_cross_entropy_with_logits(said[:, :-2], answers[chosen]) * 10
        loss = loss + functional.mse_loss(said[:, -2:], amounts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            report(f"step {step}: loss {loss.item():.4f}, {_accuracy(net, head, *held_out)}")
    _standardise(net, held_out[0])
    write_half(net, out)
    return load_features(out)


def scene_answers(scene: scenes.Scene) -> Tensor:
    """What the network learns to say of a scene, 0 or 1 each: background, count, and per object its kinds and places.

    [5 + 3 + 48 shape-colour pairs + 12 shape-size pairs + 16 cells + 24 shape-quadrants + 32 colour-quadrants].
    """
    shapes, colours, sizes = scenes.SHAPES, tuple(scenes.COLOURS), tuple(scenes.RADII)
    ground, count = torch.zeros(len(scenes.BACKGROUNDS)), torch.zeros(3)
    ground[list(scenes.BACKGROUNDS).index(scene.background)] = 1
    count[len(scene.objects) - 1] = 1
    pairs, sized = torch.zeros(len(shapes), len(colours)), torch.zeros(len(shapes), len(sizes))
    cells = torch.zeros(_PLACES, _PLACES)
    shape_at, colour_at = torch.zeros(len(shapes), 2, 2), torch.zeros(len(colours), 2, 2)
    for thing in scene.objects:
        s, c = shapes.index(thing.shape), colours.index(thing.colour)
        row, column = int(thing.y * _PLACES / scenes.SIZE), int(thing.x * _PLACES / scenes.SIZE)
        pairs[s, c] = sized[s, sizes.index(thing.size)] = cells[row, column] = 1
        shape_at[s, row // 2, column // 2] = colour_at[c, row // 2, column // 2] = 1
    return torch.cat([part.flatten() for part in (ground, count, pairs, sized, cells, shape_at, colour_at)])


def _draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(pictures [N, 3, 64, 64] uint8, answers [N, A]) of fresh scenes."""
    rng = random.Random(seed)
    drawn = [scenes.sample(rng).scene for _ in range(count)]
    return rendered(drawn), torch.stack([scene_answers(scene) for scene in drawn])


def rendered(drawn: Sequence[scenes.Scene]) -> Tensor:
    """The pictures of scenes, [N, 3, 64, 64] uint8."""
    pictures = torch.from_numpy(np.stack([np.asarray(scenes.render(scene)) for scene in drawn]))
    return pictures.permute(0, 3, 1, 2).contiguous()


def wear(clean: Tensor, strongest: float = MAX_NOISE) -> tuple[Tensor, Tensor]:
    """Blur and noise half of the pictures, each by its own amount. Returns them and the amounts [B, 2] in 0..1.

    strongest: the noise of amount 1, standard deviation in units of 1/255.
    """
    amounts = torch.rand(len(clean), 2) * (torch.rand(len(clean), 2) < 0.5)
    blur, noise = amounts[:, 0, None, None, None], amounts[:, 1, None, None, None]
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (line[:, None] * line).expand(3, 1, 5, 5)
    soft = functional.conv2d(functional.pad(clean, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    worn = clean + blur * (soft - clean)
    return worn + noise * (strongest / 127.5) * torch.randn_like(clean), amounts


@torch.inference_mode()
def _accuracy(net: FeatureNet, head: nn.Module, pictures: Tensor, answers: Tensor) -> str:
    said = head(torch.cat([net(part) for part in pictures.split(256)]))[:, :-2] > 0
    right = (said == (answers > 0.5)).float()
    pairs = right[:, 8:56].amin(1).mean()
    return f"held-out answers right {right.mean():.4f}, all shape-colour pairs of a picture right {pairs:.3f}"


@torch.inference_mode()
def _standardise(net: FeatureNet, pictures: Tensor) -> None:
    """Fold mean 0 and variance 1 over these pictures into the last layer."""
    features = torch.cat([net(part) for part in pictures.split(256)])
    mean, std = features.mean(0), features.std(0)
    net.out.weight.div_(std[:, None])
    net.out.bias.sub_(mean).div_(std)


if __name__ == "__main__":
    import sys

    train_features(Path(sys.argv[1]))
