"""The plain networks have the parameters and the operations of diffusers' classes of the same configuration."""

import pytest
import torch
from diffusers import AutoencoderTiny, SanaTransformer2DModel, UNet2DConditionModel

from fewstep.runtime.bench.gpu_shapes import (
    SANA_SPRINT,
    SD_TURBO,
    SDXL_TURBO,
    Sana,
    SanaShape,
    TinyDecoder,
    UNet,
    UNetShape,
)
from fewstep.runtime.bench.operations import count_operations

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def blocks(shape, where, order):
    return tuple((CROSS if depth else PLAIN).format(where) for depth in order(shape.depths))


def diffusers_unet(shape):
    extra = {}
    if shape.added:
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                 "projection_class_embeddings_input_dim": shape.added}  # fmt: skip
    return UNet2DConditionModel(
        sample_size=16, in_channels=shape.latent, out_channels=shape.latent, block_out_channels=shape.channels,
        layers_per_block=shape.layers, norm_num_groups=shape.groups, cross_attention_dim=shape.ctx,
        attention_head_dim=tuple(c // shape.head for c in shape.channels), use_linear_projection=True,
        transformer_layers_per_block=tuple(max(1, d) for d in shape.depths),
        down_block_types=blocks(shape, "Down", tuple), up_block_types=blocks(shape, "Up", lambda d: d[::-1]), **extra,
    )  # fmt: skip


SMALL = {
    "sd": UNetShape(channels=(16, 32, 32), depths=(1, 1, 0), middle_depth=1, ctx=24, head=8, groups=8),
    "sdxl": UNetShape(channels=(16, 32, 32), depths=(0, 1, 2), middle_depth=2, ctx=24, head=8, groups=8, added=64),
}


@pytest.mark.parametrize("name", SMALL)
@torch.inference_mode()
def test_a_unet_is_diffusers_unet(name):
    shape = SMALL[name]
    ours, theirs = UNet(shape).eval(), diffusers_unet(shape).eval()
    assert parameters(ours) == parameters(theirs)
    x, t, ctx = torch.randn(2, 4, 16, 16), torch.tensor([1.0, 999.0]), torch.randn(2, 7, shape.ctx)
    extra, added = {}, None
    if shape.added:
        added = torch.randn(2, shape.added)
        extra = {"added_cond_kwargs": {"text_embeds": torch.randn(2, shape.added - 48), "time_ids": torch.ones(2, 6)}}
    mine = count_operations(lambda: ours(x, t, ctx, added))
    assert mine == count_operations(lambda: theirs(x, t, ctx, **extra))
    assert ours(x, t, ctx, added).shape == x.shape


@torch.inference_mode()
def test_a_sana_is_diffusers_sana_sprint():
    shape = SanaShape(width=64, layers=2, latent=8, caption=40, head=8, cross_heads=4)
    ours = Sana(shape).eval().requires_grad_(False)
    theirs = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=8, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=40,
        sample_size=8, patch_size=1, guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1.0,
    ).eval().requires_grad_(False)  # fmt: skip
    assert parameters(ours) == parameters(theirs)
    x, t, w, ctx = torch.randn(2, 8, 8, 8), torch.tensor([0.5, 1.5]), torch.tensor([4.5, 4.5]), torch.randn(2, 6, 40)
    mine = count_operations(lambda: ours(x, t, ctx, w))
    assert mine == count_operations(lambda: theirs(x, encoder_hidden_states=ctx, timestep=t, guidance=w))
    assert ours(x, t, ctx, w).shape == x.shape


@torch.inference_mode()
def test_the_decoder_is_diffusers_tiny_one():
    ours, theirs = TinyDecoder().eval(), AutoencoderTiny().eval().decoder
    assert parameters(ours) == parameters(theirs)
    x = torch.randn(1, 4, 4, 4)
    assert count_operations(lambda: ours(x)) == count_operations(lambda: theirs(x))
    assert ours(x).shape == (1, 3, 32, 32)


def test_the_full_shapes_have_the_known_numbers_of_parameters():
    """As their papers and model cards state them: 866 M, 2.57 G, 1.6 G."""
    with torch.device("meta"):
        assert parameters(UNet(SD_TURBO)) / 1e6 == pytest.approx(866, abs=1)
        assert parameters(UNet(SDXL_TURBO)) / 1e9 == pytest.approx(2.567, abs=2e-3)
        assert parameters(Sana(SANA_SPRINT)) / 1e9 == pytest.approx(1.6, abs=0.05)
