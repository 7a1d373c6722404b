"""Previews: the map is the decoder's where that is linear, few latents are enough, wrong files are refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.models.bundle import load_bundle, reseal
from fewstep.runtime.engine import DECODER, Capabilities
from fewstep.runtime.errors import BundleError, EngineFailed
from fewstep.runtime.sampling.preview import fit_preview, preview, preview_of_decoder, read_preview
from tiny import copy_bundle

TRUTH = torch.tensor([[0.3, -0.2, 0.1, 0.0, 0.05], [0.1, 0.2, -0.3, 0.1, -0.1], [-0.2, 0.0, 0.2, 0.3, 0.2]])


class LinearDecoder:
    """A decoder that is such a map, four times as large."""

    name = "linear"
    capabilities = Capabilities(roles=frozenset({DECODER}), max_batch=4)

    def __init__(self, broken=False):
        self.calls, self.broken = 0, broken

    def run(self, role, feeds):
        self.calls += 1
        out = torch.einsum("oc,bchw->bohw", TRUTH[:, :-1], feeds["latent"]) + TRUTH[:, -1, None, None]
        return (out.repeat_interleave(4, 2).repeat_interleave(4, 3) * (float("nan") if self.broken else 1.0),)

    def close(self):
        pass


def latents(count, size=8):
    return [0.4 * torch.randn(4, size, size, generator=torch.Generator().manual_seed(k)) for k in range(count)]


def test_the_map_of_a_linear_decoder_is_found_again():
    assert torch.allclose(preview_of_decoder(LinearDecoder(), latents(3)), TRUTH, atol=0.01)


def test_a_latent_without_any_variety_is_shifted_until_the_map_is_known():
    flat = [torch.zeros(4, 8, 8)]
    engine = LinearDecoder()
    assert torch.allclose(preview_of_decoder(engine, flat), TRUTH, atol=0.02)
    assert engine.calls == 24
    engine = LinearDecoder()
    preview_of_decoder(engine, latents(2, size=32))  # pixels enough: nothing is decoded twice
    assert engine.calls == 2


def test_a_preview_is_the_picture_made_small():
    (latent,) = latents(1)
    drawn = preview(latent, TRUTH)
    whole = LinearDecoder().run(DECODER, {"latent": latent[None]})[0][0]
    small = whole[:, ::4, ::4].mul(127.5).add(127.5).clamp(0, 255).permute(1, 2, 0).numpy()
    assert drawn.shape == (8, 8, 3) and drawn.dtype == np.uint8
    assert np.abs(drawn - small).max() <= 0.5 + 1e-3


def test_pictures_are_averaged_over_each_latent_pixel():
    latent = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    coarse = (127.5 + 40 * latent.permute(1, 2, 0).numpy()).repeat(5, 0).repeat(2, 1)
    striped = np.stack([coarse[..., 0], coarse[..., 1], coarse[..., 0]], -1)
    striped[::5] += 10
    striped[1::5] -= 10  # gone in the mean
    weights = fit_preview([latent], [striped.round().astype(np.uint8)])
    assert weights[0, :2].tolist() == pytest.approx([40 / 127.5, 0.0], abs=0.02)
    assert weights[1, :2].tolist() == pytest.approx([0.0, 40 / 127.5], abs=0.02)


def test_a_decoder_that_breaks_is_said():
    with pytest.raises(EngineFailed, match="non-finite picture"):
        preview_of_decoder(LinearDecoder(broken=True), latents(1))


def test_the_bundle_carries_the_map_of_its_decoder(exported_lcm, tmp_path):
    weights = read_preview(exported_lcm)
    assert weights.shape == (3, 5) and torch.isfinite(weights).all()
    case = load_file(exported_lcm.root / "golden" / exported_lcm.spec.golden[-1].file)
    small = case["picture"].double().reshape(16, 2, 16, 2, 3).mean(dim=(1, 3)).numpy()
    near = np.abs(preview(case["latent"], weights) - small).mean()
    assert near < np.abs(small - small.mean(axis=(0, 1))).mean() + 1.0  # never worse than one colour for all

    copy = load_bundle(copy_bundle(exported_lcm, tmp_path / "copy"))
    save_file({"weights": torch.zeros(3, 9)}, copy.root / "golden" / "preview.safetensors")
    with pytest.raises(BundleError, match=r"has the shape \(3, 9\); this bundle's latents need \(3, 5\); run `fewstep"):
        read_preview(reseal(copy))


def test_a_bundle_without_one_says_how_to_get_it(tiny_teacher):
    with pytest.raises(BundleError, match=r"has no map for previews .* --new-golden`"):
        read_preview(tiny_teacher)
