"""OpenAI's image calls, with the extensions that other servers use, as jobs.

What OpenAI's fields mean here: `quality` is a step count; `input_fidelity` is a strength; a mask is painted where it is
transparent, and so is a picture with no mask; a second picture is the image prompt of a model that has IP-Adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ConfigDict

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.request import Edit, GenerateRequest, ImagePrompt
from fewstep.runtime.service.local import Model

from .uploads import fitted, nearest_size, with_mask
from .wire import Body, Format, Job, find_model, new_seed

Quality = Literal["auto", "low", "medium", "standard", "high", "hd", "xhigh", "max"]
MAX_PARTIAL = 3
FIDELITY_STRENGTH = {"high": 0.5, "low": 0.75}
"""How far back to noise an edit begins: the less, the more of the picture stays."""
_NAMED: Mapping[str, Literal["low", "medium", "high", "auto"]] = {
    "low": "low",
    "medium": "medium",
    "standard": "medium",
    "high": "high",
    "hd": "high",
    "xhigh": "high",
    "max": "high",
}


class ImagesBody(Body):
    """`POST /v1/images/generations`: OpenAI's fields, then the extensions."""

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: int | None = None
    quality: Quality | None = None
    style: str | None = None
    background: str | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    stream: bool | None = None
    partial_images: int | None = None
    seed: int | None = None
    steps: int | None = None
    num_inference_steps: int | None = None
    guidance: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None


class EditsBody(ImagesBody):
    """The fields of `POST /v1/images/edits` that are no files. A form holds text, so numbers are read from it."""

    model_config = ConfigDict(extra="forbid", strict=False)

    input_fidelity: Literal["high", "low"] | None = None
    strength: float | None = None
    keep: str | None = None


@dataclass(frozen=True)
class Upload:
    """A file of a form, under the name that the caller gave its part."""

    field: str
    data: bytes


def images_job(body: ImagesBody, models: Mapping[str, Model]) -> Job:
    """Read a call for new pictures. The first of `models` is the default.

    Errors: `InvalidRequest` with OpenAI's field name; `Refused` 404 for an unknown model.
    """
    model = find_model(body.model, models)
    _check_streaming(body)
    if body.background not in (None, "auto", "opaque"):
        raise InvalidRequest("background", f"background is {body.background!r}; pictures are opaque: leave it out")
    if body.style not in (None, "natural"):
        raise InvalidRequest("style", f"style is {body.style!r}; this server has no styles: say it in the prompt")
    steps_name, steps = _either(body, "steps", "num_inference_steps")
    guidance_name, guidance = _either(body, "guidance", "guidance_scale")
    form = body.output_format or "png"
    spec = models[model].spec
    width, height = _size(body.size) or spec.sizes[0]
    request = GenerateRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        steps=_quality_steps(body.quality, steps, models[model]),
        seed=new_seed() if body.seed is None else body.seed,
        guidance=guidance,
        n=1 if body.n is None else body.n,
        width=width,
        height=height,
        previews=bool(body.partial_images),
    )
    names = {"steps": steps_name, "guidance": guidance_name, "previews": "partial_images"}
    return Job(request, model, form, _level(body, form), names, spec.sampler)


def edits_job(body: EditsBody, images: Sequence[Upload], mask: Upload | None, models: Mapping[str, Model]) -> Job:
    """Read a call that edits a picture; the pictures are unpacked here, so call it outside the event loop.

    A picture of another size than the request's is scaled, and cropped about its middle.

    Errors: as `images_job`; `InvalidRequest` for files that are no pictures.
    """
    job = images_job(body, models)
    if not 1 <= len(images) <= 2:
        sent = "no picture" if not images else f"{len(images)} pictures"
        raise InvalidRequest("image", f"image holds {sent}; send the one to edit, and at most one more as image prompt")
    first = images[0]
    image, hidden = with_mask(first.data, first.field)
    painted = hidden if hidden.any() else None
    if mask is not None:
        _, painted = with_mask(mask.data, "mask")
        if painted.shape != image.shape[:2]:
            both = " and ".join(f"{shape[1]}x{shape[0]}" for shape in (painted.shape, image.shape))
            raise InvalidRequest("mask", f"mask and {first.field} are {both}; they must be of one size")
        if not painted.any():
            raise InvalidRequest("mask", "mask is opaque all over; make it transparent where to paint")
    sizes = models[job.model].spec.sizes
    width, height = _size(body.size) or nearest_size(image, sizes)
    if (width, height) not in sizes:  # before pictures are made to fit it
        known = ", ".join(f"{w}x{h}" for w, h in sizes)
        raise InvalidRequest("size", f"size is {width}x{height}; this model makes {known}")
    edit = Edit(
        image=fitted(image, width, height),
        strength=_strength(body),
        mask=None if painted is None else fitted(painted, width, height),
        keep=body.keep,
    )
    prompt = None if len(images) < 2 else ImagePrompt(image=with_mask(images[1].data, images[1].field)[0])
    names = {"edit": first.field, "edit.image": first.field, "edit.mask": "mask", "edit.keep": "keep"}
    names |= {"edit.strength": "strength" if body.input_fidelity is None else "input_fidelity"}
    names |= {"image_prompt": images[-1].field, "image_prompt.image": images[-1].field}
    request = replace(job.request, edit=edit, image_prompt=prompt, width=width, height=height)
    return replace(job, request=request, names={**job.names, **names})


def named_quality(quality: str | None) -> str:
    """OpenAI's word for a quality, in replies and events."""
    return _NAMED.get(quality or "auto", "auto")


def _check_streaming(body: ImagesBody) -> None:
    partial = body.partial_images
    if partial is not None and not 0 <= partial <= MAX_PARTIAL:
        raise InvalidRequest("partial_images", f"partial_images is {partial}; use 0 to {MAX_PARTIAL}")
    if partial and not body.stream:
        raise InvalidRequest("partial_images", f"partial_images is {partial}, but nothing is streamed: send stream")
    if body.stream and body.response_format == "url":
        raise InvalidRequest("response_format", "response_format is 'url'; a stream holds pictures: use 'b64_json'")


def _level(body: ImagesBody, form: Format) -> int | None:
    level = body.output_compression
    if level is None or (form == "png" and level == 100):  # 100 is OpenAI's default, which clients send along
        return None
    if form == "png":
        raise InvalidRequest("output_compression", "output_compression is for jpeg and webp; leave it out for png")
    if not 0 <= level <= 100:
        raise InvalidRequest("output_compression", f"output_compression is {level}; use 0 (smallest) to 100 (best)")
    return max(1, level)


def _strength(body: EditsBody) -> float:
    if body.input_fidelity is None:
        return Edit.strength if body.strength is None else body.strength
    if body.strength is not None:
        raise InvalidRequest(
            "input_fidelity", f"input_fidelity is {body.input_fidelity!r}, but strength decides it: send one"
        )
    return FIDELITY_STRENGTH[body.input_fidelity]


def _either(body: ImagesBody, ours: str, theirs: str) -> tuple[str, Any]:
    """(name, value) of a field that goes by two names."""
    a, b = getattr(body, ours), getattr(body, theirs)
    if a is not None and b is not None and a != b:
        raise InvalidRequest(theirs, f"{theirs} is {b} and {ours} is {a}; they mean the same: send one")
    return (theirs, b) if a is None and b is not None else (ours, a)


def _quality_steps(quality: str | None, steps: int | None, model: Model) -> int | None:
    """OpenAI's quality as a step count: low is the fewest the model was made for, high the most."""
    if named_quality(quality) in ("auto", "medium"):
        return steps
    if steps is not None or not model.spec.steps:
        reason = f"steps is {steps}, which decides it" if steps is not None else "this model has no fixed step counts"
        raise InvalidRequest("quality", f"quality is {quality!r}, but {reason}: leave quality out and use steps")
    return model.spec.steps[0] if quality == "low" else model.spec.steps[-1]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None or text == "auto":
        return None
    width, cross, height = text.partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and len(text) < 16):
        raise InvalidRequest("size", f"size is {text[:40]!r}; write WIDTHxHEIGHT in pixels, as in 64x64, or auto")
    return int(width), int(height)
