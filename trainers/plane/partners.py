"""The plane's networks beside the student: an encoder of its noise, an inverse, further scores, a reward's proxy."""

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import Path

from ..errors import RecipeError
from ..networks.partners import SCORES, TOLD
from ..networks.student import PLAIN
from .net import PlaneNet, plane_student
from .plane import CLASSES
from .sources import part_of


class PlaneEncoder(nn.Module):
    """The plane's network with four outputs, all zero at first."""

    def __init__(self, net: PlaneNet) -> None:
        super().__init__()
        self.net, self.leave = net, nn.Linear(net.width, 4)
        for weight in (self.leave.weight, self.leave.bias):
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        out: Tensor = self.leave(self.net.hidden(x.float(), t, cond)).to(x.dtype)
        return out

    def denoiser(self) -> Denoiser:
        return Denoiser(self, self.net.path, self.net.denoiser().prediction)


def plane_partner(name: str, start: PlaneNet, *, path: Path, seed: int) -> PlaneEncoder | PlaneNet:
    """The plane's network of the player `name`, from the weights of `start`. Errors: `RecipeError` for a player that it
    has none for."""
    if name not in ("encoder", "inverse", *SCORES):
        raise RecipeError(f"the plane has no network for a player {name!r}")
    net = plane_student(start, TOLD if name in SCORES else PLAIN, path=path, seed=seed)
    return PlaneEncoder(net) if name == "encoder" else net


class PlaneReward(nn.Module):
    """A reward's proxy on points: a network of three layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = [nn.Linear(2 + CLASSES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        out: Tensor = self.body(torch.cat([x.float(), cond["label"].float()], 1))[:, 0]
        return out


class Routed(torch.nn.Module):
    """Networks of the plane, each asked for its own classes."""

    def __init__(self, nets: list[Any]) -> None:
        super().__init__()
        self.nets = torch.nn.ModuleList(nets)
        self.path, self.control = nets[0].path, nets[0].control

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        owner = torch.tensor([part_of(int(c), len(self.nets)) for c in cond["label"].argmax(1)], device=x.device)
        found = torch.zeros_like(x)
        for k, net in enumerate(self.nets):
            rows = owner == k
            if bool(rows.any()):
                found[rows] = net(x[rows], t[rows], {name: value[rows] for name, value in cond.items()})
        return found
