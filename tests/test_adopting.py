"""Adopted components against diffusers' own pipelines: decoders, ControlNet-Union, T2I- and IP-Adapters, negatives."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from fewstep.export.graphs import role_graph
from fewstep.models.adopting import (
    adopt_controlnet,
    adopt_decoder,
    adopt_ip_adapter,
    adopt_negative,
    adopt_t2i_adapter,
    control_kinds,
)
from fewstep.models.bundle import load_bundle, seal_bundle
from fewstep.models.cross_attention import cross_attentions
from fewstep.models.errors import BundleError
from fewstep.models.importing import Additions, import_folder
from fewstep.models.known import known
from fewstep.models.net_negative import Negative
from fewstep.models.shapes import make_folder
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.local import Runtime
from fewstep.runtime.loop import latent_shape, run_request
from fewstep.runtime.plan import compile_plan
from fewstep.runtime.request import Control, GenerateRequest, resolve
from fewstep.runtime.rng import NoiseStream
from fewstep.runtime.text import Prompts
from fewstep.runtime.torch_engine import TorchEngine
from fewstep.runtime.work import decode, embed

PROMPT = "a red cat, a big dog"
BOUND = 1 / 255
EDGE = np.zeros((32, 32, 3), np.uint8)
EDGE[8:24, 8:10], EDGE[8:10, 8:24] = 255, 200
EDGE_TENSOR = torch.from_numpy(EDGE / 255.0).permute(2, 0, 1)[None].float()


def adopted(bundle, to, *changes, **spec):
    """A copy of a bundle with components put in."""
    shutil.copytree(bundle.root, to)
    shutil.rmtree(to / "controlnet", ignore_errors=True)
    sources = [change(to) for change in changes]
    return seal_bundle(to, bundle.name, replace(bundle.spec, **spec), sources=sources)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline, steps, **settings):
    given = {"guidance_scale": 1.0, "output_type": "np", "height": 32, "width": 32, **settings}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(5), num_inference_steps=steps, **given).images[0]


def ours(bundle, engine, steps, **settings):
    return (
        run_request(engine, bundle, GenerateRequest(prompt=PROMPT, seed=5, steps=steps, **settings)).pictures[0] / 255
    )


def by_hand(bundle, engine, role, steps, **feeds):
    """The dull loop over one role with further inputs [1, ...]."""
    request = resolve(GenerateRequest(prompt=PROMPT, seed=5, steps=steps), bundle.spec)
    plan, noise = compile_plan(request, bundle.spec), NoiseStream(5)
    (cond,) = embed(engine, Prompts(bundle, capacity=2), [PROMPT])
    x = noise.draw(latent_shape(request, bundle.spec))[None] * plan.start_scale
    for row in plan.rows:
        (f,) = engine.run(role, {"x": x, "t": torch.tensor([row.t]), "ctx": cond["ctx"][None], **feeds})
        x = row.a * x + row.b * f
        if row.c:
            x = x + row.c * noise.draw(tuple(x.shape[1:]))[None]
    return decode(engine, x)[0] / 255


def assert_same(picture, reference, plain):
    assert np.abs(picture - reference).max() <= BOUND
    assert np.abs(plain - reference).max() > 4 * BOUND, "what was put in made no difference"


def assert_exports(bundle, role):
    """Traced at a batch of 2, the same at 3: nothing in it is bound to the batch."""
    graph = role_graph(bundle, role)
    program = torch.export.export(
        graph.module, tuple(graph.feeds.values()), dynamic_shapes=(tuple(graph.axes[name] for name in graph.feeds),)
    )
    three = [torch.cat([value, value[:1]]) for value in graph.feeds.values()]
    with torch.no_grad():
        wanted, found = graph.module(*three), program.module()(*three)
    if isinstance(wanted, torch.Tensor):
        wanted, found = (wanted,), (found,)
    for one, two in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


# --- tiny decoders


@pytest.mark.parametrize("scaling", [1.0, 0.5])
def test_a_tiny_decoder_takes_the_latents_as_the_pipeline_gives_them(tmp_path, scaling):
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=scaling,
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "taesd")
    folder = make_folder("sd15-tiny", tmp_path / "sd15")
    additions = Additions(decoder=tmp_path / "taesd")
    bundle = import_folder(folder, tmp_path / "b", answers=known("sd15"), additions=additions)
    assert bundle.spec.latent.scale == scaling
    engine = TorchEngine(bundle)
    pipeline = quiet(StableDiffusionPipeline.from_pretrained(folder, vae=tiny))
    full = quiet(StableDiffusionPipeline.from_pretrained(folder))
    assert isinstance(StableDiffusionPipeline.from_pretrained(bundle.root).vae, AutoencoderTiny)
    for steps in (1, 2, 4):
        reference = theirs(pipeline, steps, guidance_scale=5.0)
        assert_same(ours(bundle, engine, steps, guidance=5.0), reference, theirs(full, steps, guidance_scale=5.0))
    (source,) = json.loads((bundle.root / "bundle.json").read_text())["sources"]
    assert (source["kind"], source["file"]) == ("decoder", "taesd")


def test_a_decoder_of_another_latent_is_refused(tiny_dmd2, tmp_path):
    AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "taef1")  # fmt: skip
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(tmp_path / "deep")  # fmt: skip
    with pytest.raises(BundleError, match=r"latent_channels is 16, and .* has 4"):
        adopted(tiny_dmd2, tmp_path / "1", lambda root: adopt_decoder(root, tmp_path / "taef1"))
    with pytest.raises(BundleError, match=r"makes 4 pixels of a latent's one, and .*vae 2"):
        adopted(tiny_dmd2, tmp_path / "2", lambda root: adopt_decoder(root, tmp_path / "deep"))
    with pytest.raises(BundleError, match="'UNet2DConditionModel'; a tiny decoder is an AutoencoderTiny"):
        adopted(tiny_dmd2, tmp_path / "3", lambda root: adopt_decoder(root, tiny_dmd2.root / "unet"))


# --- T2I-Adapter


@pytest.fixture(scope="module", params=["full_adapter", "light_adapter"])
def adapter(request, tiny_dmd2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2i")
    torch.manual_seed(1)
    grey = 1 if request.param == "light_adapter" else 3
    net = T2IAdapter(
        in_channels=grey, channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type=request.param
    )
    net.save_pretrained(folder / "adapter")
    bundle = adopted(tiny_dmd2, folder / "bundle", lambda root: adopt_t2i_adapter(root, folder / "adapter"))
    return bundle, TorchEngine(bundle), net


@pytest.mark.filterwarnings("ignore:The decode_latents method")
@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (2, 1.5), (4, 0.7)])
def test_t2i_adapter(adapter, steps, scale):
    bundle, engine, net = adapter
    plain = quiet(StableDiffusionPipeline.from_pretrained(bundle.root))
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    pipeline = quiet(StableDiffusionAdapterPipeline(**parts, adapter=net, requires_safety_checker=False))
    edge = EDGE_TENSOR[:, : net.config.in_channels]
    reference = theirs(pipeline, steps, image=edge, adapter_conditioning_scale=scale)
    control = Control(edge=EDGE, scale=scale)
    assert_same(ours(bundle, engine, steps, control=control), reference, ours(bundle, engine, steps))


def test_adapters_share_calls_with_plain_rows_and_read_a_picture_once(adapter):
    bundle, engine, _ = adapter
    calls = []
    run = engine.run
    engine.run = lambda role, feeds: calls.append(role) or run(role, feeds)
    try:
        request = GenerateRequest(prompt=PROMPT, seed=5, steps=4, n=2, control=Control(edge=EDGE))
        with Runtime([bundle], engines={bundle.name: engine}) as runtime:
            pending = [runtime.submit(request), runtime.submit(GenerateRequest(prompt=PROMPT, seed=5, steps=2))]
            steered, plain = (ticket.result() for ticket in pending)
    finally:
        engine.run = run
    assert calls.count("adapter") <= 2, "one for calibration at most"
    assert "denoiser+adapter" in calls
    for k, picture in enumerate(steered.pictures):
        alone = run_request(engine, bundle, replace(request, seed=5 + k, n=1)).pictures[0]
        assert np.abs(picture.astype(int) - alone).max() <= 1
    assert np.abs(plain.pictures[0] / 255 - ours(bundle, engine, 2)).max() <= BOUND


def test_adapter_roles(adapter):
    bundle, _, _ = adapter
    assert {"adapter", "denoiser+adapter"} <= set(bundle.roles) and "controlnet" not in bundle.roles
    assert_exports(bundle, "adapter")


def test_an_adapter_for_another_base_is_refused(tiny_dmd2, tmp_path):
    T2IAdapter(channels=[24, 32], num_res_blocks=1, downscale_factor=2).save_pretrained(tmp_path / "wide")
    with pytest.raises(
        BundleError, match=r"'channels': \[24, 32\].* do not fit .*unet \(block_out_channels \[16, 32\]"
    ):
        adopted(tiny_dmd2, tmp_path / "b", lambda root: adopt_t2i_adapter(root, tmp_path / "wide"))
    T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2).save_pretrained(tmp_path / "fits")
    root = tmp_path / "controlled"
    shutil.copytree(tiny_dmd2.root, root)
    with pytest.raises(BundleError, match="has controlnet/ already"):
        adopt_t2i_adapter(root, tmp_path / "fits")


# --- ControlNet and ControlNet-Union


@pytest.fixture(scope="module")
def union(tmp_path_factory):
    folder = tmp_path_factory.mktemp("union")
    sdxl = make_folder("sdxl-tiny", folder / "sdxl")
    torch.manual_seed(2)
    unet = UNet2DConditionModel.from_pretrained(sdxl / "unet")
    shared = {k: v for k, v in unet.config.items() if k in CONTROL_FIELDS}
    net = ControlNetUnionModel(
        **shared, conditioning_embedding_out_channels=(8, 16), num_control_type=3, num_trans_channel=16,
        num_trans_head=2, num_proj_channel=16,
    )  # fmt: skip
    with torch.no_grad():  # fresh output layers are zero
        for name, weight in net.named_parameters():
            if name.startswith(("controlnet_", "task_embedding", "spatial_ch_projs")) and weight.ndim > 1:
                weight.normal_(std=0.2)
    net.save_pretrained(folder / "net")
    additions = Additions(controlnet=folder / "net", control_kinds=("pose", "depth", "canny"))
    bundle = import_folder(sdxl, folder / "b", answers=known("dmd2-4"), additions=additions)
    return bundle, TorchEngine(bundle), net


CONTROL_FIELDS = (
    "in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "block_out_channels", "layers_per_block",
    "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "use_linear_projection",
    "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim", "norm_num_groups",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:The custom timestep schedule")
def test_control_kinds_of_a_union(union):
    bundle, engine, net = union
    plain = quiet(StableDiffusionXLPipeline.from_pretrained(bundle.root))
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    pipeline = quiet(StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=net))
    seen = []
    for kind, name in enumerate(bundle.spec.control_kinds):
        settings = {"control_image": [EDGE_TENSOR], "control_mode": [kind], "controlnet_conditioning_scale": 0.8}
        reference = theirs(pipeline, 4, timesteps=[int(t) for t in bundle.spec.grids[4]], **settings)
        picture = ours(bundle, engine, 4, control=Control(edge=EDGE, scale=0.8, kind=name))
        assert_same(picture, reference, ours(bundle, engine, 4))
        seen.append(picture)
    assert np.abs(seen[0] - seen[1]).max() > BOUND, "the kind made no difference"


def test_rows_of_one_call_may_be_of_different_kinds(union):
    """diffusers' own call takes one kind for the batch; here each row has its own."""
    bundle, engine, _ = union
    feeds = dict(role_graph(bundle, "controlnet").feeds)
    feeds = {name: torch.cat([value[:1]] * 3) for name, value in feeds.items()}
    feeds["kind"], feeds["scale"] = torch.tensor([2, 0, 1]), torch.tensor([1.0, 0.0, 0.5])
    together = engine.run("controlnet", feeds)
    for k in range(3):
        alone = engine.run("controlnet", {name: value[k : k + 1] for name, value in feeds.items()})
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], many[k], rtol=1e-4, atol=1e-5)
    assert together[0][1].abs().max() == 0.0
    assert (together[0][0] - 2 * together[0][2]).abs().max() > 1e-4


def test_a_kind_must_be_named(union, tiny_dmd2):
    bundle, engine, _ = union
    with pytest.raises(InvalidRequest, match=r"control.kind is None; this model follows pose, depth, canny"):
        ours(bundle, engine, 4, control=Control(edge=EDGE))
    with pytest.raises(InvalidRequest, match="follows pictures of one kind: leave it out"):
        resolve(GenerateRequest(prompt="x", control=Control(edge=EDGE, kind="canny")), tiny_dmd2.spec)
    with pytest.raises(BundleError, match="3 control types, which is no published union's number"):
        control_kinds(bundle.root)
    with pytest.raises(BundleError, match="3 control types, which names 2 of them"):
        control_kinds(bundle.root, ("a", "b"))
    with pytest.raises(BundleError, match="has no ControlNet-Union"):
        control_kinds(tiny_dmd2.root, ("a", "b"))
    assert control_kinds(tiny_dmd2.root) == ()


def test_a_union_exports(union):
    assert_exports(union[0], "controlnet")


def test_a_controlnet_for_another_base_is_refused(union, tiny_dmd2, tiny_teacher, tmp_path):
    with pytest.raises(BundleError, match=r"its cross_attention_dim is 40, and .*unet has 32"):
        adopted(tiny_dmd2, tmp_path / "1", lambda root: adopt_controlnet(root, union[0].root / "controlnet"))
    bundle = adopted(tiny_dmd2, tmp_path / "2", lambda root: adopt_controlnet(root, tiny_teacher.root / "controlnet"))
    assert isinstance(bundle.controlnet().controlnet, ControlNetModel)
    with pytest.raises(BundleError, match="holds 'AutoencoderTiny'"):
        adopted(tiny_dmd2, tmp_path / "3", lambda root: adopt_controlnet(root, tiny_dmd2.root / "vae"))


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
    with pytest.raises(BundleError, match="method is 'sun'; use one of nasa, nag"):
        Negative(method="sun")
    with pytest.raises(BundleError, match=r"tau is 0.5"):
        Negative(tau=0.5)
    with pytest.raises(BundleError, match=r"alpha is 0.0"):
        Negative(alpha=0.0)
    config = tmp_path / "b" / "negative" / "config.json"
    config.write_text(json.dumps({"_class_name": "NegativeAttention", "strength": 1}))
    with pytest.raises(BundleError, match="has 'strength', which this release does not know"):
        load_bundle(tmp_path / "b", check_digests=False).network("denoiser+negative")
