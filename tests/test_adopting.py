"""Adopted components against diffusers' own pipelines: decoders, T2I-Adapters, ControlNet-Union."""

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

from beside_diffusers import BOUND, EDGE, EDGE_TENSOR, PROMPT, adopted, assert_exports, assert_same, ours, quiet, theirs
from fewstep.export.graphs import role_graph
from fewstep.models.adopting import (
    adopt_controlnet,
    adopt_decoder,
    adopt_t2i_adapter,
    control_kinds,
)
from fewstep.models.errors import BundleError
from fewstep.models.importing import Additions, import_folder
from fewstep.models.known import known
from fewstep.models.shapes import make_folder
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Control, GenerateRequest, resolve
from fewstep.runtime.service.local import Runtime

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
