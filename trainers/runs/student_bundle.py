"""The student as a bundle: its sampling contract, and a diffusers folder around its denoiser."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.models.adopting import adopt_negative
from fewstep.models.altered import library_of
from fewstep.models.bundle import Bundle, seal_bundle
from fewstep.models.net_negative import Negative
from fewstep.models.pipeline_folder import read_index
from fewstep.models.schedulers import PREDICTION_TYPES
from fewstep.models.spec import Guidance, SamplerSpec

from ..errors import RecipeError
from ..networks.student import merged, save_lora
from ..recipes.recipe import Recipe, Sampling
from .folders import in_place_of


def student_spec(recipe: Recipe, teacher: Bundle) -> SamplerSpec:
    """The student's contract: what the recipe decides, and the teacher's wherever it decides nothing."""
    s, t = recipe.sampling, teacher.spec
    fresh: dict[str, Any] = {"recipe": recipe.name, "teacher": teacher.name, "quality": (), "golden": ()}
    fresh["tiny_decoder"] = ()
    if s is None:
        return replace(t, **fresh)
    low, high = s.guidance_range
    zeros = t.guidance.zero_empty and s.guidance_mode == "cfg"
    return replace(
        t, sampler=s.sampler, grids=s.grids.of(t.path), spacing=None, stochastic=s.stochastic, gamma=s.gamma,
        phases=s.phases, second_time=recipe.student.second_time, start="unit", boundary=s.boundary, clip=None,
        guidance=Guidance(mode=s.guidance_mode, default=s.guidance_default, range=(low, high), zero_empty=zeros),
        **fresh,
    )  # fmt: skip


def check_contract(recipe: Recipe, teacher: Bundle) -> None:
    """Refuse a student that could not be written, before it is trained.

    Errors: `RecipeError`, `SpecError` for a teacher whose path the recipe's sampler does not know.
    """
    if teacher.spec.second_time:
        raise RecipeError(
            f"{teacher.name!r} is told where its jumps land, and answers for no trajectory without; name the bundle "
            f"that it was distilled from, {teacher.spec.teacher!r}, with --teacher"
        )
    mode = teacher.spec.guidance.mode
    if recipe.family == "guidance" and mode != "cfg":
        raise RecipeError(
            f"{recipe.name} takes in classifier-free guidance, and {teacher.name!r} has guidance {mode!r}, which costs "
            "no second evaluation; name a teacher whose guidance is 'cfg'"
        )
    if recipe.sampling is None:
        if recipe.run.init is not None:
            raise RecipeError(
                f"{recipe.name} prunes its teacher, so init is not for it: name that bundle with --teacher"
            )
        return
    if recipe.path is not None and recipe.path.kind != teacher.spec.path.kind:
        raise RecipeError(
            f"{recipe.name}'s student lives on a {recipe.path.kind!r} path, and {teacher.name!r} on "
            f"{teacher.spec.path.kind!r}; use a teacher of that path, or lcm"
        )
    if teacher.spec.path.kind != "vp":
        raise RecipeError(
            f"{recipe.name} sells students of a table of betas, which diffusers' {recipe.sampling.sampler} scheduler "
            f"reads; {teacher.name!r} is on the path {teacher.spec.path.kind!r}: use ppcl, or a teacher on 'vp'"
        )
    student_spec(recipe, teacher)


def check_start(spec: SamplerSpec, start: Bundle, recipe: str) -> None:
    """Refuse a start that is not sampled as the recipe's student: its tuning would be on other states than are sold.

    Errors: `RecipeError` naming the first field that differs.
    """
    theirs = start.spec
    for name in ("sampler", "stochastic", "boundary", "gamma", "phases", "second_time", "path", "prediction"):
        if getattr(theirs, name) != getattr(spec, name):
            raise RecipeError(
                f"{recipe} tunes students whose {name} is {getattr(spec, name)!r}, and that of init {start.name!r} is "
                f"{getattr(theirs, name)!r}; name a student of lcm, lcm-lora or dmd2, or leave init out"
            )
    if other := [n for n, grid in spec.grids.items() if theirs.grids.get(n) != grid]:
        raise RecipeError(
            f"{recipe} tunes at {other[0]} steps of the times {spec.grids[other[0]]}, and init {start.name!r} has "
            f"{theirs.grids.get(other[0], 'none')} there; set counts to those of init, {sorted(theirs.grids)}"
        )


def write_student(recipe: Recipe, teacher: Bundle, network: Any, out: Path) -> Bundle:
    """The student as a diffusers folder, sealed. Everything but the denoiser and the scheduler is the teacher's.

    A ControlNet whose outputs no longer fit a smaller U-Net is left out.
    """
    folder, spec = teacher.family.folder, student_spec(recipe, teacher)
    index = read_index(teacher.root)
    parts = [name for name in index if name.startswith(KEPT)]
    if takes_control(network, teacher):
        parts.append("controlnet")
    else:
        spec = replace(spec, control_kinds=())
    with in_place_of(out) as beside:
        for part in parts:
            if (teacher.root / part).is_dir():
                shutil.copytree(teacher.root / part, beside / part)
        if recipe.student.lora_rank is not None:
            save_lora(network, beside, folder)
            network = merged(network)
        network = network.eval().to(memory_format=torch.contiguous_format)
        (network.half() if recipe.run.fp16_weights else network.float()).save_pretrained(beside / folder)
        index |= {name: [None, None] for name in ADDED if name in index}
        if recipe.student.negative:
            adopt_negative(beside, Negative(method="sun"))
        _write_pipeline(recipe, teacher, beside, index, library=library_of(network.config))
        sealed = seal_bundle(beside, out.name, spec)
    return Bundle(out, sealed.name, sealed.spec)


KEPT = ("vae", "text_encoder", "tokenizer")
"""Beginnings of the names of components that a student takes over as they are."""
ADDED = ("t2i_adapter", "ip_adapter", "image_encoder", "negative", "tiny_decoder")
"""Additions to a teacher that were made for its denoiser; a student starts without them."""


def takes_control(unet: Any, teacher: Bundle) -> bool:
    """Whether the U-Net's encoder is shaped as the teacher's, so that the teacher's ControlNet fits."""
    if not teacher.has("controlnet"):
        return False
    theirs = teacher.config("unet")
    depth = len(theirs["down_block_types"])

    def shape(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        layers = config["layers_per_block"]
        return tuple(config["block_out_channels"]), (layers,) * depth if isinstance(layers, int) else tuple(layers)

    return shape(unet.config) == shape(theirs)


def _write_pipeline(
    recipe: Recipe, teacher: Bundle, folder: Path, index: dict[str, Any], *, library: str | None
) -> None:
    """`scheduler/` and `model_index.json`, so diffusers loads the folder with the student's own sampler.

    A changed network is none that diffusers can run. It is told so: it refuses a library where it finds no class.
    """
    if recipe.sampling is None:
        shutil.copytree(teacher.root / "scheduler", folder / "scheduler")
    else:
        scheduler = _scheduler(recipe.sampling, teacher)
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        if teacher.family.name == "sd":
            # either pipeline tells a U-Net the scale that it takes; the first insists on LCM's scheduler
            embedded = recipe.sampling.guidance_mode == "embedded" and recipe.sampling.sampler == "lcm"
            index["_class_name"] = "LatentConsistencyModelPipeline" if embedded else "StableDiffusionPipeline"
    if library is not None:
        index[teacher.family.folder] = [library, index[teacher.family.folder][1]]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def _scheduler(sampling: Sampling, teacher: Bundle) -> Any:
    from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

    path = teacher.spec.path
    settings: dict[str, Any] = {
        name: getattr(path, name) for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    }
    settings["prediction_type"] = PREDICTION_TYPES[teacher.spec.prediction]
    settings |= {"clip_sample": False, "set_alpha_to_one": teacher.spec.final_alpha_one}
    settings["steps_offset"] = 1  # read by neither scheduler here, but diffusers' pipeline warns where it is not 1
    if sampling.sampler == "lcm":
        return LCMScheduler(**settings, original_inference_steps=getattr(sampling.grids, "points", 50))
    if sampling.sampler == "tcd":
        return TCDScheduler(**settings, original_inference_steps=getattr(sampling.grids, "points", 50))
    return DDIMScheduler(**settings, timestep_spacing="trailing")
