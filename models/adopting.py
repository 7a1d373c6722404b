"""Components from elsewhere put into a diffusers folder before it becomes a bundle: decoders and what steers a U-Net.

Every function changes the folder in place, refuses what was made for another base with the numbers of both sides, and
returns what it put in, {"kind", "file", "sha256", ...}, for the bundle's `sources`. Files are copied, never linked.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .bundle import load_component
from .errors import BundleError
from .families import vae_factor
from .files import sha256_of
from .net_image_prompt import CLASS as IMAGE_PROMPT_CLASS
from .net_image_prompt import WEIGHTS, check_image_prompt, read_image_prompt
from .net_negative import CLASS as NEGATIVE_CLASS
from .net_negative import Negative
from .pipeline_folder import copy_component, list_component, read_config

UNION_KINDS: Mapping[int, tuple[str, ...]] = {
    6: ("pose", "depth", "scribble", "canny", "normal", "segment"),
    8: ("pose", "depth", "scribble", "canny", "normal", "segment", "tile", "repaint"),
}
"""What the control types of the published unions mean, by their number (xinsir/controlnet-union-sdxl-1.0, ProMax)."""


def adopt_decoder(root: Path, source: Path) -> dict[str, Any]:
    """Put an `AutoencoderTiny` folder (TAESD, TAESDXL, TAESD3, TAEF1) in place of the folder's autoencoder.

    A tiny autoencoder takes the denoiser's latents as they are: its own scaling_factor, usually 1, becomes the bundle's
    `latent.scale`, so the spec is to be read after this.

    Errors: `BundleError` where its latents have other channels or another size.
    """
    ours, theirs = read_config(root, "vae"), read_config(source, "")
    if theirs.get("_class_name") != "AutoencoderTiny":
        raise BundleError(f"{source} holds {theirs.get('_class_name')!r}; a tiny decoder is an AutoencoderTiny")
    _same(source, root / "vae", {"latent_channels": theirs.get("latent_channels", 4)}, ours)
    factors = [vae_factor(config) for config in (theirs, ours)]
    if factors[0] != factors[1]:
        raise BundleError(
            f"{source} makes {factors[0]} pixels of a latent's one, and {root}/vae {factors[1]}: "
            "take the tiny autoencoder that was made for this one"
        )
    copy_component(source, root / "vae")
    load_component(root, "vae")
    list_component(root, "vae", "diffusers", "AutoencoderTiny")
    return _source("decoder", source)


def adopt_controlnet(root: Path, source: Path) -> dict[str, Any]:
    """Put in a `ControlNetModel` or `ControlNetUnionModel` folder.

    Errors: `BundleError` where its settings are not those of the folder's U-Net.
    """
    _one_control(root, "controlnet")
    theirs, ours = read_config(source, ""), _unet_config(root, "a ControlNet")
    if theirs.get("_class_name") not in ("ControlNetModel", "ControlNetUnionModel"):
        raise BundleError(f"{source} holds {theirs.get('_class_name')!r}; a ControlNet or ControlNet-Union is needed")
    shared = (
        "in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type",
        "projection_class_embeddings_input_dim",
    )  # fmt: skip
    _same(source, root / "unet", {name: theirs.get(name) for name in shared}, ours)
    copy_component(source, root / "controlnet")
    load_component(root, "controlnet")
    return _source("controlnet", source)


def control_kinds(root: Path, stated: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of a union's control types in their order, for `SamplerSpec.control_kinds`; () for a plain ControlNet.

    Errors: `BundleError` where they are neither stated nor those of a published union, or are of another number.
    """
    path = root / "controlnet" / "config.json"
    count = read_config(root, "controlnet").get("num_control_type") if path.is_file() else None
    if count is None:
        if stated:
            raise BundleError(f"control kinds are {', '.join(stated)}; {root} has no ControlNet-Union: leave them out")
        return ()
    found = tuple(stated) or UNION_KINDS.get(count, ())
    if len(found) != count or len(set(found)) != count:
        said = f"names {len(found)} of them" if stated else "is no published union's number"
        raise BundleError(
            f"{path} has {count} control types, which {said}: say --control-kinds "
            f"{','.join(UNION_KINDS[6])} or the like, {count} different names"
        )
    return found


def adopt_t2i_adapter(root: Path, source: Path) -> dict[str, Any]:
    """Put in a `T2IAdapter` folder.

    Errors: `BundleError` where its feature maps are not as large as the U-Net's.
    """
    _one_control(root, "t2i_adapter")
    theirs = read_config(source, "")
    if theirs.get("_class_name") != "T2IAdapter":
        raise BundleError(f"{source} holds {theirs.get('_class_name')!r}; a T2IAdapter is needed")
    _check_features(root, source, theirs)
    copy_component(source, root / "t2i_adapter")
    load_component(root, "t2i_adapter")
    return _source("t2i_adapter", source)


def adopt_ip_adapter(root: Path, weights: Path, image_encoder: Path) -> dict[str, Any]:
    """Put in an IP-Adapter's safetensors file and the folder of the CLIP image encoder that it reads.

    Errors: `BundleError` where the file is no IP-Adapter of a picture or one for another base, or the encoder another.
    """
    _unet_config(root, "an IP-Adapter")
    found = read_image_prompt(weights)
    check_image_prompt(load_component(root, "unet"), found)
    _check_encoder(image_encoder, found.projection, weights)
    copy_component(image_encoder, root / "image_encoder")
    encoder = load_component(root, "image_encoder")
    from transformers import CLIPImageProcessorPil

    size = int(encoder.config.image_size)
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(root / "feature_extractor")
    folder = root / "ip_adapter"
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights.read_bytes())
    (folder / "config.json").write_text(json.dumps({"_class_name": IMAGE_PROMPT_CLASS, "weights": WEIGHTS}) + "\n")
    list_component(root, "image_encoder", "transformers", type(encoder).__name__)
    list_component(root, "feature_extractor", "transformers", "CLIPImageProcessor")
    return _source("ip_adapter", weights)


def adopt_negative(root: Path, negative: Negative) -> dict[str, Any]:
    """Let the bundle take negative prompts without a second evaluation: its `denoiser+negative`."""
    _unet_config(root, "negative attention")
    folder = root / "negative"
    folder.mkdir(exist_ok=True)
    settings = {"method": negative.method, "tau": negative.tau, "alpha": negative.alpha}
    (folder / "config.json").write_text(json.dumps({"_class_name": NEGATIVE_CLASS, **settings}) + "\n")
    return {"kind": "negative", **settings}


def _one_control(root: Path, component: str) -> None:
    for other in ("controlnet", "t2i_adapter"):
        if (root / other).is_dir():
            raise BundleError(
                f"{root} has {other}/ already and follows one control picture; import without {component}"
            )


def _unet_config(root: Path, what: str) -> dict[str, Any]:
    if not (root / "unet" / "config.json").is_file():
        raise BundleError(f"{root} has no unet/; {what} steers a U-Net: leave it out")
    return read_config(root, "unet")


def _same(source: Path, folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name, value in theirs.items():
        if value != ours.get(name):
            raise BundleError(
                f"{source} is for another base: its {name} is {value}, and {folder} has {ours.get(name)}: "
                "take the one that was made for this base"
            )


def _check_features(root: Path, source: Path, config: Mapping[str, Any]) -> None:
    """Run the adapter and the U-Net on shapes alone: a feature map that fits nowhere breaks there."""
    from diffusers import T2IAdapter, UNet2DConditionModel

    from .net_control import AdaptedDenoiser, Adapter

    unet = _unet_config(root, "a T2I-Adapter")
    factor, side = vae_factor(read_config(root, "vae")), int(unet["sample_size"])
    with torch.device("meta"):
        net, adapter = UNet2DConditionModel.from_config(unet), T2IAdapter.from_config(config)
        denoiser = AdaptedDenoiser(net, adapter)
        feeds = {
            "x": torch.zeros(1, unet["in_channels"], side, side), "t": torch.zeros(1), "w": torch.zeros(1),
            "ctx": torch.zeros(1, 8, unet["cross_attention_dim"]),
        }  # fmt: skip
        if "size_ids" in denoiser.inputs:
            width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
            feeds |= {"pooled": torch.zeros(1, width), "size_ids": torch.zeros(1, 6)}
        try:
            features = Adapter(adapter)(torch.zeros(1, 3, side * factor, side * factor))
            feeds |= dict(zip(denoiser.features, features, strict=True))
            denoiser(*(feeds[name] for name in denoiser.inputs))
        except (RuntimeError, IndexError) as error:
            theirs = {name: config.get(name) for name in ("channels", "downscale_factor", "adapter_type")}
            raise BundleError(
                f"{source} is for another base: its feature maps ({theirs}) do not fit {root}/unet "
                f"(block_out_channels {unet['block_out_channels']}, latents {side}x{side}): {error}: "
                "take the T2I-Adapter that was made for this base"
            ) from error


def _check_encoder(folder: Path, projection: Mapping[str, torch.Tensor], weights: Path) -> None:
    config = read_config(folder, "")
    if (config.get("architectures") or [""])[0] != "CLIPVisionModelWithProjection":
        raise BundleError(
            f"{folder} holds {config.get('architectures')}; an IP-Adapter reads CLIPVisionModelWithProjection"
        )
    reads = {
        "proj.weight": ("projection_dim", 1),
        "proj.0.weight": ("hidden_size", 1),
        "proj_in.weight": ("hidden_size", 1),
    }
    for name, (setting, axis) in reads.items():
        if name in projection and int(projection[name].shape[axis]) != config.get(setting):
            raise BundleError(
                f"{weights} reads an image encoder {int(projection[name].shape[axis])} wide, and {folder} has "
                f"{setting} {config.get(setting)}: take the image encoder that was published with the adapter"
            )


def _source(kind: str, path: Path) -> dict[str, Any]:
    """The weights that were put in: their names and one SHA-256 over them."""
    digests = [sha256_of(file) for file in ([path] if path.is_file() else sorted(path.glob("*.safetensors")))]
    one = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return {"kind": kind, "file": path.name, "sha256": one}
