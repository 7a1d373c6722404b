"""LoRA files merged into a diffusers folder, each with its stated weight: W <- W + sum of weight_i dW_i.

Files in the formats that diffusers reads (its own, PEFT's, kohya's), by diffusers' own converters. The merged folder
gives what its pipeline gives with `load_lora_weights` and `set_adapters`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from .bundle import load_component
from .errors import BundleError
from .files import open_safetensors, sha256_of
from .net_lora import CLASS, lora_names
from .pipeline_folder import pipeline_class, read_config, replace_weights

OTHER_KINDS = {"dora_scale": "DoRA", ".lokr_": "LoKr", ".hada_": "LoHa"}
"""Part of a tensor's name -> the kind of adapter it belongs to, which is no LoRA."""


@dataclass(frozen=True)
class _Lora:
    """A file as diffusers reads it: tensors named "component.layer...", with the alphas or settings beside them."""

    path: Path
    weight: float
    state: Mapping[str, Tensor]
    alphas: Mapping[str, float] | None
    metadata: Mapping[str, Any] | None

    def of(self, component: str) -> dict[str, Tensor]:
        """The tensors of one component, by layer."""
        prefix = component + "."
        return {name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}


def merge_loras(root: Path, loras: Sequence[tuple[Path, float]]) -> tuple[dict[str, Any], ...]:
    """Merge LoRA files (path, weight) into the components of the diffusers folder `root`, which is changed in place.

    Changed weights are new files in float32, so that hard links to others stay whole. Returns what was merged:
    {"kind": "lora", "file", "sha256", "weight"} each.

    Errors: `BundleError` where a file is missing, a pickle, no LoRA or one for another base; nothing is changed then.
    """
    pipeline = pipeline_class(root)
    if not hasattr(pipeline, "lora_state_dict"):
        raise BundleError(f"{root} is a {pipeline.__name__}, and diffusers has no LoRA for it: leave the LoRA out")
    found = [_read(root, pipeline, Path(path), weight) for path, weight in loras]
    components = [name for name in pipeline._lora_loadable_modules if (root / name / "config.json").is_file()]
    for lora in found:
        _check_components(root, lora, components)
    merged = {}
    for component in components:
        touching = [lora for lora in found if lora.of(component)]
        if touching:
            model = load_component(root, component)
            for lora in touching:
                _check_layers(root / component, model, lora, component)
            for lora in touching:
                _merge(pipeline, component, model, lora)
            merged[component] = model
    for component, model in merged.items():
        replace_weights(root / component, model)
    return tuple(
        {"kind": "lora", "file": lora.path.name, "sha256": sha256_of(lora.path), "weight": lora.weight}
        for lora in found
    )


def register_lora(root: Path, name: str, path: Path) -> dict[str, Any]:
    """Put a LoRA file beside the folder's U-Net, to be mixed row by row (`fewstep.models.net_lora`) under a name.

    Returns {"kind": "lora by row", "name", "file", "sha256"}.

    Errors: as `merge_loras`; `BundleError` too where it changes more than the U-Net, or the name is taken.
    """
    folder = root / "loras"
    names = list(lora_names(folder)) if folder.is_dir() else []
    if name in names or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise BundleError(f"LoRA name {name!r} is taken or not made of letters, digits, - and _: take another")
    pipeline = pipeline_class(root)
    if not hasattr(pipeline, "lora_state_dict") or not (root / "unet" / "config.json").is_file():
        raise BundleError(f"{root} has no U-Net that takes LoRAs by row: merge it with --lora")
    lora = _read(root, pipeline, Path(path), 1.0)
    if stray := [key for key in lora.state if not key.startswith("unet.")]:
        raise BundleError(f"{path} changes {stray[0]!r}; by row only the U-Net can be changed: use --lora")
    unet = load_component(root, "unet")
    _check_layers(root / "unet", unet, lora, "unet")
    tensors = _low_rank(unet, lora)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": CLASS, "names": [*names, name]}) + "\n")
    return {"kind": "lora by row", "name": name, "file": lora.path.name, "sha256": sha256_of(lora.path)}


def _low_rank(unet: Any, lora: _Lora) -> dict[str, Tensor]:
    """ "layer.a" and "layer.b" of every layer, the LoRA's own scale in b, as PEFT reads the file."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    unet.load_lora_adapter(
        dict(lora.state), prefix="unet", network_alphas=lora.alphas, adapter_name="lora", metadata=lora.metadata
    )
    found = {}
    for layer, module in unet.named_modules():
        if isinstance(module, BaseTunerLayer) and "lora" in module.lora_A:
            found[f"{layer}.a"] = module.lora_A["lora"].weight.detach().contiguous()
            found[f"{layer}.b"] = (module.lora_B["lora"].weight * module.scaling["lora"]).detach().contiguous()
    return found


def _read(root: Path, pipeline: Any, path: Path, weight: float) -> _Lora:
    if not math.isfinite(weight):
        raise BundleError(f"the weight of {path.name} is {weight}; it must be a finite number, 1 as trained")
    with open_safetensors(path) as file:
        names = list(file.keys())
    for part, kind in OTHER_KINDS.items():
        if any(part in name for name in names):
            raise BundleError(f"{path} is a {kind}, not a LoRA: merge it where it was made and import the result")
    settings = {"local_files_only": True, "use_safetensors": True, "return_lora_metadata": True, "return_alphas": True}
    try:
        out = pipeline.lora_state_dict(
            str(path.parent), weight_name=path.name, unet_config=_unet_config(root), **settings
        )
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise BundleError(f"{path} is no LoRA for a {pipeline.__name__}: {error}") from error
    state, metadata = out[0], out[-1]
    return _Lora(path, weight, state, out[1] if len(out) == 3 else None, metadata)


def _unet_config(root: Path) -> Any:
    """The U-Net's settings, by which kohya's block names of SDXL are translated; None where there is no U-Net."""
    return SimpleNamespace(**read_config(root, "unet")) if (root / "unet" / "config.json").is_file() else None


def _check_components(root: Path, lora: _Lora, components: Sequence[str]) -> None:
    """Every tensor must belong to a component that is there."""
    if not any(lora.of(component) for component in components):
        example = next(iter(lora.state), "nothing")
        raise BundleError(f"{lora.path} changes {example!r}, and {root} has {', '.join(components)}: " + _REMEDY)
    for name in lora.state:
        if name.split(".")[0] not in components:
            raise BundleError(f"{lora.path} changes {name!r}, and {root} has {', '.join(components)}: " + _REMEDY)


def _check_layers(folder: Path, model: nn.Module, lora: _Lora, component: str) -> None:
    """Every layer must be in the model, with the LoRA's width in and out."""
    modules = dict(model.named_modules())
    try:
        tensors = _peft_names(model, lora.of(component))
    except ValueError as error:
        raise BundleError(f"{lora.path} has names for {component} that diffusers does not read: {error}") from error
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".lora_")
        module = modules.get(layer)
        if module is None or not part:
            raise BundleError(f"{lora.path} changes {component}.{layer}, which {folder} does not have: " + _REMEDY)
        weight = getattr(module, "weight", None)
        if weight is None or part not in ("A.weight", "B.weight"):
            continue
        side = 1 if part == "A.weight" else 0
        ours, theirs = int(weight.shape[side]), int(tensor.shape[side])
        if ours != theirs:
            way = "in" if side else "out"
            raise BundleError(
                f"{lora.path} is for another base: its {component}.{layer} is {theirs} wide ({way}), "
                f"and {folder} has {ours} (shapes {tuple(tensor.shape)} and {tuple(weight.shape)}): " + _REMEDY
            )


_REMEDY = "take a LoRA that was trained on this base, or import the base that it was trained on"


def _peft_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under PEFT's names, "layer.lora_A.weight", as diffusers renames them when it loads them."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        peft = "lora_A" in next(iter(state))
        return dict(state) if peft else convert_unet_state_dict_to_peft(dict(state))
    named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(state)))
    if not hasattr(model, "text_model"):  # transformers 5 has no such level, older files do
        named = {name.removeprefix("text_model."): value for name, value in named.items()}
    return dict(named)


def _merge(pipeline: Any, component: str, model: Any, lora: _Lora) -> None:
    """Put the LoRA into the component's weights, and leave no trace of it beside them."""
    from diffusers.utils import recurse_remove_peft_layers, set_weights_and_activate_adapters
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

    settings = {"network_alphas": lora.alphas, "adapter_name": "lora", "metadata": lora.metadata}
    if isinstance(model, PreTrainedModel):
        pipeline.load_lora_into_text_encoder(dict(lora.state), text_encoder=model, prefix=component, **settings)
    else:
        model.load_lora_adapter(dict(lora.state), prefix=component, **settings)
    set_weights_and_activate_adapters(model, ["lora"], [lora.weight])
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(adapter_names=["lora"])
    recurse_remove_peft_layers(model)
    del model.peft_config
    model._hf_peft_config_loaded = False  # else transformers would save the adapter, not the model
