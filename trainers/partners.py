"""Networks of the players that learn beside a student: an encoder of its noise, an inverse of it, further scores.

Each for pictures and for the plane; the critic's are `trainers.critics`'.
"""

from typing import Any

from torch import Tensor, nn

from fewstep.models.bundle import Bundle
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import Path

from .errors import RecipeError
from .plane_net import PlaneNet, plane_student
from .proxy import LatentReward
from .recipe_forms import PLAIN
from .student import Student, build_student, is_unet

SCORES = ("winner", "loser")
"""Players that learn the score of some of the student's samples, as the fake does; told where its step began."""
TOLD = Student(second_time=True)


def picture_partner(name: str, recipe: str, teacher: Bundle) -> Any:
    """The network of the player `name`, from the teacher's weights: trainable, of the family's own class.

    Errors: `RecipeError` for a player that is not known or that this family has no network for.
    """
    if name == "inverse" or name in SCORES:
        return build_student(teacher, TOLD if name in SCORES else PLAIN, fold_scale=1.0)
    if name != "encoder":
        raise RecipeError(f"recipe {recipe!r} has a player {name!r}, and no network is known for it")
    if not is_unet(teacher):
        kind = teacher.config(teacher.family.folder)["_class_name"]
        raise RecipeError(
            f"recipe {recipe!r} has an encoder with twice a U-Net's outputs, and {teacher.name!r} is a {kind}; use ect"
        )
    return encoder_of(build_student(teacher, PLAIN, fold_scale=1.0))


def picture_proxy(teacher: Bundle) -> LatentReward:
    """A reward's proxy on the latents and the text states of the teacher.

    Errors: `RecipeError` for a denoiser that is no U-Net, whose width of these is not known here.
    """
    if not is_unet(teacher):
        raise RecipeError(f"a proxy is made for U-Nets, and {teacher.name!r} has none; set proxy=false")
    return LatentReward(teacher.spec.latent.channels, teacher.config("unet")["cross_attention_dim"])


def encoder_of(unet: Any) -> Any:
    """A U-Net made to answer twice its channels, all zero at first: the mean and deviation of a sample's noise."""
    last = unet.conv_out
    unet.conv_out = nn.Conv2d(last.in_channels, 2 * last.out_channels, last.kernel_size, padding=last.padding)
    for weight in (unet.conv_out.weight, unet.conv_out.bias):
        nn.init.zeros_(weight)
    return unet


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
    """The plane's network of the player `name`, from the weights of `start`. Errors: `RecipeError` as above."""
    if name not in ("encoder", "inverse", *SCORES):
        raise RecipeError(f"the plane has no network for a player {name!r}")
    net = plane_student(start, TOLD if name in SCORES else PLAIN, path=path, seed=seed)
    return PlaneEncoder(net) if name == "encoder" else net
