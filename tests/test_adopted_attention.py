"""Image prompts (IP-Adapter) against diffusers' own pipeline, and negative attention against its authors' formulae."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from beside_diffusers import BOUND, adopted, assert_exports, assert_same, by_hand, ours, quiet, theirs
from fewstep.export.graphs import role_graph
from fewstep.models.adopting import (
    adopt_ip_adapter,
    adopt_negative,
)
from fewstep.models.bundle import load_bundle
from fewstep.models.cross_attention import cross_attentions
from fewstep.models.errors import BundleError
from fewstep.models.net_negative import Negative
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.text import Prompts
from fewstep.runtime.sampling.work import embed

# --- IP-Adapter


@pytest.fixture(scope="module", params=["plain", "plus"])
def image_prompt(request, tiny_dmd2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ip")
    torch.manual_seed(3)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         image_size=32, patch_size=8, projection_dim=24)
    )  # fmt: skip
    encoder.save_pretrained(folder / "image_encoder")
    file = folder / "adapter.safetensors"
    save_file(make_ip_adapter(tiny_dmd2.load("unet"), request.param), file)
    bundle = adopted(tiny_dmd2, folder / "bundle", lambda root: adopt_ip_adapter(root, file, folder / "image_encoder"))
    return bundle, TorchEngine(bundle)


def make_ip_adapter(unet, kind):
    """The tensors of a published file, random: names and shapes as diffusers' converter reads them."""

    def linear(out, width):
        return torch.randn(out, width) * 0.3

    tensors = {}
    for k, name in enumerate(cross_attentions(unet)):
        shape = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for part in ("k", "v"):
            tensors[f"ip_adapter.{2 * k + 1}.to_{part}_ip.weight"] = linear(*shape)
    if kind == "plain":
        own = {"proj.weight": linear(4 * 32, 24), "proj.bias": linear(1, 128)[0]}
        own |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    else:
        own = {"latents": torch.randn(1, 6, 64), "proj_in.weight": linear(64, 16), "proj_in.bias": torch.zeros(64)}
        own |= {"proj_out.weight": linear(32, 64), "proj_out.bias": torch.zeros(32)}
        own |= {"norm_out.weight": torch.ones(32), "norm_out.bias": torch.zeros(32)}
        for k in range(4):
            for norm in ("0.norm1", "0.norm2", "1.0"):
                own |= {f"layers.{k}.{norm}.weight": torch.ones(64), f"layers.{k}.{norm}.bias": torch.zeros(64)}
            shapes = {
                "0.to_q": (64, 64),
                "0.to_kv": (128, 64),
                "0.to_out": (64, 64),
                "1.1": (256, 64),
                "1.3": (64, 256),
            }
            own |= {f"layers.{k}.{name}.weight": linear(*shape) for name, shape in shapes.items()}
    return tensors | {f"image_proj.{name}": value for name, value in own.items()}


def test_image_prompts(image_prompt):
    bundle, engine = image_prompt
    pipeline = quiet(StableDiffusionPipeline.from_pretrained(bundle.root))
    pipeline.load_ip_adapter(bundle.root, subfolder="ip_adapter", weight_name="ip_adapter.safetensors")
    picture = Image.fromarray((np.random.default_rng(0).random((40, 48, 3)) * 255).astype(np.uint8))
    pixels = pipeline.feature_extractor(picture, return_tensors="pt").pixel_values
    (tokens,) = engine.run("image-prompt", {"pixels": pixels})
    layers = len(cross_attentions(bundle.load("unet")))
    for steps, scale in ((1, 1.0), (2, 0.5), (4, 0.8)):
        pipeline.set_ip_adapter_scale(scale)
        reference = theirs(pipeline, steps, ip_adapter_image=picture)
        feeds = {"img_tok": tokens, "img_scale": torch.full((1, layers), scale)}
        made = by_hand(bundle, engine, "denoiser+image-prompt", steps, **feeds)
        assert_same(made, reference, ours(bundle, engine, steps))


def test_no_image_prompt_is_the_plain_network_to_the_bit(image_prompt):
    bundle, engine = image_prompt
    feeds = dict(role_graph(bundle, "denoiser+image-prompt").feeds)
    plain = {name: feeds[name] for name in ("x", "t", "ctx")}
    (wanted,) = engine.run("denoiser", plain)
    (found,) = engine.run("denoiser+image-prompt", {**feeds, "img_scale": torch.zeros_like(feeds["img_scale"])})
    assert torch.equal(found, wanted)
    feeds["img_scale"][0] = 0.0
    (mixed,) = engine.run("denoiser+image-prompt", feeds)
    torch.testing.assert_close(mixed[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert (mixed[1] - wanted[1]).abs().max() > 1e-3
    shared = TorchEngine(bundle)._modules["denoiser"].unet.attn_processors
    assert {type(processor).__name__ for processor in shared.values()} == {"AttnProcessor2_0"}


def test_image_prompt_roles_export(image_prompt):
    bundle, _ = image_prompt
    assert_exports(bundle, "image-prompt")
    if role_graph(bundle, "image-prompt").module.network.pooled:  # the denoiser is the same for both
        assert_exports(bundle, "denoiser+image-prompt")


def test_other_image_prompts_are_refused(image_prompt, tiny_dmd2, tmp_path):
    encoder = image_prompt[0].root / "image_encoder"
    unet = tiny_dmd2.load("unet")
    good = make_ip_adapter(unet, "plain")
    one = "ip_adapter.1.to_k_ip.weight"
    cases = {
        "wide": ({**good, one: torch.zeros(16, 48)}, r"1.to_k_ip.weight of shape \(16, 48\), and .*attn2.* \(16, 32\)"),
        "few": ({k: v for k, v in good.items() if ".1." not in k}, "for 3 cross-attentions and this U-Net has 4"),
        "none": ({"a": torch.zeros(1)}, "is no IP-Adapter"),
        "other": ({**good, "image_proj.proj.weight": torch.zeros(128, 30)}, "image encoder 30 wide, and .*_dim 24"),
        "face": ({**{k: v for k, v in good.items() if "proj.weight" not in k}}, "is a Face-ID adapter"),
    }
    for name, (tensors, match) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(BundleError, match=match):
            adopted(
                tiny_dmd2, tmp_path / name,
                lambda root, n=name: adopt_ip_adapter(root, tmp_path / f"{n}.safetensors", encoder),
            )  # fmt: skip
    with pytest.raises(BundleError, match="is not a safetensors file; convert it"):
        adopted(tiny_dmd2, tmp_path / "bin", lambda root: adopt_ip_adapter(root, tmp_path / "ip.bin", encoder))


# --- negative attention


class ReferenceProcessor:
    """The authors' formulae as they wrote them, over the whole batch, for diffusers' pipeline."""

    def __init__(self, method, scale, avoid):
        self.method, self.scale, self.avoid = method, scale, avoid

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        def read(ctx):
            q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(ctx), attn.to_v(ctx)))
            return attn.batch_to_head_dim(attn.get_attention_scores(q, k) @ v)

        z = read(encoder_hidden_states)
        negative = read(self.avoid)
        if self.method == "nasa":
            z = z - self.scale * negative
        else:
            guided = z * self.scale - negative * (self.scale - 1)
            ratio = guided.norm(p=1, dim=-1, keepdim=True) / z.norm(p=1, dim=-1, keepdim=True)
            z = 0.25 * guided * ratio.clamp(max=2.5) / ratio + 0.75 * z
        return attn.to_out[1](attn.to_out[0](z))


@pytest.mark.parametrize(("method", "scale", "shift"), [("nasa", 0.6, 0.0), ("nag", 5.0, 1.0)])
def test_negative_attention(tiny_dmd2, tmp_path, method, scale, shift):
    bundle = adopted(tiny_dmd2, tmp_path / "b", lambda root: adopt_negative(root, Negative(method=method)))
    engine = TorchEngine(bundle)
    (avoid,) = embed(engine, Prompts(bundle, capacity=2), ["blue"])
    pipeline = quiet(StableDiffusionPipeline.from_pretrained(bundle.root))
    processors = dict(pipeline.unet.attn_processors)
    for name in cross_attentions(pipeline.unet):
        processors[name] = ReferenceProcessor(method, scale, avoid["ctx"][None])
    pipeline.unet.set_attn_processor(processors)
    feeds = {"neg_ctx": avoid["ctx"][None], "neg_scale": torch.tensor([scale - shift])}
    for steps in (1, 2, 4):
        made = by_hand(bundle, engine, "denoiser+negative", steps, **feeds)
        assert np.abs(made - theirs(pipeline, steps)).max() <= BOUND
    plain = {k: v for k, v in role_graph(bundle, "denoiser+negative").feeds.items() if k in ("x", "t", "ctx")}
    (wanted,) = engine.run("denoiser", plain)
    both = {"neg_ctx": plain["ctx"].flip(0), "neg_scale": torch.tensor([0.0, 4.0])}
    (mixed,) = engine.run("denoiser+negative", {**plain, **both})
    (none,) = engine.run("denoiser+negative", {**plain, **both, "neg_scale": torch.zeros(2)})
    assert torch.equal(none, wanted)
    assert (mixed[1] - wanted[1]).abs().max() > 1e-3


def test_a_guided_token_is_never_longer_than_tau(tmp_path):
    torch.manual_seed(0)
    read, avoided = torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    out = Negative(tau=1.5, alpha=1.0).mix(read, avoided, torch.tensor([0.0, 1.0, 50.0]))
    ratio = out.abs().sum(-1) / read.abs().sum(-1)
    assert float(ratio.max()) <= 1.5 + 1e-5
    assert torch.allclose(ratio[2], torch.tensor(1.5), atol=1e-4), "far out, every token meets the bound"
    assert torch.equal(out[0], read[0])
    assert torch.isfinite(Negative().mix(torch.zeros(1, 2, 4), avoided[:1, :2, :4], torch.tensor([3.0]))).all()


def test_negative_export_and_settings(tiny_dmd2, tmp_path):
    bundle = adopted(tiny_dmd2, tmp_path / "b", lambda root: adopt_negative(root, Negative()))
    assert "denoiser+negative" in bundle.roles and "denoiser+negative" not in tiny_dmd2.roles
    assert_exports(bundle, "denoiser+negative")
    with pytest.raises(BundleError, match="method is 'moon'; use one of nasa, nag, sun"):
        Negative(method="moon")
    with pytest.raises(BundleError, match=r"tau is 0.5"):
        Negative(tau=0.5)
    with pytest.raises(BundleError, match=r"alpha is 0.0"):
        Negative(alpha=0.0)
    config = tmp_path / "b" / "negative" / "config.json"
    config.write_text(json.dumps({"_class_name": "NegativeAttention", "strength": 1}))
    with pytest.raises(BundleError, match="has 'strength', which this release does not know"):
        load_bundle(tmp_path / "b", check_digests=False).network("denoiser+negative")
