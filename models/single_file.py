"""One `.safetensors` checkpoint in its trainer's own layout (SD 1.x, 2.x, SDXL, ...) becomes a diffusers folder.

By diffusers' single-file loading, which needs to know the base: its settings and tokenizers are read from a local
folder of it and never downloaded. That folder's weights are not read, and need not be there.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from .bundle import load_component
from .errors import BundleError
from .files import open_safetensors
from .pipeline_folder import BESIDE, pipeline_class, read_index

SETTINGS = (".json", ".txt", ".model")


def open_single_file(path: Path, out: Path, config: Path) -> Path:
    """Write the diffusers folder `out` from the checkpoint `path` and the settings in the folder `config`.

    config: a diffusers folder of the same base, or only its JSON and tokenizer files.

    Errors: `BundleError` where the file is a pickle or unreadable, the settings are missing, or the two are of other
    bases, with both sides. `out` appears only when whole.
    """
    with open_safetensors(path) as file:
        names = list(file.keys())
    if not (config / "model_index.json").is_file():
        raise BundleError(
            f"{config} has no model_index.json; name with --config a local diffusers folder of the checkpoint's base "
            "(only its JSON and tokenizer files are read)"
        )
    if out.exists():
        raise BundleError(f"{out} exists already; delete it or name another --out")
    pipeline = pipeline_class(config)
    if not hasattr(pipeline, "from_single_file"):
        raise BundleError(f"{config} is a {pipeline.__name__}, and diffusers opens no single file of it")
    beside = out.with_name(out.name + ".opening")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory() as settings:
            _copy_settings(config, Path(settings))
            opened = _open(pipeline, path, Path(settings), config, names)
            opened.save_pretrained(beside)
        for component in _networks(opened):
            load_component(beside, component)
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out


def _open(pipeline: Any, path: Path, settings: Path, config: Path, names: list[str]) -> Any:
    """The pipeline with every weight from the file."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    absent = {name: None for name in BESIDE if name in read_index(config)}
    try:
        opened = pipeline.from_single_file(str(path), config=str(settings), local_files_only=True, **absent)
    except (OSError, ValueError, KeyError, RuntimeError, IndexError, SingleFileComponentError) as error:
        # torch's words for a weight that the file did not give
        why = "it lacks weights of that base" if "meta tensor" in str(error) else str(error)
        raise BundleError(
            f"{path} (its first tensor is {names[0] if names else 'none'!r}) is no checkpoint of {config}, a "
            f"{pipeline.__name__}: {why}: name with --config a folder of the checkpoint's own base"
        ) from error
    for component, network in _networks(opened).items():
        if missing := [name for name, value in network.named_parameters() if value.is_meta]:
            raise BundleError(
                f"{path} lacks {component}.{missing[0]}, which {config}/{component} has: "
                "name with --config a folder of the checkpoint's own base"
            )
    return opened


def _networks(opened: Any) -> dict[str, Any]:
    from torch import nn

    return {name: part for name, part in opened.components.items() if isinstance(part, nn.Module)}


def _copy_settings(config: Path, to: Path) -> None:
    for path in config.glob("*.json"):
        shutil.copyfile(path, to / path.name)
    for folder in (path for path in config.iterdir() if path.is_dir() and path.name not in BESIDE):
        (to / folder.name).mkdir()
        for path in folder.iterdir():
            if path.suffix in SETTINGS and not path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, to / folder.name / path.name)
