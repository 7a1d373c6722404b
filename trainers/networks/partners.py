"""Networks of the players that learn beside a student: an encoder of its noise, an inverse of it, further scores.

The critic's are `trainers.networks.critics`'; the plane's own `trainers.plane.partners`'.
"""

from typing import Any

from torch import nn

from fewstep.models.bundle import Bundle

from ..errors import RecipeError
from .proxy import LatentReward
from .student import PLAIN, Student, build_student, is_unet

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
