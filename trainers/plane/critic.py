"""Critics of points, one for each kind of features that critics of pictures have (`trainers.networks.critics`)."""

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Condition

from ..networks.critics import ENCODER, MIDDLE, STEP_WAVES, TEACHER, CriticPlan, head_of, step_waves
from .net import PlaneNet
from .plane import CLASSES

SEEN = 64
"""Random features of a point."""


class PlaneFake(nn.Module):
    """A fake score, and a critic on its features."""

    def __init__(self, net: PlaneNet, plan: CriticPlan = MIDDLE) -> None:
        super().__init__()
        self.net, self.plan = net, plan
        self.head: nn.Sequential | nn.ModuleList | None
        if plan.features == ENCODER:
            self.head = None
        elif plan.depths == MIDDLE.depths:
            self.head = nn.Sequential(nn.SiLU(), nn.Linear(net.width, net.width), nn.SiLU(), nn.Linear(net.width, 1))
        else:
            self.head = nn.ModuleList(_head(net.width, 0) for _ in range(len(net.blocks)))

    def judge(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Logits [B] or [B, heads]; positive means real."""
        if isinstance(self.head, nn.ModuleList):
            found = hidden_states(self.net, x, t, cond)
            only = head_of(self.plan, cond)
            pairs = list(zip(self.head, found, strict=True))
            return torch.cat([head(h) for head, h in (pairs if only is None else pairs[only : only + 1])], 1)
        h = hidden_states(self.net, x, t, cond)[-1]
        if self.head is None:
            return h.mean(1)
        logits: Tensor = self.head(h)[:, 0]
        return logits


class PlaneCritic(nn.Module):
    """Heads on features of a network that does not train: the start's blocks, or random ones of points."""

    def __init__(self, plan: CriticPlan, start: PlaneNet) -> None:
        super().__init__()
        self.plan = plan
        self._outside = (start.requires_grad_(False) if plan.features == TEACHER else RandomEye(),)
        widths = [start.width] * len(start.blocks) if plan.features == TEACHER else [2 * SEEN] * 2
        self.span = start.path.start
        told = CLASSES * plan.text + STEP_WAVES * plan.step
        self.head = nn.ModuleList(_head(width, told) for width in widths)

    def judge(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Logits [B, heads]."""
        return self.answer(self.features(x, t, cond), cond)

    def features(self, x: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        eye: Any = self._outside[0]
        return hidden_states(eye, x, t, cond) if isinstance(eye, PlaneNet) else eye.see(x)

    def answer(self, features: list[Tensor], cond: Condition) -> Tensor:
        told = [cond["label"].float()] if self.plan.text else []
        told += [step_waves(cond["s"], self.span)] if self.plan.step else []
        return torch.cat([head(torch.cat([h, *told], 1)) for head, h in zip(self.head, features, strict=True)], 1)


class RandomEye:
    """Random Fourier features at two scales (Rahimi & Recht 2007), each [B, 2 SEEN]: it stands for a vision network."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.waves = [scale * torch.randn(2, SEEN, generator=rng) for scale in (1.0, 4.0)]

    def see(self, x: Tensor) -> list[Tensor]:
        found = [x.float() @ waves for waves in self.waves]
        return [torch.cat([angle.cos(), angle.sin()], 1) for angle in found]


def hidden_states(net: PlaneNet, x: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
    """[B, width] after each block."""
    path = net.path
    size = (path.alpha(t) ** 2 + path.sigma(t) ** 2).sqrt()[:, None]
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda module, args, out: found.append(out)) for block in net.blocks]
    try:
        net.hidden((x.double() / size).float(), t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _head(width: int, told: int) -> nn.Sequential:
    inner = 96
    return nn.Sequential(
        nn.Linear(width + told, inner), nn.LeakyReLU(0.2), nn.Linear(inner, inner), nn.LeakyReLU(0.2),
        nn.Linear(inner, 1),
    )  # fmt: skip
