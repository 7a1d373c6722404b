"""Image prompts and negative prompts as requests: beside diffusers, plain at scale 0, each row by itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from test_adopted_attention import make_ip_adapter
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from beside_diffusers import PROMPT, adopted, quiet
from fewstep.models.adopting import adopt_ip_adapter, adopt_negative
from fewstep.models.net_negative import Negative
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.edits import clip_pixels
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest, ImagePrompt
from fewstep.runtime.service.local import Runtime

PICTURE = (np.random.default_rng(0).random((40, 48, 3)) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def both(tiny_dmd2, tmp_path_factory):
    """A bundle that hears picture prompts and, by NAG, negative prompts."""
    folder = tmp_path_factory.mktemp("both")
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=24,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    save_file(make_ip_adapter(tiny_dmd2.load("unet"), "plain"), folder / "adapter.safetensors")
    bundle = adopted(
        tiny_dmd2, folder / "bundle",
        lambda root: adopt_ip_adapter(root, folder / "adapter.safetensors", folder / "image_encoder"),
        lambda root: adopt_negative(root, Negative(method="nag")),
    )  # fmt: skip
    return bundle, TorchEngine(bundle)


def ask(**settings):
    return GenerateRequest(**{"prompt": PROMPT, "seed": 5, "steps": 2, **settings})


def last(bundle, engine, request):
    seen = []
    run_request(engine, bundle, request, watch=lambda _, k, x: seen.append(x))
    return seen[-1]


def seen_at(scale, image=PICTURE):
    return {"image_prompt": ImagePrompt(image=image, scale=scale)}


@pytest.mark.parametrize("size", [(40, 48), (48, 40), (32, 32), (31, 97), (200, 64)])
def test_pixels_are_as_clips_processor_makes_them(size):
    image = (np.random.default_rng(1).random((*size, 3)) * 255).astype(np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    wanted = processor(Image.fromarray(image), return_tensors="pt").pixel_values[0]
    assert torch.allclose(clip_pixels(image, 32), wanted, atol=1e-5)


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (2, 0.5), (4, 0.8)])
def test_a_request_with_a_picture_prompt_is_diffusers_ip_adapter(both, steps, scale):
    bundle, engine = both
    pipeline = quiet(StableDiffusionPipeline.from_pretrained(bundle.root))
    pipeline.load_ip_adapter(bundle.root, subfolder="ip_adapter", weight_name="ip_adapter.safetensors")
    pipeline.set_ip_adapter_scale(scale)
    wanted = pipeline(
        PROMPT, num_inference_steps=steps, guidance_scale=1.0, height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(5), ip_adapter_image=Image.fromarray(PICTURE),
    ).images[0]  # fmt: skip
    found = last(bundle, engine, ask(steps=steps, **seen_at(scale)))
    assert (found - wanted).abs().max() < 1e-3 < (last(bundle, engine, ask(steps=steps)) - wanted).abs().max()


def test_a_scale_of_nothing_is_the_plain_picture_to_the_bit(both):
    bundle, engine = both
    plain = last(bundle, engine, ask())
    assert torch.equal(last(bundle, engine, ask(**seen_at(0.0))), plain)
    quiet_words = {"negative_prompt": "blue", "negative_mode": "nag"}
    assert torch.equal(last(bundle, engine, ask(**quiet_words, negative_scale=0.0)), plain)
    moved = [(last(bundle, engine, ask(**quiet_words, negative_scale=s)) - plain).abs().mean() for s in (1.0, 4.0)]
    assert 1e-4 < moved[0] < moved[1]


@pytest.mark.parametrize("method", ["nasa", "nag"])
def test_negative_prompts_go_to_the_attention_of_the_bundles_method(tiny_dmd2, tmp_path, method):
    bundle = adopted(tiny_dmd2, tmp_path / method, lambda root: adopt_negative(root, Negative(method=method)))
    engine = TorchEngine(bundle)
    with pytest.raises(InvalidRequest, match=r"negative_mode is .* has"):
        run_request(engine, bundle, ask(negative_prompt="blue", negative_mode={"nag": "nasa", "nasa": "nag"}[method]))
    found = run_request(engine, bundle, ask(steps=1, negative_prompt="blue", negative_mode=method, negative_scale=0.5))
    assert found.nfe == 1, "no second evaluation"
    one, other = (
        last(bundle, engine, ask(negative_prompt=words, negative_mode=method, negative_scale=0.5))
        for words in ("blue", "red")
    )
    assert (one - other).abs().max() > 1e-4, "another negative prompt, another picture"
    assert json.loads((bundle.root / "negative" / "config.json").read_text())["method"] == method


def test_rows_of_every_graph_share_the_runtime_and_stay_as_alone(both):
    bundle, engine = both
    other = np.ascontiguousarray(PICTURE[:, ::-1])
    requests = [
        ask(), ask(steps=4, seed=6), ask(**seen_at(0.7)), ask(**seen_at(1.2, other), seed=8, steps=4),
        ask(negative_prompt="blue", negative_mode="nag", seed=9),
        ask(negative_prompt="a tree", negative_mode="nag", negative_scale=2.0, steps=4),
    ]  # fmt: skip
    alone = [run_request(engine, bundle, request).pictures[0] for request in requests]
    with Runtime([bundle], engines={bundle.name: engine}) as runtime:
        tickets = [runtime.submit(request) for request in requests]
        together = [ticket.result(60).pictures[0] for ticket in tickets]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(alone, together, strict=True))


def test_guidance_pairs_beside_a_picture_prompt(both):
    """Under classifier-free guidance the unconditional half sees no picture."""
    bundle, engine = both
    from fewstep.models.spec import Guidance

    guided = replace(bundle.spec, guidance=Guidance(mode="cfg", default=2.0, range=(1.0, 9.0)))
    spec, bundle.spec = bundle.spec, guided
    try:
        plain = last(bundle, engine, ask(guidance=3.0))
        assert torch.allclose(last(bundle, engine, ask(guidance=3.0, **seen_at(0.0))), plain, atol=1e-6)
        assert (last(bundle, engine, ask(guidance=3.0, **seen_at(1.0))) - plain).abs().max() > 1e-2
    finally:
        bundle.spec = spec
