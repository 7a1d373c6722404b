"""A diffusers scheduler's settings as fields of a `SamplerSpec`; the scheduler itself makes the time grids.

What this release cannot sample exactly as diffusers does is refused by the setting's name, never approximated.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BundleError
from .paths import VP, Path, RectifiedFlow, TrigFlow
from .spec import Boundary, Spacing

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
PREDICTION_TYPES = {ours: theirs for theirs, ours in PREDICTIONS.items()}
"""What a spec calls a prediction -> diffusers' `prediction_type`."""
MOST_GRIDS = 8
"""Step counts that are stated one by one. A model of more, every one from 1 on, is a teacher, and has a rule."""
SetTimes = Callable[[Any, int, tuple[int, int]], None]
"""(scheduler, steps, (width, height)): how a family's pipeline sets its scheduler's times."""
Fields = dict[str, Any]


def plain_times(scheduler: Any, steps: int, size: tuple[int, int]) -> None:
    """Most pipelines leave it to the scheduler."""
    scheduler.set_timesteps(steps)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the importer asks of a scheduler. grids: stated times that take the place of the scheduler's own."""

    steps: tuple[int, ...]
    size: tuple[int, int]
    grids: Mapping[int, tuple[float, ...]]
    gamma: float | None = None
    set_times: SetTimes = plain_times


def sampling_of(config: Mapping[str, Any], wanted: Wanted) -> Fields:
    """Fields of a spec: prediction, path, sampler, grids or spacing, and what goes with them.

    Errors: `BundleError` naming the scheduler's class or the setting that cannot be sampled exactly.
    """
    name = config.get("_class_name", "?")
    if name not in READERS:
        raise BundleError(
            f"scheduler/scheduler_config.json names {name!r}, which this release does not sample; "
            f"say --sampler ddim (or {', '.join(s for s in SAMPLER_CLASSES if s != 'ddim')}) to sample it another way"
        )
    import diffusers

    try:  # absent settings have diffusers' defaults
        filled = dict(getattr(diffusers, name).from_config(dict(config)).config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BundleError(f"scheduler/scheduler_config.json is refused by diffusers' own {name}: {error}") from error
    return READERS[name]({**filled, "_class_name": name}, wanted)


def _lcm(config: Mapping[str, Any], wanted: Wanted) -> Fields:
    _only(config, clip_sample=False, thresholding=False)
    scaling = float(config.get("timestep_scaling", 10.0))
    return {
        **_vp(config),
        "sampler": "lcm",
        "stochastic": True,
        "boundary": Boundary(sigma_data=0.5, timestep_scaling=scaling),
        "grids": _grids("LCMScheduler", config, wanted),
        "origin_steps": config.get("original_inference_steps"),
    }


def _tcd(config: Mapping[str, Any], wanted: Wanted) -> Fields:
    _only(config, clip_sample=False, thresholding=False)
    gamma = 0.3 if wanted.gamma is None else wanted.gamma  # the default eta of diffusers' TCDScheduler.step
    grids = _grids("TCDScheduler", config, wanted)
    fields = {**_vp(config), "sampler": "tcd", "gamma": gamma, "stochastic": gamma != 0.0, "grids": grids}
    return fields | {"final_alpha_one": False, "origin_steps": config.get("original_inference_steps")}


def _ddim(config: Mapping[str, Any], wanted: Wanted) -> Fields:
    _only(config, clip_sample=False, thresholding=False)
    fields = {**_vp(config), "sampler": "ddim", "stochastic": False}
    fields["final_alpha_one"] = bool(config.get("set_alpha_to_one", True))
    steps, any_count = wanted.steps, wanted.steps == tuple(range(1, len(wanted.steps) + 1))
    if wanted.grids and (set(steps) <= set(wanted.grids) or (any_count and len(steps) > MOST_GRIDS)):
        return fields | {"grids": dict(wanted.grids)}
    kind = config.get("timestep_spacing", "leading")
    if kind not in ("trailing", "leading"):
        raise _cannot("timestep_spacing", kind, "trailing or leading")
    grids = _grids("DDIMScheduler", config, wanted)
    total = int(config.get("num_train_timesteps", 1000))
    strays = [n for n in steps if n not in wanted.grids and _strays(grids[n], total // n)]
    if any_count and not wanted.grids and (strays or len(steps) > MOST_GRIDS):
        offset = int(config.get("steps_offset", 0)) if kind == "leading" else 0
        return fields | {"grids": {}, "spacing": Spacing(kind=kind, max_steps=len(steps), offset=offset)}
    if strays:
        raise BundleError(
            f"DDIM's {kind} times of {strays[0]} steps are {list(grids[strays[0]])}, and diffusers lands "
            f"{total // strays[0]} below each, not on the next: leave {strays[0]} out of --steps (counts that divide "
            f"{total} fit), or say --steps 1-{strays[0]} for a model of every count"
        )
    return fields | {"grids": {**wanted.grids, **grids}}


def _strays(grid: tuple[float, ...], stride: int) -> bool:
    """Whether diffusers' DDIM, which lands `stride` below each time, lands elsewhere than a grid: on its next time,
    and from the last one on clean data."""
    return any(t - stride != to for t, to in itertools.pairwise(grid)) or grid[-1] >= stride


def _euler(config: Mapping[str, Any], wanted: Wanted) -> Fields:
    _only(
        config, use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
        interpolation_type="linear", timestep_type="discrete", sigma_min=None, sigma_max=None,
    )  # fmt: skip
    name = str(config["_class_name"])
    ancestral = name == "EulerAncestralDiscreteScheduler"
    spacing = config.get("timestep_spacing", "linspace")
    return {
        **_vp(config),
        "sampler": "euler-ancestral" if ancestral else "euler",
        "stochastic": ancestral,
        "grids": _grids(name, config, wanted),
        "start": "unit" if spacing == "leading" else "sigma",
        "final_alpha_one": config.get("final_sigmas_type", "zero") == "zero",
    }


def _dpm(config: Mapping[str, Any], wanted: Wanted) -> Fields:
    _only(
        config, algorithm_type="dpmsolver++", solver_type="midpoint", thresholding=False, use_karras_sigmas=False,
        use_exponential_sigmas=False, use_beta_sigmas=False, use_lu_lambdas=False, lower_order_final=True,
        euler_at_final=False, final_sigmas_type="zero", variance_type=None, use_dynamic_shifting=False,
    )  # fmt: skip
    if config.get("solver_order", 2) != 2:
        raise _cannot("solver_order", config["solver_order"], "2")
    fields = {"sampler": "dpmpp-2m", "stochastic": False}
    if config.get("use_flow_sigmas"):
        grids = _grids("DPMSolverMultistepScheduler", config, wanted, sigmas=True)
        return fields | {"path": RectifiedFlow(), "prediction": "flow", "grids": grids}
    return fields | _vp(config) | {"grids": _grids("DPMSolverMultistepScheduler", config, wanted)}


def _flow_euler(config: Mapping[str, Any], wanted: Wanted) -> Fields:
    _only(
        config, use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False, invert_sigmas=False,
        stochastic_sampling=False,
    )  # fmt: skip
    grids = _grids("FlowMatchEulerDiscreteScheduler", config, wanted, sigmas=True)
    return {"path": RectifiedFlow(), "prediction": "flow", "sampler": "euler", "stochastic": False, "grids": grids}


def _scm(config: Mapping[str, Any], wanted: Wanted) -> Fields:
    _only(config, prediction_type="trigflow")
    path = TrigFlow(sigma_data=1.0)  # latents here are diffusers' over its sigma_data, as the decoder takes them
    grids = {n: tuple(min(t, path.start) for t in g) for n, g in _grids("SCMScheduler", config, wanted).items()}
    return {"path": path, "prediction": "trig", "sampler": "trig", "stochastic": True, "grids": grids}


READERS: dict[str, Callable[[Mapping[str, Any], Wanted], Fields]] = {
    "LCMScheduler": _lcm,
    "TCDScheduler": _tcd,
    "DDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler,
    "DPMSolverMultistepScheduler": _dpm,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "SCMScheduler": _scm,
}
SAMPLER_CLASSES = {
    "ddim": "DDIMScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
}
"""`--sampler` -> the scheduler that takes the place of the folder's own."""


def replaced_scheduler(config: Mapping[str, Any], sampler: str, prediction: str | None) -> dict[str, Any]:
    """The settings of another scheduler on the same noise table: what diffusers' `from_config` makes of them, with the
    trailing spacing that few steps need (Lin et al. 2023), no clipping, and clean data at the end.

    Errors: `BundleError` where the folder's scheduler has no table of betas.
    """
    import diffusers

    if sampler not in SAMPLER_CLASSES:
        raise BundleError(f"--sampler is {sampler!r}; use one of {', '.join(SAMPLER_CLASSES)}")
    if "beta_schedule" not in config:
        raise BundleError(
            f"--sampler {sampler} needs a noise table, and {config.get('_class_name')} has none: leave it"
        )
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    kept = {name: config[name] for name in names if name in config}
    if prediction is not None:
        kept["prediction_type"] = PREDICTION_TYPES[prediction]
    cls = getattr(diffusers, SAMPLER_CLASSES[sampler])
    if sampler in ("ddim", "lcm", "tcd"):
        kept |= {"clip_sample": False, "set_alpha_to_one": True}
    if sampler not in ("lcm", "tcd"):
        kept["timestep_spacing"] = "trailing"
    made = cls(**kept, steps_offset=1)
    return {"_class_name": cls.__name__, **{k: v for k, v in made.config.items() if not k.startswith("_")}}


def _vp(config: Mapping[str, Any]) -> Fields:
    _only(config, trained_betas=None, rescale_betas_zero_snr=False)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise _cannot("prediction_type", prediction, ", ".join(PREDICTIONS))
    path: Path = VP(
        num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
        beta_start=float(config.get("beta_start", 0.0001)),
        beta_end=float(config.get("beta_end", 0.02)),
        beta_schedule=str(config.get("beta_schedule", "linear")),
    )
    return {"prediction": PREDICTIONS[prediction], "path": path}


def _grids(
    name: str, config: Mapping[str, Any], wanted: Wanted, *, sigmas: bool = False
) -> dict[int, tuple[float, ...]]:
    """The times of each step count, from the stated ones or the scheduler's own; sigmas: those are the path's times."""
    import diffusers

    grids = {}
    for steps in wanted.steps:
        if steps in wanted.grids:
            grids[steps] = wanted.grids[steps]
            continue
        scheduler = getattr(diffusers, name).from_config(dict(config))
        try:
            wanted.set_times(scheduler, steps, wanted.size)
        except ValueError as error:
            raise BundleError(f"{name} has no times of {steps} steps: {error}") from error
        found: Sequence[Any] = scheduler.sigmas if sigmas else scheduler.timesteps
        times = [float(t) for t in found][:steps]
        if not sigmas and name != "SCMScheduler" and any(t != math.floor(t) for t in times):
            raise _cannot("timestep_spacing", config.get("timestep_spacing"), f"whole times, unlike {times}")
        grids[steps] = tuple(times)
    return grids


def _only(config: Mapping[str, Any], **allowed: Any) -> None:
    """Refuse a setting that departs from the one value that is sampled exactly."""
    for name, value in allowed.items():
        if name in config and config[name] != value and not (value is False and config[name] is None):
            raise _cannot(name, config[name], repr(value))


def _cannot(name: str, value: Any, able: str) -> BundleError:
    return BundleError(
        f"scheduler/scheduler_config.json has {name} = {value!r}; this release samples {able}: "
        "change it there, or say --sampler to sample another way"
    )
