"""A diffusers pipeline folder on disk: its class, its list of components, and the exchange of one of them."""

import json
import shutil
from pathlib import Path
from typing import Any

from .errors import BundleError

SECOND_TIME = "fewstep_second_time"
"""In a denoiser's config: it takes a second time (`fewstep.models.second_time`)."""
WEIGHTS = (".safetensors", ".safetensors.index.json")
BESIDE = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
"""Components of a pipeline that make no part of the picture here, and that no checkpoint file holds."""


def pipeline_class(root: Path) -> Any:
    """The diffusers class that `model_index.json` names.

    Errors: `BundleError` where there is none.
    """
    import diffusers

    name = read_index(root).get("_class_name")
    found = getattr(diffusers, str(name), None)
    if found is None:
        raise BundleError(f"{root}/model_index.json names the pipeline {name!r}, which the installed diffusers lacks")
    return found


def read_index(root: Path) -> dict[str, Any]:
    """`model_index.json`.

    Errors: as `read_config`.
    """
    return read_config(root, "", "model_index.json")


def read_config(root: Path, component: str, file: str = "config.json") -> dict[str, Any]:
    """A component's settings.

    Errors: `BundleError` where the file is missing or holds no JSON object.
    """
    path = root / component / file
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error}); a diffusers folder holds it") from error
    if not isinstance(found, dict):
        raise BundleError(f"{path} holds a {type(found).__name__}; settings are a JSON object")
    return found


def list_component(root: Path, name: str, library: str, cls: str) -> None:
    """Name a component's class in `model_index.json`, where that pipeline has the component at all."""
    index = read_index(root)
    if name in index:
        index[name] = [library, cls]
        path = root / "model_index.json"
        path.unlink()  # it may be a hard link to the source's
        path.write_text(json.dumps(index, indent=1) + "\n")


def replace_weights(folder: Path, model: Any) -> None:
    """Write a component's weights anew. Old files go first: they may be hard links, or shards of another number."""
    for path in sorted(folder.iterdir()):
        if path.name.endswith(WEIGHTS) or path.name == "config.json":
            path.unlink()
    model.save_pretrained(folder)


def copy_component(source: Path, to: Path) -> None:
    """A component's `config.json` and safetensors in place of whatever stands at `to`.

    Errors: `BundleError` where the source is no component's folder, or its weights are not safetensors.
    """
    if not (source / "config.json").is_file():
        raise BundleError(f"{source} has no config.json; name the folder of one diffusers component")
    weights = [path for path in sorted(source.iterdir()) if path.name.endswith(WEIGHTS)]
    if not weights:
        raise BundleError(f"{source} holds no safetensors; convert its weights: a pickle may run code")
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for path in (source / "config.json", *weights):
        shutil.copyfile(path, to / path.name)
