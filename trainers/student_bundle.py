"""The student as a bundle: its sampling contract, and a diffusers folder around its U-Net."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fewstep.models.bundle import Bundle, seal_bundle
from fewstep.models.linear_attention import FIELD
from fewstep.models.pipeline_folder import read_index
from fewstep.models.schedulers import PREDICTION_TYPES
from fewstep.models.spec import Guidance, SamplerSpec

from .recipe import Recipe
from .student import merged, save_lora


def student_spec(recipe: Recipe, teacher: Bundle) -> SamplerSpec:
    s, t = recipe.sampling, teacher.spec
    return SamplerSpec(
        prediction=t.prediction,
        path=t.path,
        sampler=s.sampler,
        grids=s.grids.of(t.path),
        stochastic=s.stochastic,
        final_alpha_one=t.final_alpha_one,
        guidance=Guidance(mode=s.guidance_mode, default=s.guidance_default, range=s.guidance_range),
        boundary=s.boundary,
        latent=t.latent,
        sizes=t.sizes,
        recipe=recipe.name,
        teacher=teacher.name,
    )


def write_student(recipe: Recipe, teacher: Bundle, unet: Any, out: Path) -> Bundle:
    """The student as a diffusers folder, sealed. Everything but the U-Net and the scheduler is the teacher's.

    A ControlNet whose outputs no longer fit a smaller U-Net is left out.
    """
    beside = out.with_name(out.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    parts = ["vae", "text_encoder", "tokenizer", *(["controlnet"] if takes_control(unet, teacher) else [])]
    for part in parts:
        if (teacher.root / part).is_dir():
            shutil.copytree(teacher.root / part, beside / part)
    if recipe.student.lora_rank is not None:
        save_lora(unet, beside)
        unet = merged(unet)
    unet = unet.eval().to(memory_format=torch.contiguous_format)
    (unet.half() if recipe.run.fp16_weights else unet.float()).save_pretrained(beside / "unet")
    _write_pipeline(recipe, teacher, beside, linear=FIELD in unet.config)
    sealed = seal_bundle(beside, out.name, student_spec(recipe, teacher))
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
    return Bundle(out, sealed.name, sealed.spec)


def takes_control(unet: Any, teacher: Bundle) -> bool:
    """Whether the U-Net's encoder is shaped as the teacher's, so that the teacher's ControlNet fits."""
    theirs = teacher.config("unet")
    depth = len(theirs["down_block_types"])

    def shape(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        layers = config["layers_per_block"]
        return tuple(config["block_out_channels"]), (layers,) * depth if isinstance(layers, int) else tuple(layers)

    return shape(unet.config) == shape(theirs)


def _write_pipeline(recipe: Recipe, teacher: Bundle, folder: Path, *, linear: bool) -> None:
    """`scheduler/` and `model_index.json`, so diffusers loads the folder with the student's own sampler.

    With linear attention diffusers cannot run the U-Net, and is told so: it refuses a library that it does not find.
    """
    from diffusers import DDIMScheduler, LCMScheduler

    path, index = teacher.spec.path, read_index(teacher.root)
    settings: dict[str, Any] = {
        name: getattr(path, name) for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    }
    settings["prediction_type"] = PREDICTION_TYPES[teacher.spec.prediction]
    settings |= {"clip_sample": False, "set_alpha_to_one": teacher.spec.final_alpha_one}
    settings["steps_offset"] = 1  # read by neither scheduler here, but diffusers' pipeline warns where it is not 1
    if recipe.sampling.sampler == "lcm":
        points = getattr(recipe.sampling.grids, "points", 50)
        scheduler: Any = LCMScheduler(**settings, original_inference_steps=points)
    else:
        scheduler = DDIMScheduler(**settings, timestep_spacing="trailing")
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    if linear:
        index["unet"] = ["fewstep.models.linear_attention", "UNet2DConditionModel"]
    embedded = recipe.sampling.guidance_mode == "embedded"
    index["_class_name"] = "LatentConsistencyModelPipeline" if embedded else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
