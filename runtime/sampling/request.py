"""What a caller asks for, and every check of it. No torch here.

A `GenerateRequest` is what the caller said; `resolve` fills in what the bundle's spec decides and refuses the rest, so
nothing after it has to check again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any

from fewstep.models.spec import SamplerSpec

from ..errors import InvalidRequest
from .request_methods import resolve_methods

MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARS = 4000
MAX_TIMES = 100
MAX_DEADLINE_S = 1_000_000
WITHOUT_TIMES = ("phased",)
"""Samplers whose times are the edges of what was trained."""

_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("prompt", (str,), "text"),
    ("negative_prompt", (str,), "text"),
    ("steps", (int,), "a whole number"),
    ("seed", (int,), "a whole number"),
    ("guidance", (int, float), "a number"),
    ("gamma", (int, float), "a number"),
    ("n", (int,), "a whole number"),
    ("width", (int,), "a whole number of pixels"),
    ("height", (int,), "a whole number of pixels"),
    ("priority", (int,), "a whole number"),
    ("deadline_s", (int, float), "a number of seconds"),
    ("clip", (int, float), "a number"),
    ("clip_quantile", (int, float), "a number"),
    ("negative_mode", (str,), "text"),
    ("negative_scale", (int, float), "a number"),
    ("residual", (str,), "text"),
    ("residual_delta", (int, float), "a number"),
    ("invert", (str,), "text"),
)
"""Field, what it may be, and how to say so."""
_REQUIRED = frozenset(("prompt", "seed", "n", "priority"))


@dataclass(frozen=True, kw_only=True)
class Control:
    """A picture to follow (edges, for most models): [H, W, 3] uint8 array of the request's size.

    `scale` multiplies what the ControlNet or adapter gives; it is used in the part of the steps between `start` and
    `end` (0 to 1). kind: which of the spec's `control_kinds` the picture is; None where the model follows one kind.
    """

    edge: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    kind: str | None = None


@dataclass(frozen=True)
class Lora:
    """A LoRA that the bundle registers, how strongly it acts, and in which part of the steps: from `start` to `end`, as
    of `Control`."""

    name: str
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Begin from a picture: [H, W, 3] uint8 array of the request's size.

    strength: how far it is taken back to noise, above 0; 1 begins from pure noise. mask: [H, W] uint8, 255 where the
    picture is made anew, 0 where it is kept to the pixel. keep: what of the picture the new one must have, "grey" (its
    luminance: colourisation) or "coarse" (the mean of each 8x8 block: super-resolution). prompt: what the picture
    shows, for `invert`.
    """

    image: Any
    strength: float = 0.75
    mask: Any | None = None
    keep: str | None = None
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """A picture as prompt (IP-Adapter): [H, W, 3] uint8 array of any size."""

    image: Any
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Helper:
    """A second served model takes part: one of the same latents, a teacher or base model.

    mode: "pull" (Distillation++: after the first step it pulls the clean estimate by `weight`), "first" (diversity
    distillation: it does the first step) or "refine" (the picture is scored, and one below `threshold` is drawn again
    from `strength` in `steps` by the helper). guidance: the helper's own, its spec's default where None.
    """

    model: str
    mode: str
    guidance: float | None = None
    weight: float | None = None
    steps: int | None = None
    strength: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt, `n` pictures. None means: as the bundle's spec says. Picture i of n has the seed `seed + i`.

    docs/inference.md has a table of the methods behind the options:

    times: a grid of its own, falling, in the path's native time; it decides the number of steps. clip: bound on the
    clean estimate, in latent units; clip_quantile: the bound grows to this quantile of |x0| of the row, and what is
    clipped is scaled back to `clip` (dynamic thresholding). guidance_ramp: (tau1, tau2) in units of t / 1000,
    guidance is whole below tau1, none above tau2. negative_mode: how a negative prompt is heard: by classifier-free
    guidance (None), or in the attention ("nasa", "nag", "sun") with `negative_scale`. residual: guidance against a
    kept estimate of the unconditional output, "self" or "onetime" (StreamDiffusion), scaled by residual_delta.
    noise_correction: the first step's direction is the noise itself. invert: the served inverse student that takes
    `edit.image` to noise. previews: progress events carry a picture.
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    gamma: float | None = None
    n: int = 1
    width: int | None = None
    height: int | None = None
    control: Control | None = None
    priority: int = 0
    deadline_s: float | None = None
    edit: Edit | None = None
    image_prompt: ImagePrompt | None = None
    helper: Helper | None = None
    times: tuple[float, ...] | None = None
    clip: float | None = None
    clip_quantile: float | None = None
    guidance_ramp: tuple[float, float] | None = None
    negative_mode: str | None = None
    negative_scale: float | None = None
    residual: str | None = None
    residual_delta: float | None = None
    noise_correction: bool = False
    invert: str | None = None
    loras: tuple[Lora, ...] = ()
    previews: bool = False


_PARTS = (("control", Control), ("edit", Edit), ("image_prompt", ImagePrompt), ("helper", Helper))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server allows; the model's own limits are in its spec."""

    max_n: int = 10
    max_queue: int = 256


@dataclass(frozen=True, kw_only=True)
class Offers:
    """What a served model can do beyond its spec.

    name: its name here. roles: of its engine. negative: how its graph hears negative prompts, as "nag". models:
    the specs of all models served here, by name; a helper or inverse student is one of them. loras: names that its
    engine can mix by row.
    """

    name: str = ""
    roles: frozenset[str] = frozenset()
    negative: str | None = None
    models: Mapping[str, SamplerSpec] = field(default_factory=dict)
    loras: tuple[str, ...] = ()


def resolve(
    request: GenerateRequest, spec: SamplerSpec, limits: Limits = Limits(), offers: Offers | None = None
) -> GenerateRequest:
    """The same request with every None decided by the spec.

    offers: what the model that is asked can do; without it only what the spec decides is checked.

    Errors: `InvalidRequest` with the field, the value and what is allowed.
    """
    _check_types(request)
    if not request.prompt.strip():
        raise InvalidRequest("prompt", "prompt is empty; say what the picture should show")
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(request, name) or "")
        if length > MAX_PROMPT_CHARS:
            raise InvalidRequest(name, f"{name} has {length} characters; at most {MAX_PROMPT_CHARS}: shorten it")
    if not 1 <= request.n <= limits.max_n:
        raise InvalidRequest("n", f"n is {request.n}; ask for 1 to {limits.max_n} pictures")
    if not 0 <= request.seed <= MAX_SEED - limits.max_n:
        raise InvalidRequest("seed", f"seed is {request.seed}; use a whole number from 0 to {MAX_SEED - limits.max_n}")
    if request.deadline_s is not None and not 0 < request.deadline_s <= MAX_DEADLINE_S:  # also refuses NaN
        said = f"it must be above 0 and at most {MAX_DEADLINE_S} seconds: change it or leave it out"
        raise InvalidRequest("deadline_s", f"deadline_s is {request.deadline_s}; {said}")
    _check_sampler(request, spec)
    steps = spec_steps(request.steps, spec) if request.times is None else _own_steps(request, spec)
    width, height = _size(request, spec)
    guidance = _guidance(request, spec)
    if request.negative_prompt and guidance == 1.0 and request.negative_mode is None:
        raise InvalidRequest(
            "negative_prompt", "negative_prompt does nothing at guidance 1: raise guidance or leave it out"
        )
    _check_control(request.control, width, height, spec.control_kinds)
    whole = _with(request, steps=steps, width=width, height=height, guidance=guidance)
    return resolve_methods(whole, spec, offers)


def _with(request: GenerateRequest, **decided: Any) -> GenerateRequest:
    """`dataclasses.replace`, whose time grows with the fields: every request passes here, and it was a third of it."""
    made = object.__new__(GenerateRequest)
    vars(made).update(vars(request), **decided)
    return made


def _check_types(request: GenerateRequest) -> None:
    values = vars(request)
    for name, kinds, said in _KINDS:
        value = values[name]
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InvalidRequest(name, f"{name} is {value!r}; it must be {said}")
    for name, kind in _PARTS:
        value = values[name]
        if value is not None and not isinstance(value, kind):
            raise InvalidRequest(name, f"{name} is of type {type(value).__name__}; it must be a {kind.__name__}")


def _check_sampler(request: GenerateRequest, spec: SamplerSpec) -> None:
    """Settings that only some models have."""
    if request.negative_prompt and spec.guidance.mode != "cfg" and request.negative_mode is None:
        raise InvalidRequest(
            "negative_prompt",
            f"negative_prompt needs classifier-free guidance, and this model's is {spec.guidance.mode!r}: leave it out "
            "or, where the model has it, say negative_mode",
        )
    gamma = request.gamma
    if gamma is not None and spec.sampler != "tcd":
        raise InvalidRequest(
            "gamma", f"gamma belongs to the 'tcd' sampler; this model's is {spec.sampler!r}: leave it out"
        )
    if gamma is not None and not 0.0 <= gamma <= 1.0:
        raise InvalidRequest("gamma", f"gamma is {gamma}; use 0 (deterministic) to 1 (as stochastic as LCM)")


def spec_steps(steps: int | None, spec: SamplerSpec) -> int:
    """The step count to run: the asked one if the spec has it; unasked, a student's 4 (or most), a teacher's 25.

    Errors: `InvalidRequest` naming the counts that the model was made for.
    """
    if steps is None and spec.grids:
        return 4 if 4 in spec.grids else spec.steps[-1]
    if steps is None:
        return min(25, spec.spacing.max_steps if spec.spacing else 25)
    if not spec.allows(steps):
        allowed = ", ".join(map(str, spec.steps))
        if spec.spacing is not None:
            allowed = f"any from 1 to {spec.spacing.max_steps}"
        raise InvalidRequest("steps", f"steps is {steps}; this model was made for: {allowed}")
    return steps


def _own_steps(request: GenerateRequest, spec: SamplerSpec) -> int:
    """The step count of a request with times of its own."""
    times, path = request.times, spec.path
    if not isinstance(times, tuple) or not times or any(isinstance(t, bool) or not isinstance(t, Real) for t in times):
        raise InvalidRequest("times", f"times is {times!r}; it must be a list of numbers, noisiest first")
    if spec.sampler in WITHOUT_TIMES:
        raise InvalidRequest("times", f"times is given, and a {spec.sampler!r} model's are fixed: use steps")
    if len(times) > MAX_TIMES or any(not b < a for a, b in pairwise(times)) or not _inside(times, path.end, path.start):
        raise InvalidRequest(
            "times",
            f"times is {list(times)[:8]}; use 1 to {MAX_TIMES} times that fall strictly, each above {path.end} and at "
            f"most {path.start}",
        )
    if request.steps is not None and request.steps != len(times):
        raise InvalidRequest("steps", f"steps is {request.steps} and times has {len(times)}; leave steps out")
    return len(times)


def _inside(times: tuple[float, ...], end: float, start: float) -> bool:
    return end < times[-1] and times[0] <= start


def _size(request: GenerateRequest, spec: SamplerSpec) -> tuple[int, int]:
    width = request.width if request.width is not None else spec.sizes[0][0]
    height = request.height if request.height is not None else spec.sizes[0][1]
    if (width, height) not in spec.sizes:
        sizes = ", ".join(f"{w}x{h}" for w, h in spec.sizes)
        raise InvalidRequest("size", f"size {width}x{height} is not supported; this model makes {sizes}")
    return width, height


def _guidance(request: GenerateRequest, spec: SamplerSpec) -> float:
    low, high = spec.guidance.range
    value = spec.guidance.default if request.guidance is None else float(request.guidance)
    if not low <= value <= high:  # also refuses NaN
        reason = "its guidance was distilled away" if spec.guidance.mode == "none" else f"allowed is {low} to {high}"
        raise InvalidRequest("guidance", f"guidance is {value}; {reason}: leave it out or change it")
    return value


def _check_control(control: Control | None, width: int, height: int, kinds: tuple[str, ...]) -> None:
    if control is None:
        return
    shape, dtype = tuple(getattr(control.edge, "shape", ())), str(getattr(control.edge, "dtype", "nothing known"))
    if shape != (height, width, 3) or dtype != "uint8":
        raise InvalidRequest(
            "control.edge",
            f"control.edge has shape {shape} of {dtype}; it must be {(height, width, 3)} of uint8: resize it",
        )
    if kinds and control.kind not in kinds:
        raise InvalidRequest("control.kind", f"control.kind is {control.kind!r}; this model follows {', '.join(kinds)}")
    if not kinds and control.kind is not None:
        raise InvalidRequest(
            "control.kind", f"control.kind is {control.kind!r}; this model follows pictures of one kind: leave it out"
        )
    for name in ("scale", "start", "end"):
        value = getattr(control, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise InvalidRequest(f"control.{name}", f"control.{name} is {value!r}; it must be a number")
    if not 0.0 <= control.scale <= 2.0:
        raise InvalidRequest("control.scale", f"control.scale is {control.scale}; use 0 to 2")
    if not 0.0 <= control.start < control.end <= 1.0:
        raise InvalidRequest(
            "control.start", f"control.start {control.start} and end {control.end} must satisfy 0 <= start < end <= 1"
        )
