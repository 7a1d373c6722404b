"""The one small network of the plane, the same for every method: teacher-like start, student, average, fake score.

It works on the angle of the noise: with u = x / hypot(alpha, sigma) and tan(angle) = sigma / alpha every path is
`u = cos x0 + sin eps`, and the body answers `cos eps - sin x0`, which is of unit size. So one body serves every path
and prediction, starts alike on all of them, and can be differentiated in time.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import Path
from fewstep.models.predictions import target

from ..errors import RecipeError
from ..networks.student import Student
from .plane import CLASSES, PREDICTIONS

WIDTH, BLOCKS, WAVES, SCALES, CONTROLS = 96, 3, 6, 3, 7
LOWEST = math.log(1e-3)
"""Of the log of sigma / alpha that time features look at; clean data counts as this."""


class PlaneNet(nn.Module):
    """F [B, 2] of x [B, 2], t [B], `label` [B, 4], and where it takes them `w` [B] and a second time `s` [B].

    At a time below 0 it answers as at -t, and is told so. A fresh input of w or s changes nothing at first: its
    projection starts at zero. adapter_width: of parts beside each block that know w, the time and the label, as
    pictures' networks have beside each cross-attention. avoids: whether
    these also know `neg_label` [B, 4], a class to avoid, no class where none is told. takes_control: whether it reads
    `control` [B, 1], a coordinate (`trainers.plane.control`).
    """

    def __init__(
        self, path: Path, *, width: int = WIDTH, takes_w: bool = False, takes_s: bool = False,
        adapter_width: int | None = None, avoids: bool = False, takes_control: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.path, self.width = path, width
        features = 4 * WAVES + 1
        self.enter = nn.Linear(2 + CLASSES, width)
        self.time = nn.Linear(features, width)
        self.scale = _silent(SCALES, width) if takes_w else None
        self.second = _silent(features, width) if takes_s else None
        self.control = _silent(CONTROLS, width) if takes_control else None
        self.blocks = nn.ModuleList(_Block(width) for _ in range(BLOCKS))
        self.avoids = avoids
        told = SCALES + features + CLASSES * (1 + avoids)
        each = range(BLOCKS if adapter_width else 0)
        self.adapters = nn.ModuleList(_Adapter(width, told, adapter_width or 0) for _ in each)
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        t, side = _two_sided(t)
        alpha, sigma = self._coefficients(t)
        size = (alpha**2 + sigma**2).sqrt()
        cos, sin = alpha / size, sigma / size
        u = x.double() / size
        v = self.leave(self._body(u.float(), alpha, side * sigma, cond)).double()
        f: Tensor = target(
            PREDICTIONS[self.path.kind], self.path, t.double()[:, None], cos * u - sin * v, sin * u + cos * v
        )
        return f.to(x.dtype)

    def hidden(self, u: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """[B, width] before the last layer; u [B, 2] is the point on the unit path."""
        return self._body(u, *self._coefficients(t), cond)

    def _body(self, u: Tensor, alpha: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        waves = _waves(alpha, sigma)
        h: Tensor = self.enter(torch.cat([u, cond["label"].float()], 1)) + self.time(waves)
        if self.scale is not None:
            h = h + self.scale(_scale_features(u, cond))
        if self.second is not None:
            h = h + self.second(_waves(*self._coefficients(cond["s"])) if "s" in cond else waves)
        if self.control is not None:
            h = h + self.control(_control_features(cond["control"].float()))
        for k, block in enumerate(self.blocks):
            h = block(h)
            if self.adapters:
                told = [_scale_features(u, cond), waves, cond["label"].float()]
                if self.avoids:
                    told.append(cond.get("neg_label", torch.zeros_like(cond["label"])).float())
                h = h + self.adapters[k](h, torch.cat(told, 1))
        return h

    def denoiser(self) -> Denoiser:
        return Denoiser(self, self.path, PREDICTIONS[self.path.kind])

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.path.alpha(t.double())[:, None], self.path.sigma(t.double())[:, None]


def plane_student(start: PlaneNet, plan: Student, *, path: Path, seed: int, fresh: bool = False) -> PlaneNet:
    """A trainable network that begins as `start`, with the inputs and the LoRA that the plan asks for.

    fresh: begin with random weights instead.

    Errors: `RecipeError` for surgery that only pictures' networks know.
    """
    asked = [name for name in ("cut", "remove", "runs", "probe", "width") if getattr(plan, name)]
    if asked or plan.attention != "softmax":
        raise RecipeError(f"the plane's network has no blocks to change; it cannot follow {asked or ['attention']}")
    torch.manual_seed(seed)
    net = PlaneNet(
        path, width=start.width, takes_w=plan.guidance_width is not None, takes_s=plan.second_time,
        adapter_width=start.width if plan.negative else plan.adapter_width, avoids=plan.negative,
        takes_control=plan.control,
    )  # fmt: skip
    if not fresh:
        net.load_state_dict(plain_state(start), strict=False)
    if plan.adapter_width is not None or plan.negative:
        net.requires_grad_(False)
        net.adapters.requires_grad_(True)
    for block in net.blocks if plan.frozen else ():
        assert isinstance(block, _Block)
        block.body[3].requires_grad_(False)  # what a block's projections are among points
    if plan.lora_rank is not None:
        from peft import LoraConfig, inject_adapter_in_model

        named = [name for name, part in net.named_modules() if isinstance(part, nn.Linear)]
        net.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=plan.lora_rank, lora_alpha=plan.lora_rank, target_modules=named), net)
    return net


def plain_state(net: PlaneNet) -> dict[str, Tensor]:
    """The network's weights with any LoRA added into them, under their plain names."""
    from peft.tuners.lora import LoraLayer

    found = deepcopy(net)
    for part in found.modules():
        if isinstance(part, LoraLayer):
            part.merge()
    state = found.state_dict()
    return {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.body(h)
        return out


class _Adapter(nn.Module):
    """What a hidden state and what it is told say together; nothing at first."""

    def __init__(self, width: int, told: int, inner: int) -> None:
        super().__init__()
        self.told, self.body = nn.Linear(told, inner), nn.Linear(width, inner)
        self.leave = _silent(inner, width)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        out: Tensor = self.leave(nn.functional.silu(self.body(h) + self.told(told)))
        return out


def _scale_features(like: Tensor, cond: Condition) -> Tensor:
    """Features [B, SCALES] of the guidance scale, 1 where none is told."""
    w = cond["w"].float()[:, None] if "w" in cond else torch.ones_like(like[:, :1])
    return torch.cat([w / 4.0, w.clamp(min=0.1).log(), (w / 4.0) ** 2], 1)


def _control_features(control: Tensor) -> Tensor:
    """[B, CONTROLS] of a coordinate [B, 1]."""
    waves = torch.tensor([1.0, 2.0, 4.0], device=control.device) * control
    return torch.cat([control, waves.sin(), waves.cos()], 1)


def _silent(inputs: int, width: int) -> nn.Linear:
    layer = nn.Linear(inputs, width, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def _two_sided(t: Tensor) -> tuple[Tensor, Tensor]:
    """(|t| [B], the sign of t [B, 1]); clean data, which may lie at minus infinity, is not asked about."""
    return t.abs(), torch.where(t < 0, -1.0, 1.0).double()[:, None]


def _waves(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Features [B, 4 WAVES + 1] of a time: waves of the noise's angle, and of the log of sigma / alpha.

    A sigma below 0 is the same noise on the twin's side: its angle turns the other way.
    """
    angle = torch.atan2(sigma, alpha).float()
    ratio = sigma.abs().clamp(min=1e-30).log() - alpha.clamp(min=1e-30).log()
    level = (ratio.clamp(LOWEST, -LOWEST) / -LOWEST).float()
    order = torch.arange(1, WAVES + 1, dtype=torch.float32)
    by_angle, by_level = order * angle, order * level * 2.0
    return torch.cat([by_angle.cos(), by_angle.sin(), by_level.cos(), by_level.sin(), level], 1)
