"""The calls of AUTOMATIC1111's web UI API as jobs: `txt2img` and `img2img`. ControlNet units are in `units.py`.

Its clients send every setting of their own along, made for models of 20 steps. So what a few-step model cannot take
(20 steps, a sampler's name, a negative prompt) is brought to the nearest that it can, and `notes` in the reply's `info`
say each change; what asks for another picture (a second pass, face restoration, another size) is refused by name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict, model_validator

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.images import decode_rgba
from fewstep.runtime.sampling.request import Edit, GenerateRequest, Lora
from fewstep.runtime.service.local import Model

from .errors import Refused
from .units import control_of
from .uploads import FITS, file_bytes, fitted, nearest_size, picture
from .wire import Format, Job, find_model, new_seed, refuse_half_pairs

MASK_BLUR = 4.0
"""Pixels by which A1111 softens a mask's edge where nothing is said."""
_REFUSED = {
    "enable_hr": "there is no second pass here",
    "restore_faces": "there is no face restoration here",
    "tiling": "pictures that tile cannot be made here",
    "subseed_strength": "seeds are not mixed here",
    "styles": "there are no styles here: write them into the prompt",
    "script_name": "there are no scripts here",
    "refiner_checkpoint": "there is no refiner here",
    "inpaint_full_res": "the picture is painted as a whole here",
    "infotext": "parameters are not read from texts here",
}
"""Fields that ask for another picture when they are set, and why they cannot be."""
_SILENT = {
    *("save_images", "do_not_save_grid", "do_not_save_samples", "override_settings_restore_afterwards", "script_args"),
    *("url", "auth"),
}
"""Fields about what becomes of a picture elsewhere, or about the connection: nothing is to be said of them."""
_FORMATS: Mapping[str, Format] = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_LORA = re.compile(r"<lora:([^:<>]+):(-?[\d.]+)>")


class A1111Body(BaseModel):
    """`POST /sdapi/v1/txt2img`. Fields that are not named here are taken too, and noted as without effect."""

    model_config = ConfigDict(extra="allow")
    _readable = model_validator(mode="before")(refuse_half_pairs)

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int = -1
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 1
    n_iter: int = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool = True
    force_task_id: str | None = None


class Img2ImgBody(A1111Body):
    """`POST /sdapi/v1/img2img`."""

    init_images: list[str] | None = None
    denoising_strength: float = Edit.strength
    mask: str | None = None
    mask_blur: float = MASK_BLUR
    inpainting_mask_invert: int = 0
    inpainting_fill: int = 1
    resize_mode: int = 0
    include_init_images: bool = False


@dataclass(frozen=True)
class Call:
    """A checked call. notes: what was changed or had no effect, each as a sentence."""

    job: Job
    notes: tuple[str, ...]


def a1111_job(body: A1111Body, chosen: str | None, models: Mapping[str, Model], previews: bool = False) -> Call:
    """Read a call; its pictures are unpacked here, so call it outside the event loop.

    chosen: the model that the caller set in the options; the first where none was.

    Errors: `InvalidRequest` with the field; `Refused` 404 for an unknown model, 422 for an unknown script.
    """
    notes: list[str] = []
    settings = dict(body.override_settings or {})
    model = models[model_of(settings.pop("sd_model_checkpoint", None) or chosen, models)]
    form, level = _form(settings)
    _check_extra(body, settings, notes)
    prompt, loras = _loras(body.prompt)
    image = _init_image(body) if isinstance(body, Img2ImgBody) else None
    width, height = _size(body, model, image)
    guidance = _guidance(body, model, notes)
    negative, negative_mode = _negative(body, model, guidance, notes)
    request = GenerateRequest(
        prompt=prompt,
        negative_prompt=negative,
        negative_mode=negative_mode,
        steps=_steps(body, model, notes),
        seed=new_seed() if body.seed == -1 else body.seed,
        guidance=guidance,
        n=_count(body),
        width=width,
        height=height,
        control=control_of(body.alwayson_scripts or {}, model, (width, height), image),
        edit=_edit(body, image, (width, height), notes) if isinstance(body, Img2ImgBody) else None,
        loras=loras,
        previews=previews,
    )
    _note_sampler(body, model, notes)
    names = {"n": "batch_size", "guidance": "cfg_scale", "size": "width", "control": "alwayson_scripts.controlnet"}
    names |= {"edit": "init_images", "edit.image": "init_images", "edit.strength": "denoising_strength"}
    names |= {"edit.mask": "mask", "loras": "prompt"}
    return Call(Job(request, model.name, form, level, names, model.spec.sampler), tuple(notes))


def model_of(title: Any, models: Mapping[str, Model]) -> str:
    """A served model by its title, which may come with a file's ending; the first where none is asked for.

    Errors: `Refused` 404.
    """
    if title is None:
        return find_model(None, models)
    name = str(title).removesuffix(".safetensors")
    if name not in models:
        message = f"model {name[:80]!r} is not served here; use one of {', '.join(models)}"
        raise Refused(404, "model_not_found", message, param="sd_model_checkpoint")
    return name


def _form(settings: dict[str, Any]) -> tuple[Format, int | None]:
    name = settings.pop("samples_format", None) or "png"
    if str(name).lower() not in _FORMATS:
        raise InvalidRequest("samples_format", f"samples_format is {str(name)[:40]!r}; use png, jpg or webp")
    form, quality = _FORMATS[str(name).lower()], settings.pop("jpeg_quality", None)
    if form == "png" or quality is None:
        return form, None
    if type(quality) is not int or not 1 <= quality <= 100:
        raise InvalidRequest("jpeg_quality", f"jpeg_quality is {quality!r}; use a whole number from 1 to 100")
    return form, quality


def _check_extra(body: A1111Body, settings: Mapping[str, Any], notes: list[str]) -> None:
    extra = body.model_extra or {}
    for name, reason in _REFUSED.items():
        if extra.get(name):
            raise InvalidRequest(name, f"{name} is {repr(extra[name])[:40]}; {reason}: leave it out")
    useless = [name for name, value in extra.items() if value is not None and name not in _REFUSED.keys() | _SILENT]
    useless += [f"override_settings.{name}" for name, value in settings.items() if value not in (None, "", "Automatic")]
    if useless:
        notes.append(f"without effect here: {', '.join(sorted(useless)[:40])[:2000]}")


def _loras(prompt: str) -> tuple[str, tuple[Lora, ...]]:
    """(the prompt without its `<lora:name:weight>`, the LoRAs)."""
    found = []
    for name, weight in _LORA.findall(prompt):
        try:
            found.append(Lora(name, float(weight)))
        except ValueError:
            raise InvalidRequest("prompt", f"prompt has a LoRA of weight {weight!r}; write a number") from None
    return _LORA.sub("", prompt).strip() if found else prompt, tuple(found)


def _count(body: A1111Body) -> int:
    for name in ("batch_size", "n_iter"):
        if not 1 <= getattr(body, name) <= 1000:  # how many of both are allowed, the runtime says
            raise InvalidRequest(name, f"{name} is {getattr(body, name)}; ask for 1 or more pictures")
    return body.batch_size * body.n_iter


def _size(body: A1111Body, model: Model, image: Any) -> tuple[int, int]:
    spec = model.spec
    nearest = spec.sizes[0] if image is None else nearest_size(image, spec.sizes)
    size = body.width or nearest[0], body.height or nearest[1]
    if size not in spec.sizes:  # before pictures are made to fit it
        sizes = ", ".join(f"{w}x{h}" for w, h in spec.sizes)
        raise InvalidRequest("width", f"width and height are {size[0]}x{size[1]}; this model makes {sizes}")
    return size


def _steps(body: A1111Body, model: Model, notes: list[str]) -> int | None:
    spec = model.spec
    if body.steps is None or spec.allows(body.steps):
        return body.steps
    most = spec.spacing.max_steps if spec.spacing else 0
    allowed = sorted({*spec.steps, *((1, most) if most else ())})
    nearest: int = min(allowed, key=lambda count: abs(count - (body.steps or 0)))
    notes.append(f"steps is {nearest}, not {body.steps}: what this model was made for")
    return nearest


def _guidance(body: A1111Body, model: Model, notes: list[str]) -> float | None:
    if body.cfg_scale is None:
        return None
    low, high = model.spec.guidance.range
    nearest = float(np.clip(body.cfg_scale, low, high))
    if nearest != body.cfg_scale:  # NaN stays, for the runtime to refuse
        notes.append(f"cfg_scale is {nearest:g}, not {body.cfg_scale:g}: this model allows {low:g} to {high:g}")
    return nearest


def _negative(body: A1111Body, model: Model, guidance: float | None, notes: list[str]) -> tuple[str | None, str | None]:
    """(negative prompt, how it is heard): by guidance, or in the attention of a model that has such a graph."""
    text = (body.negative_prompt or "").strip()
    if not text:
        return None, None
    spec = model.spec
    if spec.guidance.mode == "cfg" and (spec.guidance.default if guidance is None else guidance) != 1.0:
        return text, None
    if model.offers.negative is not None:
        return text, model.offers.negative
    notes.append("negative_prompt is not heard: it needs classifier-free guidance above 1, or a graph of its own")
    return None, None


def _note_sampler(body: A1111Body, model: Model, notes: list[str]) -> None:
    asked = body.sampler_name or body.sampler_index
    if asked and asked.lower() != model.spec.sampler:
        notes.append(f"sampler_name is {model.spec.sampler!r}, not {asked[:40]!r}: the one this model was made with")
    if body.scheduler and body.scheduler.lower() != "automatic":
        notes.append(f"scheduler is 'Automatic', not {body.scheduler[:40]!r}: times are this model's own")


def _init_image(body: Img2ImgBody) -> Any:
    images = body.init_images or []
    if len(images) != 1:
        raise InvalidRequest("init_images", f"init_images holds {len(images)} pictures; send one")
    return picture(images[0], "init_images")


def _edit(body: Img2ImgBody, image: Any, size: tuple[int, int], notes: list[str]) -> Edit:
    if not 0 <= body.resize_mode < len(FITS):
        raise InvalidRequest("resize_mode", f"resize_mode is {body.resize_mode}; use 0 (resize), 1 (crop) or 2 (fill)")
    fit = FITS[body.resize_mode]
    mask = None
    if body.mask is not None:
        mask = _mask(body)
        if mask.shape != image.shape[:2]:
            mask = fitted(mask, image.shape[1], image.shape[0], "stretch")  # as A1111 does
        mask = fitted(mask, *size, fit)
        if body.inpainting_fill != 1:
            notes.append("inpainting_fill is 1 (original): painting begins from what is under the mask")
    return Edit(image=fitted(image, *size, fit), strength=body.denoising_strength, mask=mask)


def _mask(body: Img2ImgBody) -> Any:
    """[H, W] uint8: 255 where to paint. White is painted, or what is opaque where the mask has transparency."""
    if not 0.0 <= body.mask_blur <= 64.0:
        raise InvalidRequest("mask_blur", f"mask_blur is {body.mask_blur}; use 0 to 64 pixels")
    rgba = decode_rgba(file_bytes(body.mask or "", "mask"), field="mask")
    alpha = rgba[:, :, 3]
    light = alpha if alpha.min() < 255 else np.asarray(Image.fromarray(rgba).convert("L"))
    painted = np.where((light >= 128) != bool(body.inpainting_mask_invert), 255, 0).astype(np.uint8)
    if body.mask_blur == 0.0:
        return painted
    return np.asarray(Image.fromarray(painted).filter(ImageFilter.GaussianBlur(body.mask_blur)))
