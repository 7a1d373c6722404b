"""What a caller asks for, and every check of it. No torch here.

A `GenerateRequest` is what the caller said; `resolve` fills in what the bundle's spec decides and refuses the rest, so
nothing after it has to check again.
"""

from dataclasses import dataclass, replace
from typing import Any

from fewstep.models.spec import SamplerSpec

from .errors import InvalidRequest

MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARS = 4000


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
)
"""Field, what it may be, and how to say so."""


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


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt, `n` pictures. None means: as the bundle's spec says. Picture i of n has the seed `seed + i`."""

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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server allows; the model's own limits are in its spec."""

    max_n: int = 10
    max_queue: int = 256


def resolve(request: GenerateRequest, spec: SamplerSpec, limits: Limits = Limits()) -> GenerateRequest:
    """The same request with every None decided by the spec.

    Errors: `InvalidRequest` with the field, the value and what is allowed.
    """
    _check_types(request)
    if not request.prompt.strip():
        raise InvalidRequest("prompt", "prompt is empty; say what the picture should show")
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(request, field) or "")
        if length > MAX_PROMPT_CHARS:
            raise InvalidRequest(field, f"{field} has {length} characters; at most {MAX_PROMPT_CHARS}: shorten it")
    if not 1 <= request.n <= limits.max_n:
        raise InvalidRequest("n", f"n is {request.n}; ask for 1 to {limits.max_n} pictures")
    if not 0 <= request.seed <= MAX_SEED - limits.max_n:
        raise InvalidRequest("seed", f"seed is {request.seed}; use a whole number from 0 to {MAX_SEED - limits.max_n}")
    if request.deadline_s is not None and not request.deadline_s > 0:  # also refuses NaN
        raise InvalidRequest("deadline_s", f"deadline_s is {request.deadline_s}; it must be above 0 seconds")
    _check_sampler(request, spec)
    steps = spec_steps(request.steps, spec)
    width, height = _size(request, spec)
    guidance = _guidance(request, spec)
    if request.negative_prompt and guidance == 1.0:
        raise InvalidRequest(
            "negative_prompt", "negative_prompt does nothing at guidance 1: raise guidance or leave it out"
        )
    _check_control(request.control, width, height, spec.control_kinds)
    return replace(request, steps=steps, width=width, height=height, guidance=guidance)


def _check_types(request: GenerateRequest) -> None:
    for field, kinds, said in _KINDS:
        value = getattr(request, field)
        optional = field not in ("prompt", "seed", "n", "priority")
        if not (value is None and optional) and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise InvalidRequest(field, f"{field} is {value!r}; it must be {said}")


def _check_sampler(request: GenerateRequest, spec: SamplerSpec) -> None:
    """Settings that only some models have."""
    if request.negative_prompt and spec.guidance.mode != "cfg":
        raise InvalidRequest(
            "negative_prompt",
            f"negative_prompt needs classifier-free guidance, and this model's is {spec.guidance.mode!r}: leave it out",
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
