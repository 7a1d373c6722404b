"""diffusers' own pipeline over a bundle's folder, called so that it must make the bundle's picture.

The measure of exactness (`fewstep families`) and of latency (`fewstep bench latency`) call it the same way.
"""

import inspect
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import EngineUnavailable

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle


def pipeline_name(bundle: "Bundle") -> str:
    """The diffusers pipeline that the bundle's folder is.

    Errors: `EngineUnavailable` where its `model_index.json` names none.
    """
    try:
        return str(json.loads((bundle.root / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise EngineUnavailable(
            f"{bundle.root}/model_index.json names no pipeline ({error!r}); diffusers needs it"
        ) from error


def open_pipeline(bundle: "Bundle") -> Any:
    """The pipeline, eager, float32, without a progress bar."""
    import diffusers
    import torch

    with hushed():
        maker = getattr(diffusers, pipeline_name(bundle))
        pipeline = maker.from_pretrained(bundle.root, local_files_only=True, use_safetensors=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_settings(bundle: "Bundle", pipeline: Any, steps: int, *, guidance: float | None = None) -> dict[str, Any]:
    """Arguments of the pipeline's call that make it sample as the bundle's spec says, beside prompt and generator."""
    spec = bundle.spec
    width, height = spec.sizes[0]
    scale = spec.guidance.default if guidance is None else guidance
    if type(pipeline).__name__ == "ZImagePipeline":
        scale -= 1.0  # it counts guidance from 0: c + g (c - u)
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "width": width,
        "height": height,
    }
    if spec.sampler == "lcm" and steps in spec.grids:
        own = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        own.set_timesteps(steps)
        if tuple(map(float, own.timesteps)) != spec.grids[steps]:
            settings["timesteps"] = [int(t) for t in spec.grids[steps]]
    if spec.gamma is not None:
        settings["eta"] = spec.gamma
    wanted = {
        "use_resolution_binning": False,  # else the asked size is silently another one
        "clean_caption": False,
        "max_sequence_length": _longest(bundle),
        "intermediate_timesteps": 1.3 if steps == 2 else None,  # SANA-Sprint refuses it for other counts
    }
    known = inspect.signature(pipeline.__call__).parameters
    return settings | {name: value for name, value in wanted.items() if name in known and value != ()}


def open_named(name: str) -> tuple[Any, dict[int, dict[str, Any]]]:
    """The pipeline of a bundle folder or short name, and by step count the arguments of its call.

    Errors: `BundleError`; those of `open_pipeline`.
    """
    from fewstep.models.bundle import load_bundle

    bundle = load_bundle(name)
    pipeline = open_pipeline(bundle)
    return pipeline, {steps: call_settings(bundle, pipeline, steps) for steps in bundle.spec.steps}


def can_sample(pipeline: Any, steps: int) -> bool:
    """Whether diffusers 0.42 samples that many steps: at one, PixArt-alpha's pipeline asks its scheduler for a clean
    estimate, which DPM-Solver does not give."""
    asks = type(pipeline).__name__ == "PixArtAlphaPipeline" and steps == 1
    return not (asks and type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler")


@contextmanager
def hushed() -> Iterator[None]:
    """Without the remarks of diffusers and transformers on packages and classes that nobody here chose."""
    import diffusers
    import transformers

    settings = [(house.utils.logging, house.utils.logging.get_verbosity()) for house in (diffusers, transformers)]
    for logging, _ in settings:
        logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "The custom timestep schedule")
            yield
    finally:
        for logging, verbosity in settings:
            logging.set_verbosity(verbosity)


def _longest(bundle: "Bundle") -> Any:
    """What the pipeline calls `max_sequence_length`: the last tokenizer's tokens, or those of them that are kept."""
    text = bundle.spec.text[-1]
    return text.keep or text.length or ()
