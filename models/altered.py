"""Networks of diffusers' classes that were changed: what their config says beside diffusers' own fields, made again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import guidance_adapter, linear_attention, negative_adapter, second_time
from .errors import BundleError
from .pipeline_folder import SECOND_TIME

ALTERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    linear_attention.FIELD: linear_attention.alter,
    guidance_adapter.FIELD: guidance_adapter.adapt,
    negative_adapter.FIELD: negative_adapter.add_negative,
    SECOND_TIME: second_time.add_second_time,
}
"""Field of a config -> (network, its value) -> the same network changed in place; `BundleError` for a bad value."""


def alterations(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a network's config that say how it was changed."""
    return tuple(field for field in ALTERATIONS if field in config)


def library_of(config: Mapping[str, Any]) -> str | None:
    """The module that `model_index.json` names for a changed network, in which diffusers finds no class; else None."""
    found = alterations(config)
    return ALTERATIONS[found[0]].__module__ if found else None


def remade(cls: Any, config: Mapping[str, Any]) -> Any:
    """A network with random weights of a config, its changes included.

    Errors: `BundleError` for a change that is not known.
    """
    fields = alterations(config)
    network = cls.from_config({name: value for name, value in config.items() if name not in fields})
    for field in fields:
        network = ALTERATIONS[field](network, config[field])
    return network


def load_altered(cls: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """The changed network of a folder, float32, every weight present, for evaluation.

    Errors: `BundleError` for a change that is not known, and for weights that are missing, unexpected or misshapen.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model = remade(cls, config)
    except BundleError as error:
        raise BundleError(f"{folder}/config.json: {error}") from error
    try:
        model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BundleError(f"{folder} cannot be loaded: {error}") from error
    return model.requires_grad_(False).eval()
