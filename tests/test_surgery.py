"""Smaller networks out of larger ones: the config says all of it, the weights are the ones that were there."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from fewstep.models.linear_attention import linearise
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.surgery import (
    Cut,
    cut_unet,
    deepen_unet,
    keep_layers,
    kept_pairs,
    layers_after,
    narrow_unet,
)

X, T, CTX = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 10.0]), torch.randn(2, 5, 16)


def unet(layers=2, channels=(16, 16, 32)):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=channels, layers_per_block=layers, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
        norm_num_groups=8,
    ).eval()  # fmt: skip


def runs(network):
    with torch.no_grad():
        out = network(X, T, CTX).sample
    assert out.shape == X.shape and torch.isfinite(out).all()
    return out


CUTS = {
    "base": Cut(layers=(1, 1, 1)),
    "small": Cut(middle=False, layers=(1, 1, 1)),
    "tiny": Cut(middle=False, layers=(1, 1), stages=2),
    "middle": Cut(middle=False),
    "hollow": Cut(layers=(0, 0, 2)),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_unet_runs_is_smaller_and_comes_back_from_disk(name, tmp_path):
    whole = unet()
    smaller = cut_unet(whole, CUTS[name])
    assert type(smaller) is UNet2DConditionModel
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in whole.parameters())
    out = runs(smaller.eval())
    smaller.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(runs(again), out)


def test_the_first_pair_of_an_encoder_and_both_ends_of_a_decoder_stay():
    assert [kept_pairs(3, n) for n in (3, 2, 1)] == [(0, 1, 2), (0, 2), (0,)]
    whole = unet()
    old, new = whole.state_dict(), cut_unet(whole, CUTS["tiny"]).state_dict()
    twins = {
        "down_blocks.1.resnets.0": "down_blocks.1.resnets.0",
        "up_blocks.1.resnets.0": "up_blocks.2.resnets.0",
        "up_blocks.1.attentions.1": "up_blocks.2.attentions.2",
        "time_embedding.linear_1": "time_embedding.linear_1",
    }
    for mine, theirs in twins.items():
        names = [key for key in new if key.startswith(mine + ".")]
        assert names
        assert all(torch.equal(new[key], old[theirs + key[len(mine) :]]) for key in names), mine


def test_nothing_cut_changes_nothing():
    whole = unet()
    assert torch.equal(runs(cut_unet(whole, Cut()).eval()), runs(whole))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut(stages=4), "stages is 4; this U-Net has 3"),
        (Cut(layers=(3, 1, 1)), r"layers is \[3, 1, 1\]; these stages have \[2, 2, 2\]"),
        (Cut(layers=(1, 1)), r"layers is \[1, 1\]"),
        (Cut(stages=2), "middle to false"),
        (Cut(layers=(1, 1, 0)), r"layers\[2\] is 0, but that stage goes from 16 to 32 channels"),
    ],
)
def test_a_cut_that_the_class_cannot_say_is_refused(cut, message):
    with pytest.raises(RecipeError, match=message):
        cut_unet(unet(), cut)


def test_a_narrow_unet_has_the_corners_of_the_wide_one():
    whole = unet(layers=1, channels=(16, 32, 64))
    narrow = narrow_unet(whole, 0.5)
    assert tuple(narrow.config.block_out_channels) == (8, 16, 32)
    assert torch.equal(narrow.conv_in.weight, whole.conv_in.weight[:8])
    runs(narrow.eval())
    for width in (0.0, 1.0, 0.99):
        with pytest.raises(RecipeError, match=f"width is {width}"):
            narrow_unet(whole, width)


@pytest.mark.parametrize("extra", [(1, 0, 0), (0, 2, 0), (0, 0, 3), (1, 1, 1)])
def test_a_deeper_unet_answers_as_it_did_and_its_new_layers_learn(extra, tmp_path):
    whole = unet()
    torch.manual_seed(1)
    deeper = deepen_unet(whole, extra)
    assert torch.equal(runs(deeper.eval()), runs(whole))
    new = {k for k in deeper.state_dict() if k not in whole.state_dict()}
    parts = {".".join(k.split(".")[: k.split(".").index("transformer_blocks") + 2]) for k in new}
    # two pairs of the encoder and three of the decoder in a stage with attention; the middle's one goes with the last
    assert len(parts) == 5 * extra[0] + 5 * extra[1] + extra[2]
    deeper(X, T, CTX).sample.square().mean().backward()
    last = [p.grad for n, p in deeper.named_parameters() if n in new and ".attn1.to_out.0.weight" in n]
    assert len(last) == len(parts) and any(grad.abs().max() > 0 for grad in last)
    deeper.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(runs(again), runs(deeper))
    assert torch.equal(runs(deepen_unet(deeper, (0, 1, 0)).eval()), runs(whole)), "and once more"


@pytest.mark.parametrize("extra", [(1, 1), (0, 0, 0), (1, -1, 0), ()])
def test_extra_layers_that_say_nothing_are_refused(extra):
    with pytest.raises(RecipeError, match=r"extra_layers is .* give each 0 or more"):
        deepen_unet(unet(), extra)


def test_linear_attention_survives_a_cut():
    smaller = cut_unet(linearise(unet()), CUTS["base"])
    assert smaller.config["fewstep_attention"] == "linear"
    assert any(".processor." in key for key in smaller.state_dict())
    runs(smaller.eval())


def pixart(layers=6):
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=layers, sample_size=8,
        cross_attention_dim=16, caption_channels=16, patch_size=2, use_additional_conditions=False,
    ).eval()  # fmt: skip


def sana(layers=6):
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=layers,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, patch_size=1,
    ).eval()  # fmt: skip


def sd3(layers=6):
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0, 2, 4), qk_norm="rms_norm",
    ).eval()  # fmt: skip


def answer(transformer, x=X):
    extra = {"pooled_projections": torch.ones(2, 12)} if isinstance(transformer, SD3Transformer2DModel) else {}
    if isinstance(transformer, PixArtTransformer2DModel):
        extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    with torch.no_grad():
        return transformer(hidden_states=x, encoder_hidden_states=CTX, timestep=T, **extra).sample


@pytest.mark.parametrize("make", [pixart, sana, sd3])
def test_dropped_layers_leave_a_transformer_of_its_own_class(make, tmp_path):
    whole = make()
    smaller = keep_layers(whole, (0, 2, 5)).eval()
    assert type(smaller) is type(whole) and smaller.config.num_layers == 3
    assert torch.equal(answer(keep_layers(whole, range(6)).eval()), answer(whole))
    for mine, theirs in enumerate((0, 2, 5)):
        kept = smaller.transformer_blocks[mine].state_dict()
        assert all(torch.equal(kept[k], w) for k, w in whole.transformer_blocks[theirs].state_dict().items())
    out = answer(smaller)
    assert torch.isfinite(out).all()
    smaller.save_pretrained(tmp_path)
    assert torch.equal(answer(type(whole).from_pretrained(tmp_path, local_files_only=True)), out)


def test_layers_that_cannot_go_are_refused():
    assert tuple(keep_layers(sd3(), (0, 3, 4, 5)).config.dual_attention_layers) == (0, 2)
    with pytest.raises(RecipeError, match="SD3's last layer, 5"):
        keep_layers(sd3(), (0, 1))
    with pytest.raises(RecipeError, match="rising numbers from 0 to 5"):
        keep_layers(pixart(), (0, 6))
    with pytest.raises(RecipeError, match=r"UNet2DConditionModel\.transformer_blocks is no stack"):
        keep_layers(unet(), (0,))


def test_an_interval_leaves_its_middle_layer():
    assert layers_after(10, [(1, 3), (6, 7)]) == (0, 2, 4, 5, 6, 8, 9)
    assert layers_after(4, []) == (0, 1, 2, 3)
