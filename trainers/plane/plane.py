"""The plane: a teacher of two-dimensional points in four classes, known in closed form, for comparing methods quickly.

Each class is a mixture of Gaussians of unequal weight; the classes lie among each other, so that guidance matters. A
point is [B, 2], a condition is `label` [B, 4], one-hot, and all zeros where no class is asked for. Nothing of this
teacher is learned: its denoiser is `E[x0 | x_t]` on any path.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fewstep.models.analytic import Mixture, mixture
from fewstep.models.denoiser import Condition, Denoiser, times
from fewstep.models.paths import VP, Path
from fewstep.models.predictions import target

from ..parts.objective import Batch, derive
from ..parts.times import clean
from ..parts.transitions import guided, pure_noise

PREDICTIONS = {"vp": "v", "edm": "x0", "flow": "flow", "trig": "trig"}
"""What networks of the plane say on each path; each is well scaled for data of unit deviation."""
MODES = (
    # class, x, y, deviation, weight within the class
    (0, -1.6, 1.2, 0.14, 0.45), (0, -0.5, 1.5, 0.14, 0.35), (0, 0.6, 1.2, 0.14, 0.20),
    (1, 1.5, 0.3, 0.12, 0.30), (1, 0.9, 0.9, 0.12, 0.25), (1, 0.2, 0.5, 0.12, 0.20), (1, 0.5, -0.3, 0.12, 0.15),
    (1, 1.2, -0.5, 0.12, 0.10),
    (2, -1.4, -1.2, 0.16, 0.40), (2, -0.6, -0.5, 0.10, 0.30), (2, 0.2, -1.2, 0.16, 0.20), (2, -0.6, -1.8, 0.10, 0.10),
    (3, -1.7, 0.1, 0.12, 0.35), (3, -0.9, 0.4, 0.12, 0.30), (3, 0.4, -0.6, 0.20, 0.25), (3, 1.5, -1.4, 0.12, 0.10),
)  # fmt: skip
CLASSES = 4


@dataclass(frozen=True)
class Plane:
    """All modes together, and which class each belongs to, [K]. All data have mean 0 and deviation 1 in each axis."""

    data: Mixture
    owner: Tensor

    @cached_property
    def shares(self) -> Tensor:
        """[CLASSES + 1, K]: each class's weights of the modes, and in the last row those of no class."""
        rows = [torch.where(self.owner == c, self.data.weights, 0.0) for c in range(CLASSES)]
        table = torch.stack([*rows, self.data.weights])
        return table / table.sum(1, keepdim=True)

    def of(self, label: Tensor) -> Mixture:
        """The data of each row's class; its weights are [B, K]."""
        none = 1.0 - label.sum(1, keepdim=True)
        return replace(self.data, weights=torch.cat([label, none], 1).double() @ self.shares)

    def draw(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """Points [B, 2] of the classes [B]."""
        chosen = torch.multinomial(self.shares[labels], 1, replacement=True, generator=rng)[:, 0]
        noise = torch.randn(len(labels), 2, generator=rng, dtype=torch.float64)
        return self.data.means[chosen] + self.data.stds[chosen] * noise

    def even(self, count: int, rng: torch.Generator) -> Tensor:
        """Points [CLASSES * count, 2], class by class, with the modes' shares exact up to one point."""
        found = []
        for c in range(CLASSES):
            edges = (self.shares[c].cumsum(0) * count).round().long()
            chosen = torch.searchsorted(edges, torch.arange(count), right=True)
            noise = torch.randn(count, 2, generator=rng, dtype=torch.float64)
            found.append(self.data.means[chosen] + self.data.stds[chosen] * noise)
        return torch.cat(found)

    def posterior(self, label: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], E[eps | x]), each [B, 2] float64: `models.analytic.posterior` of each row's class, twice as fast,
        since axes lead in its tables [2, B, K]."""
        a, s = alpha.double()[:, None], sigma.double()[:, None]
        means, square = self._axes
        apart = x.double().T[:, :, None] - a * means
        var = a**2 * square + s**2
        pull = apart / var
        share = torch.softmax(self.of(label).weights.log() - 0.5 * ((pull * apart).sum(0) + (var[0] * var[1]).log()), 1)
        pull = share * pull
        return share @ self.data.means + a * (pull * square).sum(2).T, s * pull.sum(2).T

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor]:
        """Means and variances of the modes, axes first: [2, 1, K]."""
        return self.data.means.T[:, None].contiguous(), (self.data.stds.T[:, None] ** 2).contiguous()

    def teacher(self, path: Path) -> Denoiser:
        """The perfect denoiser. It is asked at the class of each row, or at none."""
        prediction = PREDICTIONS[path.kind]

        def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            x0, eps = self.posterior(cond["label"], x, path.alpha(t), path.sigma(t))
            f: Tensor = target(prediction, path, t.double()[:, None], x0, eps)
            return f.to(x.dtype)

        return Denoiser(net, path, prediction)


def plane() -> Plane:
    """The plane of `MODES`, moved and scaled to mean 0 and deviation 1."""
    table = torch.tensor(MODES, dtype=torch.float64)
    owner, means, stds, weights = table[:, 0].long(), table[:, 1:3], table[:, 3:4], table[:, 4] / CLASSES
    mean = (weights[:, None] * means).sum(0)
    spread = (weights[:, None] * ((means - mean) ** 2 + stds**2)).sum(0).sqrt()
    return Plane(mixture((means - mean) / spread, stds / spread, weights), owner)


def conditions(labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the classes' condition, the condition that says nothing)."""
    label = torch.nn.functional.one_hot(labels, CLASSES).float()
    return {"label": label}, {"label": torch.zeros_like(label)}


class PlaneSource:
    """Batches as a pure function of (seed, step); also what pairs of a teacher take their classes from."""

    def __init__(self, data: Plane, batch: int, *, seed: int = 0) -> None:
        self.data, self.size, self.seed = data, batch, seed

    def batch(self, step: int) -> Batch:
        return self.gather(self.choose(step))

    def choose(self, step: int) -> Tensor:
        """[B, 2]: a class, and the seed of a point in it."""
        rng = torch.Generator().manual_seed(derive(self.seed, step, "plane"))
        labels = torch.randint(CLASSES, (self.size,), generator=rng)
        return torch.stack([labels, torch.full_like(labels, step)], 1)

    def gather(self, chosen: Tensor) -> Batch:
        labels = chosen[:, 0]
        rng = torch.Generator().manual_seed(derive(self.seed, int(chosen[0, 1]), "points"))
        cond, uncond = conditions(labels)
        return Batch(self.data.draw(labels, rng).float(), cond, uncond)


@torch.no_grad()
def teacher_points(data: Plane, labels: Tensor, w: float, steps: int, *, seed: int, path: Path | None = None) -> Tensor:
    """Points [B, 2] by `steps` first-order steps of the teacher's ODE (DDIM), guided at w, even in native time."""
    path = path or VP()
    cond, uncond = conditions(labels)
    scale = torch.full((len(labels),), w, dtype=torch.float64)
    teacher = data.teacher(path) if w == 1.0 else guided(data.teacher(path), uncond, scale)
    x = pure_noise(path, _noise(len(labels), seed))
    for t, to in _even(path, steps):
        x = teacher.jump(x, times(t, x), times(to, x), cond)
    return x


@torch.no_grad()
def reference_points(data: Plane, labels: Tensor, w: float, *, seed: int, steps: int = 100) -> Tensor:
    """What a student guided at w should give: the data where w = 1, else the guided ODE by `steps` steps of Heun.

    labels: as many of each class, in order. Modes have their exact shares, or noise is spread evenly (Sobol), so that
    the reference itself adds little to a distance.
    """
    path, each = VP(), len(labels) // CLASSES
    if w == 1.0:
        return data.even(each, torch.Generator().manual_seed(derive(seed, "reference")))
    cond, uncond = conditions(labels)
    teacher = guided(data.teacher(path), uncond, torch.full((len(labels),), w, dtype=torch.float64))
    even = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(each, dtype=torch.float64)
    x = torch.special.ndtri(even.clamp(1e-6, 1 - 1e-6)).repeat(CLASSES, 1)
    levels = torch.linspace(path.level(path.start) ** (1 / 7), path.level(path.end) ** (1 / 7), steps + 1).double() ** 7
    for high, low in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        t, s = times(path.time(high), x), times(path.time(low), x)
        x0, eps = teacher.both(x, t, cond)
        _, again = teacher.both(teacher.mix(x0, eps, s), s, cond)
        # dx/dlevel of x / alpha is eps: Heun's step of Karras et al. 2022
        x = float(path.alpha(path.time(low))) * (
            x / float(path.alpha(path.time(high))) + (low - high) * 0.5 * (eps + again)
        )
    return teacher.jump(x, times(path.end, x), times(clean(path), x), cond)


def _noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _even(path: Path, steps: int) -> list[tuple[float, float]]:
    """(t, where the step lands) of the "trailing" grid."""
    from ..parts.times import EvenGrids

    grid = EvenGrids((steps,)).of(path)[steps]
    return list(zip(grid, [*grid[1:], clean(path)], strict=True))
