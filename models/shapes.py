"""Diffusers folders of the real classes with random weights: `fewstep folder NAME --out DIR`.

For trying import, export and serving without a download, and for timing: latency does not depend on the weights.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import BundleError

_LETTERS = "abcdefghijklmnopqrstuvwxyz,"
TABLE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TINY_UNET: dict[str, Any] = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 8,
}  # fmt: skip
SD15_UNET: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SMALL_UNET = {**SD15_UNET, "sample_size": 32, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 128}
SDXL_EXTRA: dict[str, Any] = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True, "attention_head_dim": (2, 4),
}  # fmt: skip
TINY_VAE: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
SMALL_VAE: dict[str, Any] = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 32, "layers_per_block": 1}
SD15_VAE: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32, "layers_per_block": 2}


def make_folder(name: str, out: Path, *, seed: int = 0) -> Path:
    """Write the folder `out` of the shape `name`.

    Errors: `BundleError` where the name is unknown or `out` exists.
    """
    if name not in SHAPES:
        raise BundleError(f"there is no shape {name!r}; shapes are {', '.join(SHAPES)}")
    if out.exists():
        raise BundleError(f"{out} exists already; delete it or name another --out")
    torch.manual_seed(seed)
    beside = out.with_name(out.name + ".making")
    SHAPES[name](beside)
    beside.rename(out)
    return out


def sd(
    out: Path, *, unet: Mapping[str, Any] = TINY_UNET, vae: Mapping[str, Any] = TINY_VAE, scheduler: Any = None,
    pipeline: str = "StableDiffusionPipeline", text: Mapping[str, int] | None = None, half: bool = False,
) -> None:  # fmt: skip
    """A folder of Stable Diffusion 1.x's layout. half: weights on disk in float16."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    length, width = 77, int(unet["cross_attention_dim"])
    save_clip(out, "", width=width, length=length, half=half, **(text or {}))
    net = UNet2DConditionModel(**unet)
    (net.half() if half else net).save_pretrained(out / "unet")
    save_vae(out, vae, half=half)
    made = scheduler or DDIMScheduler(
        **TABLE, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=1
    )
    made.save_pretrained(out / "scheduler")
    parts = {"unet": net, "scheduler": made}
    write_index(out, pipeline, parts, extra={"requires_safety_checker": False})


def sdxl(out: Path, *, scheduler: Any = None, unet: Mapping[str, Any] | None = None) -> None:
    """A small folder of SDXL's layout: two CLIP encoders, pooled text and sizes as conditions."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    save_clip(out, "", width=16, length=24, layers=3)
    save_clip(out, "_2", width=24, length=24, layers=3, projection=24)
    settings = {**TINY_UNET, **SDXL_EXTRA, "cross_attention_dim": 40, "norm_num_groups": 8}
    settings["projection_class_embeddings_input_dim"] = 24 + 6 * 8
    net = UNet2DConditionModel(**{**settings, **(unet or {})})
    net.save_pretrained(out / "unet")
    save_vae(out, {**TINY_VAE, "scaling_factor": 0.13025})
    made = scheduler or EulerDiscreteScheduler(**TABLE, timestep_spacing="leading", steps_offset=1)
    made.save_pretrained(out / "scheduler")
    parts = {"unet": net, "scheduler": made}
    write_index(out, "StableDiffusionXLPipeline", parts, extra={"force_zeros_for_empty_prompt": True})


def save_clip(
    out: Path, suffix: str, *, width: int, length: int, layers: int = 2, projection: int | None = None,
    half: bool = False, heads: int = 2,
) -> None:  # fmt: skip
    """`tokenizer{suffix}/`, which knows letters, and `text_encoder{suffix}/`, a CLIP text model with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {c: i for i, c in enumerate([*_LETTERS, *(c + "</w>" for c in _LETTERS), *marks])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)
    tokenizer.save_pretrained(out / f"tokenizer{suffix}")
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=length, projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model: Any = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    (model.half() if half else model).save_pretrained(out / f"text_encoder{suffix}")


def save_vae(out: Path, settings: Mapping[str, Any], *, half: bool = False) -> None:
    """`vae/`: an `AutoencoderKL` with random weights."""
    from diffusers import AutoencoderKL

    blocks = len(settings["block_out_channels"])
    vae = AutoencoderKL(
        latent_channels=4, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, **{"scaling_factor": 0.18215, **settings},
    )  # fmt: skip
    (vae.half() if half else vae).save_pretrained(out / "vae")


def write_index(out: Path, pipeline: str, parts: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """`model_index.json` over the folders that are there; `parts` gives the classes of those not listed below."""
    classes = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    for folder in sorted(path.name for path in out.iterdir() if path.is_dir() and path.name not in parts):
        config = next(iter(sorted((out / folder).glob("*config.json"))))
        found = json.loads((out / folder / config.name).read_text())
        name = found.get("_class_name") or (found.get("architectures") or [found.get("tokenizer_class")])[0]
        classes[folder] = ["diffusers" if "_class_name" in found else "transformers", name]
    absent = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    index = {"_class_name": pipeline, "_diffusers_version": "0.36.0", **classes, **absent, **extra}
    if pipeline == "StableDiffusionXLPipeline":
        index.pop("safety_checker")
    (out / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def _sd21(out: Path) -> None:
    from diffusers import DDIMScheduler

    unet = {**TINY_UNET, "use_linear_projection": True, "attention_head_dim": (2, 4)}
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
    sd(out, unet=unet, scheduler=DDIMScheduler(**TABLE, prediction_type="v_prediction", **settings))


def _ancestral() -> Any:
    from diffusers import EulerAncestralDiscreteScheduler

    return EulerAncestralDiscreteScheduler(**TABLE, timestep_spacing="trailing", steps_offset=1)


def _lcm(out: Path, unet: Mapping[str, Any] = TINY_UNET, **more: Any) -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(**TABLE, original_inference_steps=50, clip_sample=False, steps_offset=1)
    net = {**unet, "time_cond_proj_dim": 32}
    sd(out, unet=net, scheduler=scheduler, pipeline="LatentConsistencyModelPipeline", **more)


_SSD: dict[str, Any] = {
    "mid_block_type": None, "layers_per_block": (1, 2), "transformer_layers_per_block": (1, 1),
    "reverse_transformer_layers_per_block": ((1, 1, 1), (2, 1)),
}  # fmt: skip


def _transformer(function: str) -> Callable[[Path], None]:
    """A folder of `fewstep.models.shapes_dits`."""

    def make(out: Path) -> None:
        from importlib import import_module

        getattr(import_module(".shapes_dits", __package__), function)(out)

    return make


_SMALL_TEXT = {"layers": 12, "heads": 4}
_SD15_TEXT = {"layers": 12, "heads": 12}
SHAPES: dict[str, Callable[[Path], None]] = {
    "sd15-tiny": sd,
    "sd21-tiny": _sd21,
    "sd-turbo-tiny": lambda out: sd(out, scheduler=_ancestral()),
    "lcm-tiny": _lcm,
    "sdxl-tiny": sdxl,
    "sdxl-turbo-tiny": lambda out: sdxl(out, scheduler=_ancestral()),
    "ssd-tiny": lambda out: sdxl(out, unet=_SSD),
    "pixart-alpha-tiny": _transformer("pixart_alpha"),
    "pixart-sigma-tiny": _transformer("pixart_sigma"),
    "sana-tiny": _transformer("sana"),
    "sana-sprint-tiny": _transformer("sana_sprint"),
    "sd3-tiny": _transformer("sd3"),
    "flux-schnell-tiny": _transformer("flux_schnell"),
    "flux-dev-tiny": _transformer("flux_dev"),
    "z-image-tiny": _transformer("z_image"),
    "lcm-small": lambda out: _lcm(out, SMALL_UNET, vae=SMALL_VAE, text=_SMALL_TEXT),
    "sd15-small": lambda out: sd(out, unet=SMALL_UNET, vae=SMALL_VAE, text=_SMALL_TEXT),
    "lcm-full": lambda out: _lcm(out, SD15_UNET, vae=SD15_VAE, text=_SD15_TEXT, half=True),
    "sd15-full": lambda out: sd(out, unet=SD15_UNET, vae=SD15_VAE, text=_SD15_TEXT, half=True),
}
"""Name -> what writes it. tiny: built in a second, for tests; small: SD 1.5's layers, narrow; full: its size."""
