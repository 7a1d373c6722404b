"""Tiny bundles of the real classes with random weights, built in a second."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, ControlNetModel, DDIMScheduler, LCMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep.models.bundle import Bundle, load_bundle, seal_bundle
from fewstep.models.paths import VP
from fewstep.models.second_time import SecondTime, add_second_time
from fewstep.models.spec import Boundary, Guidance, Latent, SamplerSpec, Spacing
from fewstep.trainers.pictures.data import Latents, tokenize

LCM_GRIDS = {1: (999.0,), 2: (999.0, 499.0), 4: (999.0, 759.0, 499.0, 259.0)}
LCM_GRIDS[8] = (999.0, 879.0, 759.0, 639.0, 499.0, 379.0, 259.0, 139.0)
_LETTERS = "abcdefghijklmnopqrstuvwxyz,"


def make_tiny_bundle(folder: Path, *, kind: str = "teacher", control: bool = True) -> Bundle:
    """A 32x32 text-to-image bundle, latents [4, 16, 16]. kind: "teacher" (DDIM, CFG), "lcm" (embedded w) or "dmd2"."""
    torch.manual_seed({"teacher": 0, "lcm": 1, "dmd2": 2}[kind])
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {
        c: i for i, c in enumerate([*_LETTERS, *(c + "</w>" for c in _LETTERS), "<|startoftext|>", "<|endoftext|>"])
    }
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)
    tokenizer.save_pretrained(folder / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    text.save_pretrained(folder / "text_encoder")
    vae = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=1.3,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
        time_cond_proj_dim=32 if kind == "lcm" else None,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    if control:
        net = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(8, 16), load_weights_from_unet=kind != "lcm"
        )  # diffusers cannot copy the weights of a network with a guidance embedding
        with torch.no_grad():  # a fresh ControlNet's outputs are zero, and blind to the edges; random ones are not
            for layer in [
                *net.controlnet_down_blocks,
                net.controlnet_mid_block,
                net.controlnet_cond_embedding.conv_out,
            ]:
                layer.weight.normal_(std=0.2)
        net.save_pretrained(folder / "controlnet")
    table = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    table |= {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": True}
    table |= {"steps_offset": 1}  # asked for by diffusers' pipelines; neither trailing spacing nor LCM uses it
    if kind == "teacher":
        DDIMScheduler(**table, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    else:
        LCMScheduler(**table, original_inference_steps=50).save_pretrained(folder / "scheduler")
    scheduler = "DDIMScheduler" if kind == "teacher" else "LCMScheduler"
    pipeline = "LatentConsistencyModelPipeline" if kind == "lcm" else "StableDiffusionPipeline"
    index = {
        "_class_name": pipeline, "_diffusers_version": "0.36.0", "requires_safety_checker": False,
        "vae": ["diffusers", "AutoencoderTiny"], "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler], "safety_checker": [None, None], "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return seal_bundle(folder, f"tiny-{kind}", tiny_spec(kind))


def tiny_spec(kind: str = "teacher") -> SamplerSpec:
    guidance = {
        "teacher": Guidance(mode="cfg", default=3.0, range=(1.0, 10.0)),
        "lcm": Guidance(mode="embedded", default=3.0, range=(1.0, 8.0)),
        "dmd2": Guidance(mode="none"),
    }[kind]
    teacher = kind == "teacher"
    return SamplerSpec(
        prediction="v",
        path=VP(),
        sampler="ddim" if teacher else "lcm",
        grids={} if teacher else LCM_GRIDS,
        spacing=Spacing(kind="trailing", max_steps=50) if teacher else None,
        stochastic=not teacher,
        guidance=guidance,
        boundary=None if teacher else Boundary(),
        latent=Latent(channels=4, factor=2, scale=1.3),
        sizes=((32, 32),),
        recipe="none" if teacher else kind,
    )


def two_times(bundle: Bundle, folder: Path, **changes: Any) -> Bundle:
    """A copy whose denoiser also hears where its jumps land, by random weights; `changes` are of its spec."""
    shutil.copytree(bundle.root, folder)
    component = bundle.family.folder
    network = add_second_time(bundle.load(component), 1.0)
    second = next(part for part in network.modules() if isinstance(part, SecondTime))
    draw = torch.Generator().manual_seed(5)
    second.project.weight.data = 0.1 * torch.randn(second.project.weight.shape, generator=draw)
    network.save_pretrained(folder / component)
    return seal_bundle(folder, f"{bundle.name}-two-times", replace(bundle.spec, second_time=True, **changes))


def copy_bundle(bundle: Bundle, folder: Path) -> Path:
    """A private copy, for tests that damage it."""
    shutil.copytree(bundle.root, folder)
    return folder


def tiny_latents(teacher: Bundle) -> Latents:
    """Four samples, with captions, to train a tiny student on."""
    rng = torch.Generator().manual_seed(0)
    ids = tokenize(teacher.tokenizer, ["a red circle", "b", "c", "d"])[:, None]
    empty = {"ids": tokenize(teacher.tokenizer, [""])[0]}
    return Latents(torch.randn(4, 4, 16, 16, generator=rng), {"ids": ids}, empty)


def through_onnx(bundle: Bundle) -> Bundle:
    """The bundle with golden cases and a verified ONNX engine, made by the commands that users have."""
    from fewstep.export import commands
    from fewstep.export.golden import make_golden

    bundle = make_golden(bundle)
    assert commands.export([str(bundle.root), "--engine", "onnx"]) == 0
    assert commands.verify([str(bundle.root)]) == 0
    return load_bundle(bundle.root)
