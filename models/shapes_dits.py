"""Small diffusers folders of the transformer families: the real classes, random weights, under 3 MB and a second each.

Whatever a fresh network leaves at zero or one (biases, norms, padding tokens) is shaken, so that a picture depends on
every weight.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .shapes import save_clip, write_index

_LETTERS = "abcdefghijklmnopqrstuvwxyz,."
T5_WIDTH, CLIP_WIDTH = 32, 16


def pixart_alpha(out: Path) -> None:
    """128 latents a side, as PixArt-alpha's 1024 pictures: below it, diffusers does not tell the network the size."""
    _pixart(out, "PixArtAlphaPipeline", sample_size=128, use_additional_conditions=True)


def pixart_sigma(out: Path) -> None:
    _pixart(out, "PixArtSigmaPipeline", sample_size=16, use_additional_conditions=False, interpolation_scale=1)


def _pixart(out: Path, pipeline: str, **settings: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=T5_WIDTH, **settings,
    )  # fmt: skip
    save_t5(out, "")
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    _finish(out, pipeline, net, scheduler, lambda: _kl(channels=4, scaling_factor=0.13025))


def sana(out: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_schedule="linear",
        beta_start=0.0001, beta_end=0.02,
    )  # fmt: skip
    _sana(out, "SanaPipeline", scheduler, qk_norm=None)


def sana_sprint(out: Path) -> None:
    from diffusers import SCMScheduler

    scheduler = SCMScheduler(num_train_timesteps=1000, prediction_type="trigflow", sigma_data=0.5)
    more = {"guidance_embeds": True, "guidance_embeds_scale": 0.1}
    _sana(out, "SanaSprintPipeline", scheduler, qk_norm="rms_norm_across_heads", **more)


def _sana(out: Path, pipeline: str, scheduler: Any, **settings: Any) -> None:
    from diffusers import SanaTransformer2DModel

    net = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24,
        sample_size=8, patch_size=1, mlp_ratio=2.0, **settings,
    )  # fmt: skip
    if settings.get("guidance_embeds"):
        with torch.no_grad():  # so that the guidance scale is felt as much as the prompt
            net.time_embed.guidance_embedder.linear_2.weight.mul_(10.0)
    save_gemma(out, width=24)
    _finish(out, pipeline, net, scheduler, _dc)


def sd3(out: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=2 * T5_WIDTH, caption_projection_dim=24,
        pooled_projection_dim=2 * CLIP_WIDTH + 8, pos_embed_max_size=24, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    save_clip(out, "", width=CLIP_WIDTH, length=24, layers=2, projection=CLIP_WIDTH)
    save_clip(out, "_2", width=CLIP_WIDTH + 8, length=24, layers=2, projection=CLIP_WIDTH + 8)
    save_t5(out, "_3", width=2 * T5_WIDTH)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    _finish(out, "StableDiffusion3Pipeline", net, scheduler, lambda: _kl(scaling_factor=1.5305, shift_factor=0.0609))


def flux_schnell(out: Path) -> None:
    _flux(out, guidance=False, shift=1.0, use_dynamic_shifting=False)


def flux_dev(out: Path) -> None:
    _flux(out, guidance=True, shift=3.0, use_dynamic_shifting=True)


def _flux(out: Path, *, guidance: bool, **shifting: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    save_clip(out, "", width=CLIP_WIDTH, length=24)
    save_t5(out, "_2")
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.5, max_shift=1.15, **shifting)
    _finish(out, "FluxPipeline", net, scheduler, lambda: _kl(scaling_factor=0.3611, shift_factor=0.1159))


def z_image(out: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    net = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    save_qwen(out, width=24)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    _finish(out, "ZImagePipeline", net, scheduler, lambda: _kl(scaling_factor=0.3611, shift_factor=0.1159))


def save_t5(out: Path, suffix: str, *, width: int = T5_WIDTH) -> None:
    """`tokenizer{suffix}/`, which knows letters, and `text_encoder{suffix}/`, T5's encoder with random weights."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [(piece, -3.0) for c in _LETTERS for piece in (c, f"▁{c}")]
    tokenizer = T5Tokenizer(vocab=marks + pieces, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(out / f"tokenizer{suffix}")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    _shaken(T5EncoderModel(config)).save_pretrained(out / f"text_encoder{suffix}")


def save_gemma(out: Path, *, width: int) -> None:
    """`tokenizer/`, whose pieces fit SANA's instruction, and `text_encoder/`, a Gemma 2 with random weights."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    from .net_sana import instruction

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.normalizer = normalizers.Replace(" ", "▁")
    pieces.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=marks, initial_alphabet=[*_LETTERS, "▁"], show_progress=False
    )
    pieces.train_from_iterator([instruction()] * 2, trainer)
    tokenizer = GemmaTokenizer(
        vocab=pieces.get_vocab(), merges=_merges(pieces), model_max_length=1024, add_bos_token=True
    )
    tokenizer.save_pretrained(out / "tokenizer")
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12, query_pre_attn_scalar=12, sliding_window=4096,
        max_position_embeddings=2048, **_marks_of(tokenizer),
    )  # fmt: skip
    _shaken(Gemma2Model(config)).save_pretrained(out / "text_encoder")


def save_qwen(out: Path, *, width: int) -> None:
    """`tokenizer/` of bytes with a chat template, and `text_encoder/`, a Qwen3 with random weights."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    vocab = {piece: k for k, piece in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], model_max_length=1024, extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>{% endif %}{% endif %}"
    )
    tokenizer.save_pretrained(out / "tokenizer")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12, max_position_embeddings=2048,
        **_marks_of(tokenizer),
    )  # fmt: skip
    _shaken(Qwen3Model(config)).save_pretrained(out / "text_encoder")


def _merges(pieces: Any) -> list[tuple[str, str]]:
    import json

    found = json.loads(pieces.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in found]


def _marks_of(tokenizer: Any) -> Mapping[str, int | None]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def _kl(channels: int = 16, **settings: float) -> nn.Module:
    from diffusers import AutoencoderKL

    vae: nn.Module = AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=channels == 4, use_post_quant_conv=channels == 4, **settings,
    )  # fmt: skip
    return vae


def _dc() -> nn.Module:
    """Three halvings and an attention block, where SANA's own has five."""
    from diffusers import AutoencoderDC

    kinds = ("ResBlock", "ResBlock", "EfficientViTBlock")
    vae: nn.Module = AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=(8, 16, 16), decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate", downsample_block_type="Conv", scaling_factor=0.41407,
    )  # fmt: skip
    return vae


def _finish(out: Path, pipeline: str, net: nn.Module, scheduler: Any, make_vae: Any) -> None:
    _shaken(net).save_pretrained(out / "transformer")
    vae = _shaken(make_vae())
    vae.save_pretrained(out / "vae")
    scheduler.save_pretrained(out / "scheduler")
    write_index(out, pipeline, {"transformer": net, "vae": vae, "scheduler": scheduler}, extra={})


@torch.no_grad()
def _shaken(net: Any) -> Any:
    """Noise on every weight that a fresh network holds constant."""
    for weight in net.parameters():
        if weight.numel() > 1 and float(weight.std()) == 0.0:
            weight.add_(torch.randn_like(weight) * 0.2)
    return net.eval()
