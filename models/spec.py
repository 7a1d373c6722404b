"""The sampling contract that travels with the weights: how a student was trained, so a server never guesses.

`SamplerSpec` is strict: an unknown or missing field is an error that names it. Guidance scales everywhere follow
`u + w (c - u)` (w = 1 means none). Times are in the path's native unit.
"""

import itertools
import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import NoneType, UnionType
from typing import Any

from .errors import SpecError
from .paths import Path, path_from_json, path_to_json
from .predictions import check_prediction
from .roles import DECODER, DECODER_TINY

SPEC_VERSION = 1
SAMPLERS = ("lcm", "ddim", "tcd", "euler", "euler-ancestral", "dpmpp-2m", "trig", "edm", "phased")
STOCHASTIC = ("lcm", "trig", "edm", "euler-ancestral")
"""Samplers that draw noise between steps; "tcd" does unless its gamma is 0, the others never do."""
GUIDANCE_MODES = ("none", "embedded", "cfg")
SPACINGS = ("trailing", "leading")
STARTS = ("unit", "sigma")
SIZE_IDS = ("sdxl", "pixart")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a guidance scale w reaches the network.

    none: the scale was distilled away; only w = 1 is accepted. embedded: the network takes w as an input, trained on
    `range`. cfg: two evaluations per step; `range` is what a request may ask for. Only cfg takes a negative prompt.
    zero_empty: an empty negative prompt is all-zero conditions, not the encoded empty text (SDXL).
    """

    mode: str
    default: float = 1.0
    range: tuple[float, float] = (1.0, 1.0)
    zero_empty: bool = False


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """How one tokenizer of the model reads a prompt: the k-th gives `ids` (k = 1), `ids_2`, `ids_3`.

    tokenizer: its folder. length: tokens it is padded to, None for the tokenizer's own limit. mask: whether the network
    also takes the mask of real tokens (`mask`, `mask_2`, ...). prefix, suffix: text put around every prompt. lower: the
    prompt is stripped and put in small letters first. cut: longer prompts are cut, since another input reads the rest;
    else they are refused. keep: the network sees so many of the tokens, and is told which (`keep`, `keep_2`, ...): the
    first and, behind the prefix, the last; a negative prompt is then read without prefix and suffix (SANA).
    """

    tokenizer: str = "tokenizer"
    length: int | None = None
    mask: bool = False
    prefix: str = ""
    suffix: str = ""
    lower: bool = False
    cut: bool = False
    keep: int | None = None


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """LCM's boundary scalings: c_skip = sd^2 / ((k t)^2 + sd^2), c_out = k t / sqrt((k t)^2 + sd^2)."""

    sigma_data: float = 0.5
    timestep_scaling: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Latent:
    """A latent is [channels, height/factor, width/factor]; a decoder sees `latent / scale + shift`."""

    channels: int
    factor: int
    scale: float
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Spacing:
    """For teachers, whose step count is free: the rule that makes a grid of any count up to `max_steps`."""

    kind: str
    max_steps: int = 100
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """Measured quality at one step count. `nfe` counts network evaluations per picture, guidance included."""

    steps: int
    nfe: int
    guidance: float
    frechet: float
    compliance: float
    diversity: float
    pictures: int


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """A request and where its picture's latent is kept (`golden/<file>`, safetensors key `latent`)."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    file: str
    control: str | None = None
    tolerance: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """How to sample one model. See the module text for conventions.

    grids: step count -> the exact times of its evaluations, noisiest first. origin_steps: how many evenly spaced times
    the student was trained on (LCM, TCD), from which a picture that begins from another takes its grid; None where only
    the grids' own times were. sampler: the update between them
    (`fewstep.runtime.sampling.samplers`). gamma: TCD's stochasticity, and the phase edges' for none. final_alpha_one:
    whether the last step lands on clean data (else on the path's least noisy time, as diffusers'
    `set_alpha_to_one=False`). start: the noise a picture begins with is of size 1 ("unit") or sigma at the first time
    ("sigma"). text: how prompts become token ids. size_ids: the picture-size condition that the network takes ("sdxl":
    height, width, crop 0 0, height, width; "pixart": height, width, height/width), or None. control_kinds: what a
    ControlNet-Union's control types are called, in its order; empty where a control picture is of one kind only. clip:
    bound on |x0| in latent units, or None. tiny_decoder: the step counts whose pictures the component `tiny_decoder/`
    decodes. second_time: whether the network is also told where each step lands (`fewstep.models.second_time`).
    """

    version: int = SPEC_VERSION
    prediction: str
    path: Path
    sampler: str
    grids: Mapping[int, tuple[float, ...]]
    spacing: Spacing | None = None
    stochastic: bool
    origin_steps: int | None = None
    gamma: float | None = None
    phases: int | None = None
    final_alpha_one: bool = True
    start: str = "unit"
    text: tuple[TextInput, ...] = (TextInput(),)
    size_ids: str | None = None
    guidance: Guidance
    boundary: Boundary | None = None
    latent: Latent
    sizes: tuple[tuple[int, int], ...]
    clip: float | None = None
    control_kinds: tuple[str, ...] = ()
    tiny_decoder: tuple[int, ...] = ()
    second_time: bool = False
    recipe: str
    teacher: str | None = None
    quality: tuple[QualityRow, ...] = ()
    golden: tuple[GoldenCase, ...] = ()

    def __post_init__(self) -> None:
        if self.version != SPEC_VERSION:
            raise SpecError(f"version is {self.version!r}; this release reads version {SPEC_VERSION}: upgrade fewstep")
        check_prediction(self.prediction, self.path)
        _one_of("sampler", self.sampler, SAMPLERS)
        _one_of("guidance.mode", self.guidance.mode, GUIDANCE_MODES)
        _one_of("start", self.start, STARTS)
        if self.size_ids is not None:
            _one_of("size_ids", self.size_ids, SIZE_IDS)
        if not self.text:
            raise SpecError("text is empty; name at least one tokenizer")
        for read in self.text:
            if read.keep is not None and not 0 < read.keep <= (read.length or 0):
                raise SpecError(f"text.keep is {read.keep}; it must be 1 to text.length, which is {read.length}")
        low, high = self.guidance.range
        if not low <= self.guidance.default <= high:
            raise SpecError(f"guidance.default is {self.guidance.default}; it must lie in guidance.range {[low, high]}")
        if self.guidance.mode == "none" and (low, high) != (1.0, 1.0):
            raise SpecError(f"guidance.range is {[low, high]}; a model of guidance.mode 'none' takes only [1.0, 1.0]")
        if not self.grids and self.spacing is None:
            raise SpecError("grids is empty; give the time grid of at least one step count, or a spacing rule")
        for steps, grid in self.grids.items():
            self._check_grid(steps, grid)
        if self.spacing is not None:
            self._check_spacing(self.spacing)
        if self.sampler == "tcd" and self.gamma is None:
            raise SpecError("gamma is missing; the 'tcd' sampler needs it (0 is deterministic, 0.3 is TCD's default)")
        if self.sampler == "phased" and not self.phases:
            raise SpecError("phases is missing; the 'phased' sampler needs the number of trained phases")
        if self.stochastic != (self.sampler in STOCHASTIC or (self.sampler == "tcd" and self.gamma != 0.0)):
            raise SpecError(f"stochastic is {self.stochastic}; that is not so of the {self.sampler!r} sampler")
        if self.second_time and self.sampler == "dpmpp-2m":
            raise SpecError("second_time is true, and the 'dpmpp-2m' sampler reads one estimate twice; use 'ddim'")
        self._check_numbers()
        if len(set(self.control_kinds)) != len(self.control_kinds) or not all(self.control_kinds):
            raise SpecError(f"control_kinds is {list(self.control_kinds)}; name each control type once")
        if not self.sizes:
            raise SpecError("sizes is empty; name at least one [width, height] in pixels")
        for size in self.sizes:
            if any(side <= 0 or side % self.latent.factor for side in size):
                raise SpecError(f"sizes holds {list(size)}; each side must be a multiple of {self.latent.factor}")

    def _check_grid(self, steps: int, grid: tuple[float, ...]) -> None:
        if steps < 1:
            raise SpecError(f"grids.{steps} is for {steps} steps; step counts start at 1")
        if steps != len(grid):
            raise SpecError(f"grids.{steps} has {len(grid)} times; a grid of {steps} steps needs exactly {steps}")
        if any(b >= a for a, b in itertools.pairwise(grid)):
            raise SpecError(f"grids.{steps} is {list(grid)}; times must fall strictly, noisiest first")
        if not all(math.isfinite(t) and self.path.end <= t <= self.path.start for t in grid):
            raise SpecError(f"grids.{steps} is {list(grid)}; times lie between {self.path.end} and {self.path.start}")

    def _check_numbers(self) -> None:
        above_zero = {"clip": self.clip, "phases": self.phases}
        for part in ("latent", "boundary"):
            above_zero |= {f"{part}.{k}": v for k, v in _plain(getattr(self, part) or {}).items() if k != "shift"}
        for name, value in above_zero.items():
            if value is not None and not value > 0:
                raise SpecError(f"{name} is {value}; it must be above 0")
        if self.origin_steps is not None and (self.path.kind != "vp" or not 1 <= self.origin_steps <= self.path.start):
            raise SpecError(
                f"origin_steps is {self.origin_steps}; it counts times of a 'vp' path, 1 to {self.path.start}"
            )
        if self.gamma is not None and not 0.0 <= self.gamma <= 1.0:
            raise SpecError(f"gamma is {self.gamma}; use 0 (deterministic) to 1 (as stochastic as LCM)")

    def _check_spacing(self, spacing: Spacing) -> None:
        _one_of("spacing.kind", spacing.kind, SPACINGS)
        if self.path.kind != "vp":
            raise SpecError(f"spacing is defined on the 'vp' path, not on {self.path.kind!r}; give grids instead")
        most = int(self.path.start) + 1
        if not 1 <= spacing.max_steps <= most:
            raise SpecError(f"spacing.max_steps is {spacing.max_steps}; it must be 1 to {most}")
        if not 0 <= spacing.offset < most // spacing.max_steps:
            raise SpecError(f"spacing.offset is {spacing.offset}; it must be 0 to {most // spacing.max_steps - 1}")

    @property
    def steps(self) -> tuple[int, ...]:
        """The step counts with a grid of their own, rising."""
        return tuple(sorted(self.grids))

    def allows(self, steps: int) -> bool:
        return steps in self.grids or (self.spacing is not None and 1 <= steps <= self.spacing.max_steps)

    def decoder_role(self, steps: int | None) -> str:
        """What decodes pictures of so many steps, where an engine has it, and in graphs of whole requests."""
        return DECODER_TINY if steps in self.tiny_decoder else DECODER

    def to_json(self) -> dict[str, Any]:
        data = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "path"}
        data["path"] = path_to_json(self.path)
        data["grids"] = {str(k): list(v) for k, v in sorted(self.grids.items())}
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "SamplerSpec":
        """Read and check a spec.

        Errors: `SpecError` naming the unknown, missing or impossible field.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"spec is {data!r}; it must be an object")
        settings = dict(data)
        if settings.get("version", SPEC_VERSION) != SPEC_VERSION:
            raise SpecError(f"version is {settings['version']!r}; this release reads version {SPEC_VERSION}")
        for name in ("path", "grids"):
            if name in settings and not isinstance(settings[name], Mapping):
                raise SpecError(f"{name} is {settings[name]!r}; it must be an object")
        if "path" in settings:
            settings["path"] = path_from_json(settings["path"])
        if "grids" in settings:
            settings["grids"] = {
                _count(k): _convert(tuple[float, ...], v, f"grids.{k}") for k, v in settings["grids"].items()
            }
        spec: SamplerSpec = _read(SamplerSpec, settings, "")
        return spec


def _count(key: Any) -> int:
    try:
        return int(key)
    except ValueError:
        raise SpecError(f"grids has the key {key!r}; keys are step counts") from None


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{name} is {value!r}; use one of {', '.join(allowed)}")


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {k: _plain(v) for k, v in asdict(value).items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def _read(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    """Build a frozen dataclass from JSON, strictly: names, presence and types are checked."""
    known = {f.name: f for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(data) - set(known)):
        raise SpecError(f"{where}{unknown[0]} is not a known field; known are {', '.join(known)}")
    values = {}
    for name, spec in known.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], where + name)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise SpecError(f"{where}{name} is missing; a spec states it, since a server does not guess")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        if value is None and NoneType in args:
            return None
        return _convert(next(a for a in args if a is not NoneType), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SpecError(f"{where} is {value!r}; it must be a list")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise SpecError(f"{where} has {len(value)} entries; it must have {len(kinds)}")
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if hasattr(hint, "__dataclass_fields__"):
        if not isinstance(value, Mapping):
            raise SpecError(f"{where} is {value!r}; it must be an object")
        return _read(hint, value, where + ".")
    if hint is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise SpecError(f"{where} is {value!r}; it must be a finite number")
        return float(value)
    if hint in (int, float, str, bool) and (type(value) is not hint):
        raise SpecError(f"{where} is {value!r}; it must be {hint.__name__}")
    return value
