"""The native body: every field of `GenerateRequest` under its own name, with pictures in base64."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.images import MAX_PIXELS
from fewstep.runtime.sampling.request import Control, Edit, GenerateRequest, Helper, ImagePrompt, Lora
from fewstep.runtime.service.local import Model

from .uploads import grey, picture
from .wire import LEVELS, Body, Format, Job, find_model, new_seed


class ControlBody(Body):
    """A picture to follow (PNG, JPEG or WebP in base64) of the request's size, and when and how strongly."""

    image_b64: str
    scale: float = Control.scale
    start: float = Control.start
    end: float = Control.end
    kind: str | None = None


class EditBody(Body):
    """A picture of the request's size to begin from; a mask that is white where it is made anew, black where kept."""

    image_b64: str
    strength: float = Edit.strength
    mask_b64: str | None = None
    keep: str | None = None
    prompt: str = Edit.prompt


class ImagePromptBody(Body):
    """A picture of any size, as prompt."""

    image_b64: str
    scale: float = ImagePrompt.scale


class HelperBody(Body):
    """A second served model that takes part."""

    model: str
    mode: str
    guidance: float | None = None
    weight: float | None = None
    steps: int | None = None
    strength: float | None = None
    threshold: float | None = None


class LoraBody(Body):
    """A LoRA that the bundle registers, how strongly it acts, and in which part of the steps."""

    name: str
    weight: float = Lora.weight
    start: float = Lora.start
    end: float = Lora.end


class GenerateBody(Body):
    """`POST /v1/generate` and `POST /v1/jobs`: every knob the runtime has."""

    prompt: str
    model: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    seed: int | None = None
    guidance: float | None = None
    gamma: float | None = None
    n: int = GenerateRequest.n
    width: int | None = None
    height: int | None = None
    control: ControlBody | None = None
    edit: EditBody | None = None
    image_prompt: ImagePromptBody | None = None
    helper: HelperBody | None = None
    times: list[float] | None = None
    clip: float | None = None
    clip_quantile: float | None = None
    guidance_ramp: list[float] | None = None
    negative_mode: str | None = None
    negative_scale: float | None = None
    residual: str | None = None
    residual_delta: float | None = None
    noise_correction: bool = False
    invert: str | None = None
    loras: list[LoraBody] | None = None
    previews: bool = False
    priority: int = GenerateRequest.priority
    deadline_s: float | None = None
    deadline_ms: float | None = None
    format: Format = "png"
    level: int | None = None

    def has_pictures(self) -> bool:
        """Whether reading it takes long enough to leave the event loop for it."""
        return bool(self.control or self.edit or self.image_prompt)


_READ_ELSEWHERE = {
    *("seed", "control", "edit", "image_prompt", "helper", "times", "guidance_ramp", "loras", "deadline_s"),
}
_NAMES = {
    "control.edge": "control.image_b64",
    "edit.image": "edit.image_b64",
    "edit.mask": "edit.mask_b64",
    "image_prompt.image": "image_prompt.image_b64",
}


def generate_job(body: GenerateBody, models: Mapping[str, Model]) -> Job:
    """Read a native call; its pictures are unpacked here, so call it outside the event loop where it has any.

    Errors: `InvalidRequest` with the field; `Refused` 404 for an unknown model.
    """
    model = find_model(body.model, models)
    low, high = LEVELS[body.format]
    if body.level is not None and not low <= body.level <= high:
        raise InvalidRequest("level", f"level is {body.level}; for {body.format} use {low} to {high}")
    pixels = min(_pixels(body, models[model].spec.sizes), MAX_PIXELS)
    plain = {f.name: getattr(body, f.name) for f in fields(GenerateRequest) if f.name not in _READ_ELSEWHERE}
    request = GenerateRequest(
        **plain,
        seed=new_seed() if body.seed is None else body.seed,
        control=None if body.control is None else _control(body.control, pixels),
        edit=None if body.edit is None else _edit(body.edit, pixels),
        image_prompt=None if body.image_prompt is None else _image_prompt(body.image_prompt),
        helper=None if body.helper is None else Helper(**body.helper.model_dump()),
        times=None if body.times is None else tuple(body.times),
        guidance_ramp=_ramp(body.guidance_ramp),
        loras=tuple(Lora(lora.name, lora.weight, lora.start, lora.end) for lora in body.loras or ()),
        deadline_s=_deadline_s(body),
    )
    names = {**_NAMES, "size": "width" if body.width is not None else "height"}
    if body.deadline_ms is not None:
        names["deadline_s"] = "deadline_ms"
    return Job(request, model, body.format, body.level, names, models[model].spec.sampler)


def _pixels(body: GenerateBody, sizes: Sequence[tuple[int, int]]) -> int:
    """Of the size asked for, which is what pictures may be unpacked to: so it has to be one of the model's before."""
    width = sizes[0][0] if body.width is None else body.width
    height = sizes[0][1] if body.height is None else body.height
    if (width, height) not in sizes:
        wide = any(width == known for known, _ in sizes)  # then it is the height, or that the two do not go together
        wrong = "height" if wide and (body.width is None or all(height != known for _, known in sizes)) else "width"
        value, made = getattr(body, wrong), ", ".join(f"{w}x{h}" for w, h in sizes)
        raise InvalidRequest(wrong, f"{wrong} is {value}: {width}x{height} is not supported; this model makes {made}")
    return width * height


def _control(body: ControlBody, max_pixels: int) -> Control:
    edge = picture(body.image_b64, "control.image_b64", max_pixels)
    return Control(edge=edge, scale=body.scale, start=body.start, end=body.end, kind=body.kind)


def _edit(body: EditBody, max_pixels: int) -> Edit:
    image = picture(body.image_b64, "edit.image_b64", max_pixels)
    mask = None if body.mask_b64 is None else grey(body.mask_b64, "edit.mask_b64", max_pixels)
    return Edit(image=image, strength=body.strength, mask=mask, keep=body.keep, prompt=body.prompt)


def _image_prompt(body: ImagePromptBody) -> ImagePrompt:
    return ImagePrompt(image=picture(body.image_b64, "image_prompt.image_b64"), scale=body.scale)


def _ramp(ends: list[float] | None) -> Any:
    if ends is None:
        return None
    if len(ends) != 2:
        raise InvalidRequest("guidance_ramp", f"guidance_ramp has {len(ends)} numbers; give [whole below, none above]")
    return ends[0], ends[1]


def _deadline_s(body: GenerateBody) -> float | None:
    if body.deadline_ms is None:
        return body.deadline_s
    if body.deadline_s is not None:
        raise InvalidRequest("deadline_ms", "deadline_ms and deadline_s are both given; send one")
    return body.deadline_ms / 1000
