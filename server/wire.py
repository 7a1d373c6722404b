"""Bodies as callers send them, turned into what the runtime takes. Every field is checked; none is dropped in silence.

Two shapes: OpenAI's image generation with the extensions other servers use, and the native one with every knob. Types
and names are checked here, values by the runtime, so a limit is written once. Both become a `Job`.
"""

import base64
import difflib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.images import decode
from fewstep.runtime.local import Model
from fewstep.runtime.request import Control, GenerateRequest

from .errors import Refused

Format = Literal["png", "jpeg", "webp"]
LEVELS = {"png": (0, 9), "jpeg": (1, 100), "webp": (1, 100)}


class Body(BaseModel):
    """Strict: no unknown field, no number in quotes, no whole number with a fraction."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_and_readable(cls, data: Any) -> Any:
        """Refuse a field that does not exist, saying which one was probably meant, and text that is no Unicode."""
        for name, value in data.items() if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                close = difflib.get_close_matches(name, cls.model_fields, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(cls.model_fields)}"
                context = {"field": name.encode("utf-8", "replace").decode(), "hint": hint}
                raise PydanticCustomError("unknown_parameter", "{field} is not a field of this call; {hint}", context)
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                message = "{field} holds half of a surrogate pair; send it as valid Unicode"
                raise PydanticCustomError("invalid_value", message, {"field": name})
        return data


class ImagesBody(Body):
    """`POST /v1/images/generations`: OpenAI's fields, then the extensions."""

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: int | None = None
    quality: Literal["auto", "low", "medium", "standard", "high", "hd"] | None = None
    style: str | None = None
    background: str | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = None
    stream: bool | None = None
    partial_images: int | None = None
    seed: int | None = None
    steps: int | None = None
    num_inference_steps: int | None = None
    guidance: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None


class ControlBody(Body):
    """An edge picture (PNG, JPEG or WebP, base64) of the request's size, and when and how strongly it is followed."""

    image_b64: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    kind: str | None = None


class GenerateBody(Body):
    """`POST /v1/generate`: every knob the runtime has."""

    prompt: str
    model: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    seed: int | None = None
    guidance: float | None = None
    gamma: float | None = None
    n: int = 1
    width: int | None = None
    height: int | None = None
    control: ControlBody | None = None
    priority: int = 0
    deadline_s: float | None = None
    format: Format = "png"
    level: int | None = None


@dataclass(frozen=True)
class Job:
    """One checked call: what to make with which model, how to encode it, and the caller's names of runtime fields."""

    request: GenerateRequest
    model: str
    format: Format
    level: int | None
    names: Mapping[str, str]

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """The runtime's error about the field as this caller wrote it."""
        name = self.names.get(error.field, error.field)
        return InvalidRequest(name, str(error).replace(error.field, name, 1))


def images_job(body: ImagesBody, models: Mapping[str, Model]) -> Job:
    """Read an OpenAI call. The first of `models` is the default.

    Errors: `InvalidRequest` with OpenAI's field name; `Refused` 404 for an unknown model.
    """
    model = find_model(body.model, models)
    if body.stream or body.partial_images:
        name = "stream" if body.stream else "partial_images"
        raise InvalidRequest(
            name, f"{name} is not supported in this version; leave it out, or stream progress from POST /v1/generate"
        )
    if body.background not in (None, "auto", "opaque"):
        raise InvalidRequest("background", f"background is {body.background!r}; pictures are opaque: leave it out")
    if body.style not in (None, "natural"):
        raise InvalidRequest("style", f"style is {body.style!r}; this server has no styles: say it in the prompt")
    steps_name, steps = _either(body, "steps", "num_inference_steps")
    guidance_name, guidance = _either(body, "guidance", "guidance_scale")
    form = body.output_format or "png"
    if body.output_compression is not None and form == "png":
        raise InvalidRequest("output_compression", "output_compression is for jpeg and webp; leave it out for png")
    if body.output_compression is not None and not 0 <= body.output_compression <= 100:
        raise InvalidRequest(
            "output_compression", f"output_compression is {body.output_compression}; use 0 (smallest) to 100 (best)"
        )
    width, height = _size(body.size)
    request = GenerateRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        steps=_quality_steps(body.quality, steps, models[model]),
        seed=_seed(body.seed),
        guidance=guidance,
        n=1 if body.n is None else body.n,
        width=width,
        height=height,
    )
    level = None if body.output_compression is None else max(1, body.output_compression)
    return Job(request, model, form, level, {"steps": steps_name, "guidance": guidance_name})


def generate_job(body: GenerateBody, models: Mapping[str, Model]) -> Job:
    """Read a native call.

    Errors: `InvalidRequest` with the field; `Refused` 404 for an unknown model.
    """
    model = find_model(body.model, models)
    low, high = LEVELS[body.format]
    if body.level is not None and not low <= body.level <= high:
        raise InvalidRequest("level", f"level is {body.level}; for {body.format} use {low} to {high}")
    spec = models[model].spec
    width, height = body.width or spec.sizes[0][0], body.height or spec.sizes[0][1]
    request = GenerateRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        steps=body.steps,
        seed=_seed(body.seed),
        guidance=body.guidance,
        gamma=body.gamma,
        n=body.n,
        width=body.width,
        height=body.height,
        control=None if body.control is None else _control(body.control, width, height),
        priority=body.priority,
        deadline_s=body.deadline_s,
    )
    names = {"size": "width" if body.width is not None else "height", "control.edge": "control.image_b64"}
    return Job(request, model, body.format, body.level, names)


def find_model(name: str | None, models: Mapping[str, Model]) -> str:
    if name is None:
        return next(iter(models))
    if name not in models:
        raise Refused(404, "model_not_found", f"model is {name!r}; this server has {', '.join(models)}", param="model")
    return name


def _either(body: ImagesBody, ours: str, theirs: str) -> tuple[str, Any]:
    """(name, value) of a field that goes by two names."""
    a, b = getattr(body, ours), getattr(body, theirs)
    if a is not None and b is not None and a != b:
        raise InvalidRequest(theirs, f"{theirs} is {b} and {ours} is {a}; they mean the same: send one")
    return (theirs, b) if a is None and b is not None else (ours, a)


def _quality_steps(quality: str | None, steps: int | None, model: Model) -> int | None:
    """OpenAI's quality as a step count: low is the fewest the model was made for, high the most."""
    if quality in (None, "auto", "medium", "standard"):
        return steps
    if steps is not None or not model.spec.steps:
        reason = f"steps is {steps}, which decides it" if steps is not None else "this model has no fixed step counts"
        raise InvalidRequest("quality", f"quality is {quality!r}, but {reason}: leave quality out and use steps")
    return model.spec.steps[0] if quality == "low" else model.spec.steps[-1]


def _seed(seed: int | None) -> int:
    """A caller without a seed gets a random one, small enough for JavaScript to repeat."""
    return secrets.randbelow(2**32) if seed is None else seed


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text in (None, "auto"):
        return None, None
    width, cross, height = text.partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and len(text) < 16):
        raise InvalidRequest("size", f"size is {text[:40]!r}; write WIDTHxHEIGHT in pixels, as in 64x64, or auto")
    return int(width), int(height)


def _control(body: ControlBody, width: int, height: int) -> Control:
    name = "control.image_b64"
    text = body.image_b64.partition(",")[2] if body.image_b64.startswith("data:") else body.image_b64
    try:
        file = base64.b64decode(text, validate=True)
    except ValueError:
        raise InvalidRequest(name, f"{name} is not base64; send a picture file's bytes in base64") from None
    edge = decode(file, max_pixels=width * height, field=name)
    return Control(edge=edge, scale=body.scale, start=body.start, end=body.end, kind=body.kind)
