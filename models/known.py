"""What published checkpoints do not state in their folders, by name: `fewstep import --as NAME`.

A folder says its networks and a scheduler, but not for which step counts it was made, nor whether guidance is still to
be applied. The answers here are those of the model cards and papers named in `source`; nothing is applied unasked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import BundleError
from .spec import Guidance

NONE = Guidance(mode="none")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the user states of a checkpoint; None and empty where the folder itself is to say it.

    steps: the step counts it is for. guidance: its mode, default and range. sampler: in place of the folder's
    scheduler. grids: times in place of the scheduler's. prediction: in place of the scheduler's. gamma: TCD's.
    """

    steps: tuple[int, ...] = ()
    guidance: Guidance | None = None
    sampler: str | None = None
    grids: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    prediction: str | None = None
    gamma: float | None = None
    source: str = ""


def _cfg(default: float, high: float = 20.0) -> Guidance:
    return Guidance(mode="cfg", default=default, range=(1.0, high))


def _embedded(default: float, low: float, high: float) -> Guidance:
    return Guidance(mode="embedded", default=default, range=(low, high))


_TEACHER = tuple(range(1, 51))
KNOWN: dict[str, Answers] = {
    "sd15": Answers(steps=_TEACHER, guidance=_cfg(7.5), sampler="ddim", source="runwayml/stable-diffusion-v1-5"),
    "sd21": Answers(steps=_TEACHER, guidance=_cfg(7.5), sampler="ddim", source="stabilityai/stable-diffusion-2-1"),
    "sd-turbo": Answers(steps=(1, 2, 4), guidance=NONE, source="stabilityai/sd-turbo; Sauer et al. 2023"),
    "lcm": Answers(
        steps=(1, 2, 4, 8), guidance=_embedded(8.5, 1.0, 15.0), source="SimianLuo/LCM_Dreamshaper_v7; Luo et al. 2023"
    ),
    "lcm-sdxl": Answers(
        steps=(1, 2, 4, 8), guidance=_embedded(8.0, 1.0, 13.0), sampler="lcm", source="latent-consistency/lcm-sdxl"
    ),
    "lcm-lora": Answers(
        steps=(1, 2, 4, 8), guidance=_cfg(1.0, 2.0), sampler="lcm", source="latent-consistency/lcm-lora-sdv1-5"
    ),
    "tcd-lora": Answers(
        steps=(1, 2, 4, 8), guidance=NONE, sampler="tcd", gamma=0.3, source="h1t/TCD-SDXL-LoRA; Zheng et al. 2024"
    ),
    "sdxl": Answers(steps=_TEACHER, guidance=_cfg(5.0), source="stabilityai/stable-diffusion-xl-base-1.0"),
    "ssd-1b": Answers(steps=_TEACHER, guidance=_cfg(9.0), source="segmind/SSD-1B"),
    "sdxl-turbo": Answers(steps=(1, 2, 4), guidance=NONE, source="stabilityai/sdxl-turbo; Sauer et al. 2023"),
    "lightning-1": Answers(
        steps=(1,), guidance=NONE, sampler="euler", prediction="x0", source="ByteDance/SDXL-Lightning, 1 step"
    ),
    "lightning-2": Answers(steps=(2,), guidance=NONE, sampler="euler", source="ByteDance/SDXL-Lightning, 2 steps"),
    "lightning-4": Answers(steps=(4,), guidance=NONE, sampler="euler", source="ByteDance/SDXL-Lightning, 4 steps"),
    "lightning-8": Answers(steps=(8,), guidance=NONE, sampler="euler", source="ByteDance/SDXL-Lightning, 8 steps"),
    "dmd2-4": Answers(
        steps=(4,), guidance=NONE, sampler="lcm", grids={4: (999.0, 749.0, 499.0, 249.0)},
        source="tianweiy/DMD2, dmd2_sdxl_4step",
    ),
    "dmd2-1": Answers(
        steps=(1,), guidance=NONE, sampler="lcm", grids={1: (399.0,)}, source="tianweiy/DMD2, dmd2_sdxl_1step"
    ),
    "hyper-sd-2": Answers(steps=(2,), guidance=NONE, sampler="ddim", source="ByteDance/Hyper-SD, 2-step LoRA"),
    "hyper-sd-4": Answers(steps=(4,), guidance=NONE, sampler="ddim", source="ByteDance/Hyper-SD, 4-step LoRA"),
    "hyper-sd-8": Answers(steps=(8,), guidance=NONE, sampler="ddim", source="ByteDance/Hyper-SD, 8-step LoRA"),
    "pixart-alpha": Answers(steps=_TEACHER, guidance=_cfg(4.5), source="PixArt-alpha/PixArt-XL-2-1024-MS"),
    "pixart-sigma": Answers(steps=_TEACHER, guidance=_cfg(4.5), source="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    "pixart-lcm": Answers(
        steps=(1, 2, 4, 8), guidance=NONE, sampler="lcm", source="PixArt-alpha/PixArt-LCM-XL-2-1024-MS"
    ),
    "sana": Answers(steps=_TEACHER, guidance=_cfg(4.5), source="Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
    "sana-sprint": Answers(
        steps=(1, 2, 4), guidance=_embedded(4.5, 1.0, 20.0), source="Efficient-Large-Model/Sana_Sprint_1.6B_1024px"
    ),
    "sd3": Answers(steps=_TEACHER, guidance=_cfg(7.0), source="stabilityai/stable-diffusion-3-medium-diffusers"),
    "sd35-turbo": Answers(steps=(1, 2, 4, 8), guidance=NONE, source="stabilityai/stable-diffusion-3.5-large-turbo"),
    "flux-schnell": Answers(steps=(1, 2, 4), guidance=NONE, source="black-forest-labs/FLUX.1-schnell"),
    "flux-dev": Answers(
        steps=_TEACHER, guidance=_embedded(3.5, 1.0, 10.0), source="black-forest-labs/FLUX.1-dev"
    ),
    "z-image": Answers(steps=_TEACHER, guidance=_cfg(6.0), source="Tongyi-MAI/Z-Image; diffusers' 5.0 plus 1"),
    "z-image-turbo": Answers(steps=(1, 2, 4, 8), guidance=NONE, source="Tongyi-MAI/Z-Image-Turbo"),
}  # fmt: skip
FAMILIES: dict[str, tuple[str, ...]] = {
    "sd": ("sd15", "sd21", "sd-turbo", "lcm", "lcm-lora", "tcd-lora", "hyper-sd-4"),
    "sdxl": (
        "sdxl", "sdxl-turbo", "ssd-1b", "lcm-sdxl", "lcm-lora", "tcd-lora", "lightning-4", "dmd2-4", "dmd2-1",
        "hyper-sd-4",
    ),
    "pixart": ("pixart-alpha", "pixart-sigma", "pixart-lcm"),
    "sana": ("sana",),
    "sana-sprint": ("sana-sprint",),
    "sd3": ("sd3", "sd35-turbo"),
    "flux-schnell": ("flux-schnell",),
    "flux-dev": ("flux-dev",),
    "z-image": ("z-image-turbo", "z-image"),
}  # fmt: skip
"""Family name -> what a folder of it may be."""


def known(name: str) -> Answers:
    """Errors: `BundleError` listing the names."""
    if name not in KNOWN:
        raise BundleError(f"--as is {name!r}; known checkpoints are {', '.join(KNOWN)}")
    return KNOWN[name]


def suggestion(family: str) -> str:
    """What to say where a folder does not tell what it is."""
    names = FAMILIES.get(family, ())
    return f"say --as NAME if it is one of {', '.join(names)}" if names else "no known checkpoint is of this family"
