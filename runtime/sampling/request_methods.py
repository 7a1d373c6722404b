"""Checks of the methods that a request may ask for, and what it left open about them. No torch here.

Each method is refused by name where the spec, the bundle's graphs or another option makes it impossible.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fewstep.models.roles import (
    ADAPTER,
    CONTROLNET,
    DENOISER_ADAPTER,
    DENOISER_CONTROL,
    DENOISER_IMAGE_PROMPT,
    DENOISER_LORA,
    DENOISER_NEGATIVE,
    ENCODER,
    IMAGE_PROMPT,
)
from fewstep.models.spec import SamplerSpec

from ..errors import InvalidRequest

if TYPE_CHECKING:
    from .request import Edit, GenerateRequest, Helper, Lora, Offers

KEEPS = ("grey", "coarse")
NEGATIVE_SCALES = {"nasa": (0.1, 2.0), "nag": (4.0, 20.0), "sun": (1.0, 2.0)}
"""Mode -> (default, most). NASA's authors use 0.1 to 1, NAG's a scale of 5, which is 1 + 4; SpeedUpNet's is 1."""
HELPER_FIELDS = {"pull": ("weight",), "first": (), "refine": ("steps", "strength", "threshold")}
RESIDUALS = ("self", "onetime")
DIRECTED = ("ddim", "euler", "phased", "tcd")
"""Samplers whose step goes along the estimated noise."""
PULL_WEIGHT = 0.3
REFINE = {"steps": 4, "strength": 0.4, "threshold": 0.0}


def resolve_methods(request: "GenerateRequest", spec: SamplerSpec, offers: "Offers | None") -> "GenerateRequest":
    """The request with its methods' defaults.

    Errors: `InvalidRequest` naming the field.
    """
    for name in ("noise_correction", "previews"):
        value: Any = getattr(request, name)
        if not isinstance(value, bool):
            raise InvalidRequest(name, f"{name} is {value!r}; it must be true or false")
    if request.control is not None and offers is not None and not _follows(offers.roles):
        raise InvalidRequest(
            "control", f"control needs a ControlNet or an adapter; model {offers.name!r} has none: leave it out"
        )
    changes: dict[str, Any] = {"clip": _clip(request, spec)} if request.clip is None and spec.clip else {}
    if _asks_nothing(request):
        return replace(request, **changes) if changes else request
    _check_clip(request, spec)
    _check_one_graph(request)
    if request.edit is not None:
        changes["edit"] = _edit(request.edit, request, offers)
    if request.image_prompt is not None:
        _check_image_prompt(request.image_prompt, offers)
    if request.negative_mode is not None or request.negative_scale is not None:
        changes["negative_scale"] = _negative_scale(request, spec, offers)
    if request.guidance_ramp is not None:
        changes["guidance_ramp"] = _ramp(request, spec)
    if request.residual is not None or request.residual_delta is not None:
        changes["residual_delta"] = _residual_delta(request, spec)
    if request.noise_correction:
        _check_noise_correction(request, spec)
    if request.invert is not None:
        _check_invert(request, spec, offers)
    if request.helper is not None:
        changes["helper"] = _helper(request.helper, request, spec, offers)
    if request.loras:
        changes["loras"] = _loras(request.loras, offers)
    return replace(request, **changes)


def is_plain(request: "GenerateRequest") -> bool:
    """Whether a request asks for no method and follows no picture, as most do."""
    return request.control is None and _asks_nothing(request)


def _asks_nothing(request: "GenerateRequest") -> bool:
    """Whether a request asks for no method."""
    return (
        request.edit is None
        and request.image_prompt is None
        and request.helper is None
        and request.clip is None
        and request.clip_quantile is None
        and request.guidance_ramp is None
        and request.negative_mode is None
        and request.negative_scale is None
        and request.residual is None
        and request.residual_delta is None
        and request.invert is None
        and not request.noise_correction
        and not request.loras
    )


def _follows(roles: frozenset[str]) -> bool:
    return {CONTROLNET, DENOISER_CONTROL} <= roles or {ADAPTER, DENOISER_ADAPTER} <= roles


def _clip(request: "GenerateRequest", spec: SamplerSpec) -> float | None:
    return spec.clip if request.clip is None else float(request.clip)


def _check_clip(request: "GenerateRequest", spec: SamplerSpec) -> None:
    bound, quantile = request.clip, request.clip_quantile
    if bound is not None:
        _within("clip", bound, 0.0, 1000.0, open_low=True)
    if quantile is None:
        return
    _within("clip_quantile", quantile, 0.0, 1.0, open_low=True)
    if bound is None and spec.clip is None:
        raise InvalidRequest("clip_quantile", "clip_quantile needs clip, the bound that it scales back to: give both")


def _check_one_graph(request: "GenerateRequest") -> None:
    """What steers a network's inside has a graph of its own each; there is none for two of them."""
    steers = ("control", "image_prompt", "negative_mode", "loras")
    given = [name for name in steers if getattr(request, name)]
    if len(given) > 1:
        raise InvalidRequest(given[1], f"{given[1]} and {given[0]} have a graph each and none together: leave one out")


def _edit(edit: "Edit", request: "GenerateRequest", offers: "Offers | None") -> "Edit":
    _needs("edit", offers, "an encoder", ENCODER)
    check_picture("edit.image", edit.image, (request.height, request.width, 3))
    _within("edit.strength", edit.strength, 0.0, 1.0, open_low=True)
    if not isinstance(edit.prompt, str):
        raise InvalidRequest("edit.prompt", f"edit.prompt is {edit.prompt!r}; it must be text")
    if edit.mask is not None:
        check_picture("edit.mask", edit.mask, (request.height, request.width))
        if edit.keep is not None:
            raise InvalidRequest("edit.keep", "edit.keep and edit.mask both say what stays: leave one out")
        if not edit.mask.any():
            raise InvalidRequest("edit.mask", "edit.mask is 0 everywhere, which keeps the whole picture: set 255 where")
    if edit.keep is not None:
        _one_of("edit.keep", edit.keep, KEEPS)
    if edit.keep == "coarse" and ((request.height or 0) % 8 or (request.width or 0) % 8):
        raise InvalidRequest("edit.keep", f"edit.keep is 'coarse'; {request.width}x{request.height} has no 8x8 blocks")
    if edit.prompt and request.invert is None:
        raise InvalidRequest("edit.prompt", "edit.prompt is read by invert alone: leave it out or say invert")
    return replace(edit, strength=float(edit.strength))


def _check_image_prompt(given: Any, offers: "Offers | None") -> None:
    _needs("image_prompt", offers, "an IP-Adapter", IMAGE_PROMPT, DENOISER_IMAGE_PROMPT)
    check_picture("image_prompt.image", given.image, (None, None, 3))
    _within("image_prompt.scale", given.scale, 0.0, 2.0)


def _negative_scale(request: "GenerateRequest", spec: SamplerSpec, offers: "Offers | None") -> float:
    mode, scale = request.negative_mode, request.negative_scale
    if mode is None:
        modes = " or ".join(map(repr, NEGATIVE_SCALES))
        raise InvalidRequest("negative_scale", f"negative_scale belongs to negative_mode: say {modes}, too")
    _one_of("negative_mode", mode, tuple(NEGATIVE_SCALES))
    _needs("negative_mode", offers, "a graph for negative prompts", DENOISER_NEGATIVE)
    if offers is not None and offers.negative not in (None, mode):
        raise InvalidRequest(
            "negative_mode", f"negative_mode is {mode!r}; model {offers.name!r} has {offers.negative!r}"
        )
    if not request.negative_prompt:
        raise InvalidRequest("negative_mode", "negative_mode needs a negative_prompt: say what to avoid")
    if spec.guidance.mode == "cfg" and request.guidance != 1.0:
        raise InvalidRequest(
            "negative_mode",
            f"negative_mode is {mode!r} and guidance {request.guidance} reads the negative prompt already: set it to 1",
        )
    default, most = NEGATIVE_SCALES[mode]
    if scale is not None:
        _within("negative_scale", scale, 0.0, most)
    return default if scale is None else float(scale)


def _ramp(request: "GenerateRequest", spec: SamplerSpec) -> tuple[float, float]:
    ramp = request.guidance_ramp
    if not isinstance(ramp, (tuple, list)) or len(ramp) != 2:
        raise InvalidRequest("guidance_ramp", f"guidance_ramp is {ramp!r}; it must be two numbers, tau1 and tau2")
    for tau in ramp:
        _within("guidance_ramp", tau, 0.0, 1.0)
    if ramp[0] > ramp[1]:
        raise InvalidRequest("guidance_ramp", f"guidance_ramp is {list(ramp)}; tau1 must not be above tau2")
    low = spec.guidance.range[0]
    if spec.guidance.mode == "none" or (spec.guidance.mode == "embedded" and low > 1.0):
        why = "its guidance was distilled away" if spec.guidance.mode == "none" else f"it was trained from {low} up"
        raise InvalidRequest(
            "guidance_ramp", f"guidance_ramp goes down to 1, and this model cannot: {why}; leave it out"
        )
    if spec.path.kind == "edm":
        raise InvalidRequest(
            "guidance_ramp", "guidance_ramp is in units of t / 1000, and this model's times are levels"
        )
    return float(ramp[0]), float(ramp[1])


def _residual_delta(request: "GenerateRequest", spec: SamplerSpec) -> float:
    mode, delta = request.residual, request.residual_delta
    if mode is None:
        raise InvalidRequest("residual_delta", "residual_delta belongs to residual: say 'self' or 'onetime', too")
    _one_of("residual", mode, RESIDUALS)
    if spec.guidance.mode != "cfg" or request.guidance == 1.0:
        raise InvalidRequest(
            "residual", f"residual is {mode!r}; it replaces classifier-free guidance above 1, which is not used here"
        )
    if request.negative_prompt and mode == "self":
        raise InvalidRequest("negative_prompt", "negative_prompt is not read by residual 'self': use 'onetime'")
    if request.guidance_ramp is not None:
        raise InvalidRequest(
            "guidance_ramp", "guidance_ramp turns guidance off on the way, which residual cannot: leave it out"
        )
    if spec.sampler == "dpmpp-2m":
        raise InvalidRequest("residual", "residual cannot be used with a solver that remembers steps: leave it out")
    if delta is not None:
        _within("residual_delta", delta, 0.0, 2.0)
    return 1.0 if delta is None else float(delta)


def _check_noise_correction(request: "GenerateRequest", spec: SamplerSpec) -> None:
    if spec.sampler not in DIRECTED:
        raise InvalidRequest(
            "noise_correction",
            f"noise_correction changes a step's direction, and {spec.sampler!r} has none: leave it out",
        )
    if (request.edit is not None and request.edit.strength < 1.0) or request.invert is not None:
        raise InvalidRequest("noise_correction", "noise_correction is for pictures from pure noise: leave edit out")


def _check_invert(request: "GenerateRequest", spec: SamplerSpec, offers: "Offers | None") -> None:
    if request.edit is None:
        raise InvalidRequest("invert", "invert needs edit.image, the picture that is taken to noise")
    gamma = spec.gamma if request.gamma is None else request.gamma
    if spec.sampler not in DIRECTED or (spec.sampler == "tcd" and gamma != 0.0):
        raise InvalidRequest(
            "invert", f"invert needs a deterministic student, and {spec.sampler!r} draws noise on its way"
        )
    if request.edit.mask is not None or request.edit.keep is not None or request.helper is not None:
        raise InvalidRequest("invert", "invert takes neither edit.mask nor edit.keep nor helper: leave them out")
    inverse = _served("invert", request.invert or "", spec, offers)
    if inverse is not None and not inverse.grids:
        raise InvalidRequest(
            "invert", f"invert is {request.invert!r}, whose spec has no grids: it is no inverse student"
        )


def _helper(helper: "Helper", request: "GenerateRequest", spec: SamplerSpec, offers: "Offers | None") -> "Helper":
    _one_of("helper.mode", helper.mode, tuple(HELPER_FIELDS))
    for mode, names in HELPER_FIELDS.items():
        for name in names:
            if getattr(helper, name) is not None and mode != helper.mode:
                raise InvalidRequest(f"helper.{name}", f"helper.{name} belongs to mode {mode!r}, not {helper.mode!r}")
    other = _served("helper.model", helper.model, spec, offers)
    found = helper
    if other is not None:
        low, high = other.guidance.range
        w = other.guidance.default if helper.guidance is None else helper.guidance
        _within("helper.guidance", w, low, high)
        found = replace(found, guidance=float(w))
    if helper.mode == "refine":
        return _refine(found, other, offers)
    if (request.steps or 0) < 2:
        raise InvalidRequest("helper", f"helper.mode {helper.mode!r} needs 2 steps or more; steps is {request.steps}")
    if spec.sampler == "dpmpp-2m" or (other is not None and other.sampler == "dpmpp-2m" and helper.mode == "first"):
        raise InvalidRequest("helper", f"helper.mode {helper.mode!r} cannot be used with a solver that remembers steps")
    if request.residual is not None:
        raise InvalidRequest("residual", f"residual and helper.mode {helper.mode!r} both change the first step")
    if helper.mode == "first":
        return found
    weight = PULL_WEIGHT if helper.weight is None else helper.weight
    _within("helper.weight", weight, 0.0, 1.0)
    return replace(found, weight=float(weight))


def _refine(helper: "Helper", other: SamplerSpec | None, offers: "Offers | None") -> "Helper":
    if helper.strength is not None:
        _within("helper.strength", helper.strength, 0.0, 1.0, open_low=True)
    if helper.threshold is not None:
        _within("helper.threshold", helper.threshold, -1e6, 1e6)
    steps = REFINE["steps"] if helper.steps is None else helper.steps
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InvalidRequest("helper.steps", f"helper.steps is {steps!r}; it must be a whole number from 1")
    if other is not None and not other.allows(steps):
        raise InvalidRequest("helper.steps", f"helper.steps is {steps}; model {helper.model!r} was not made for that")
    return replace(
        helper,
        steps=steps,
        strength=float(REFINE["strength"] if helper.strength is None else helper.strength),
        threshold=float(REFINE["threshold"] if helper.threshold is None else helper.threshold),
    )


def _loras(loras: Any, offers: "Offers | None") -> "tuple[Lora, ...]":
    from .request import Lora  # which reads this module

    if not isinstance(loras, (tuple, list)) or not all(isinstance(lora, Lora) for lora in loras):
        raise InvalidRequest(
            "loras", f"loras is {loras!r}; it must hold `Lora` values: a name, a weight, start and end"
        )
    _needs("loras", offers, "LoRAs that its engine mixes", DENOISER_LORA)
    names = [lora.name for lora in loras]
    for lora in loras:
        if offers is not None and lora.name not in offers.loras:
            known = ", ".join(offers.loras) or "(none)"
            raise InvalidRequest("loras", f"loras names {lora.name!r}; registered are {known}")
        _within(f"loras.{lora.name}", lora.weight, -4.0, 4.0)
        for end in ("start", "end"):
            _within(f"loras.{lora.name}.{end}", getattr(lora, end), 0.0, 1.0)
        if lora.start >= lora.end:
            said = f"loras.{lora.name}.start is {lora.start} and end {lora.end}; start must be below end"
            raise InvalidRequest(f"loras.{lora.name}.start", said)
    if len(set(names)) != len(names):
        raise InvalidRequest("loras", f"loras names {names}; name each once")
    return tuple(replace(lora, weight=float(lora.weight)) for lora in loras)


def _served(field: str, name: Any, spec: SamplerSpec, offers: "Offers | None") -> SamplerSpec | None:
    """The spec of another served model of the same latents and path; None where nothing is known of the others."""
    if not isinstance(name, str):
        raise InvalidRequest(field, f"{field} is {name!r}; it must be a model's name")
    if offers is None:
        return None
    others = {known: found for known, found in offers.models.items() if known != offers.name}
    if name not in others:
        raise InvalidRequest(field, f"{field} is {name!r}; the other models here are {', '.join(others) or '(none)'}")
    other = others[name]
    for part in ("latent", "path"):
        if getattr(other, part) != getattr(spec, part):
            theirs, ours = getattr(other, part), getattr(spec, part)
            raise InvalidRequest(field, f"{field} {name!r} has the {part} {theirs}, and {offers.name!r} has {ours}")
    return other


def check_picture(field: str, image: Any, wanted: Sequence[int | None]) -> None:
    """Errors: `InvalidRequest` where an array is not uint8 of this shape; None stands for any length above 0."""
    shape, dtype = tuple(getattr(image, "shape", ())), str(getattr(image, "dtype", "nothing known"))
    fits = len(shape) == len(wanted) and all(w in (None, s) and s for s, w in zip(shape, wanted, strict=True))
    if not fits or dtype != "uint8":
        said = ", ".join("any" if w is None else str(w) for w in wanted)
        raise InvalidRequest(field, f"{field} has shape {shape} of {dtype}; it must be ({said}) of uint8: resize it")


def _needs(field: str, offers: "Offers | None", what: str, *roles: str) -> None:
    if offers is not None and not set(roles) <= offers.roles:
        raise InvalidRequest(field, f"{field} needs {what}; model {offers.name!r} has none: leave it out")


def _one_of(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidRequest(field, f"{field} is {value!r}; use {' or '.join(map(repr, allowed))}")


def _within(field: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Errors: `InvalidRequest` where it is no number from `low` to `high`; NaN is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(field, f"{field} is {value!r}; it must be a number")
    if not low <= value <= high or (open_low and value == low):
        raise InvalidRequest(field, f"{field} is {value}; use {'above ' if open_low else ''}{low:g} to {high:g}")
