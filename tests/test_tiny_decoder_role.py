"""A bundle's tiny decoder makes the pictures of the step counts that the spec gives it, and no others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from fewstep.models.bundle import seal_bundle
from fewstep.models.errors import BundleError
from fewstep.runtime.engine import DECODER, DECODER_TINY
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.service.local import Runtime
from tiny import copy_bundle


@pytest.fixture(scope="module")
def bundle(tiny_dmd2, tmp_path_factory):
    root = copy_bundle(tiny_dmd2, tmp_path_factory.mktemp("decoders") / "bundle")
    torch.manual_seed(5)
    AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=1.3,
    ).save_pretrained(root / "tiny_decoder")  # fmt: skip
    return seal_bundle(root, "two-decoders", replace(tiny_dmd2.spec, tiny_decoder=(1,)))


@pytest.mark.parametrize(("steps", "role"), [(1, DECODER_TINY), (2, DECODER)])
def test_the_step_count_decides(bundle, steps, role):
    assert DECODER_TINY in bundle.roles
    request = GenerateRequest(prompt="a red cat", seed=3, steps=steps)
    latents = []
    engine = TorchEngine(bundle)
    picture = run_request(engine, bundle, request, watch=lambda n, k, x: latents.append(x)).pictures[0]
    pixels = engine.run(role, {"latent": latents[-1][None]})[0][0]
    expected = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1
    other = engine.run(DECODER if role == DECODER_TINY else DECODER_TINY, {"latent": latents[-1][None]})[0][0]
    assert (pixels - other).abs().max() > 0.05
    with Runtime([bundle], engine="torch") as runtime:
        scheduled = runtime.generate(request).pictures[0]
    assert np.abs(picture.astype(int) - scheduled.astype(int)).max() <= 1


def test_a_spec_that_names_an_absent_decoder_is_refused(tiny_dmd2, tmp_path):
    root = copy_bundle(tiny_dmd2, tmp_path / "plain")
    with pytest.raises(BundleError, match=r"spec.tiny_decoder is \[1\], and tiny_decoder/ is absent"):
        seal_bundle(root, "plain", replace(tiny_dmd2.spec, tiny_decoder=(1,)))
