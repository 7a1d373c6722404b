"""The transformer families: folders of the real classes sample as diffusers' own pipelines, and their graphs export."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fewstep.export.graphs import random_feeds, role_graph
from fewstep.models.bundle import load_component
from fewstep.models.errors import BundleError
from fewstep.models.families import find_family
from fewstep.models.importing import import_folder
from fewstep.models.known import known
from fewstep.models.net_sana import GemmaText, SprintNet
from fewstep.models.sana_attention import FLOOR
from fewstep.models.shapes import make_folder
from fewstep.runtime.bench.diffusers_pipeline import call_settings, can_sample
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.sampling.text import Bare, Prompts
from fewstep.runtime.sampling.work import embed

PROMPT, NEGATIVE = "A red cat, a big dog.", "ugly blue"
LONG = "a red cat and a big dog on a blue hill in the rain"  # over the 24 tokens of the small CLIPs
SIZES = {"sana": (32, 64)}  # of the others (64, 96)
NAMES = {
    "pixart-alpha-tiny": "pixart-alpha",
    "pixart-sigma-tiny": "pixart-sigma",
    "sana-tiny": "sana",
    "sana-sprint-tiny": "sana-sprint",
    "sd3-tiny": "sd3",
    "flux-schnell-tiny": "flux-schnell",
    "flux-dev-tiny": "flux-dev",
    "z-image-tiny": "z-image",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(shape, name of the checkpoint) -> (bundle, engine, diffusers' pipeline on the same folder), each made once."""
    root, made = tmp_path_factory.mktemp("transformers"), {}

    def get(shape, name=None):
        key = shape, name or NAMES[shape]
        if key not in made:
            folder = root / shape
            if not folder.is_dir():
                make_folder(shape, folder)
            answers = replace(known(key[1]), steps=(1, 2, 4))
            size = SIZES.get(shape.split("-")[0], (64, 96))
            bundle = import_folder(folder, root / "-".join(key), answers=answers, sizes=[size])
            pipeline = DiffusionPipeline.from_pretrained(bundle.root)
            pipeline.set_progress_bar_config(disable=True)
            made[key] = bundle, TorchEngine(bundle), pipeline
        return made[key]

    return get


def ours(served, steps, *, prompt=PROMPT, **settings):
    bundle, engine, _ = served
    request = GenerateRequest(prompt=prompt, seed=5, steps=steps, **settings)
    return run_request(engine, bundle, request).pictures[0] / 255


def theirs(served, steps, *, guidance, prompt=PROMPT, **more):
    """diffusers' picture. All pipelines draw noise as we do, one float32 draw of [1, C, h, w] per picture: FLUX before
    it packs the latent into patches."""
    bundle, _, pipeline = served
    settings = call_settings(bundle, pipeline, steps, guidance=guidance)
    generator = torch.Generator("cpu").manual_seed(5)
    return pipeline(prompt, generator=generator, output_type="np", **settings, **more).images[0]


def assert_same(picture, reference):
    assert np.std(reference) > 0.05, "the reference is a flat picture: nothing is compared"
    assert np.abs(picture - reference).max() <= 1 / 255


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("shape", NAMES)
def test_pictures_are_diffusers(served, shape, steps):
    model = served(shape)
    mode = model[0].spec.guidance.mode
    settings = {"guidance": {"none": 1.0, "embedded": 4.5, "cfg": 4.0}[mode]}
    if mode == "cfg":
        settings["negative_prompt"] = NEGATIVE
    picture = ours(model, steps, **settings)
    assert can_sample(model[2], steps) == ((shape, steps) != ("pixart-alpha-tiny", 1))
    if not can_sample(model[2], steps):
        with pytest.raises(IndexError):
            theirs(model, steps, **settings)
        return
    assert_same(picture, theirs(model, steps, **settings))
    if steps > 1:
        return
    others = [{**settings, "prompt": "blue sky"}]
    others += [{**settings, "guidance": 6.0}] if mode != "none" else []
    others += [{**settings, "negative_prompt": ""}] if mode == "cfg" else []
    for other in others:
        assert np.abs(ours(model, steps, **other) - picture).max() > 3 / 255, f"{other} is not felt"


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_consistency_student_of_pixart_is_diffusers(served, steps):
    model = served("pixart-alpha-tiny", "pixart-lcm")
    assert_same(ours(model, steps), theirs(model, steps, guidance=1.0))


@pytest.mark.parametrize("shape", ["sd3-tiny", "flux-schnell-tiny"])
def test_clip_is_cut_where_t5_reads_on(served, shape):
    model = served(shape)
    assert_same(ours(model, 2, prompt=LONG, guidance=1.0), theirs(model, 2, prompt=LONG, guidance=1.0))
    bundle, engine, _ = model
    long, short = embed(engine, Prompts(bundle, 2), [LONG, LONG.removesuffix(" in the rain")])
    assert torch.equal(long["pooled"], short["pooled"]) and not torch.allclose(long["ctx"], short["ctx"], atol=0.1)


@pytest.mark.parametrize("shape", ["sana-tiny", "pixart-sigma-tiny", "z-image-tiny"])
def test_guidance_of_one_is_no_guidance(served, shape):
    model = served(shape, "z-image" if shape == "z-image-tiny" else None)
    assert_same(ours(model, 2, guidance=1.0), theirs(model, 2, guidance=1.0))


@pytest.mark.parametrize("shape", NAMES)
def test_a_row_does_not_depend_on_the_others(served, shape):
    """Prompts of different lengths, times and guidance in one call."""
    bundle, engine, _ = served(shape)
    feeds = random_feeds(bundle, "denoiser", batch=3, size=bundle.spec.sizes[0], seed=0, run=engine.run)
    (together,) = engine.run("denoiser", feeds)
    for row in range(3):
        (alone,) = engine.run("denoiser", {name: value[row : row + 1] for name, value in feeds.items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(together, 2))


def test_padding_behind_a_prompt_is_not_seen_by_z_image(served):
    """The length that prompts are padded to is ours alone; diffusers has none."""
    bundle, engine, _ = served("z-image-tiny")
    feeds = random_feeds(bundle, "denoiser", batch=2, size=bundle.spec.sizes[0], seed=0, run=engine.run)
    feeds["ctx_mask"] = (torch.arange(512)[None] < torch.tensor([[33], [64]])).float()
    (whole,) = engine.run("denoiser", feeds)
    for length in (64, 80):
        short = {**feeds, "ctx": feeds["ctx"][:, :length], "ctx_mask": feeds["ctx_mask"][:, :length]}
        torch.testing.assert_close(engine.run("denoiser", short)[0], whole, rtol=1e-4, atol=1e-5)
    noisy = {**feeds, "ctx": torch.where(feeds["ctx_mask"][:, :, None] > 0, feeds["ctx"], 9.0)}
    assert torch.equal(engine.run("denoiser", noisy)[0], whole)


def test_sana_keeps_the_first_token_and_the_last_behind_its_instruction(served):
    bundle, engine, pipeline = served("sana-tiny")
    prompt, negative = embed(engine, Prompts(bundle, 2), [PROMPT, Bare(NEGATIVE)])
    instruction = bundle.spec.text[0].prefix.split("\n")
    with torch.no_grad():
        a, a_mask, b, b_mask = pipeline.encode_prompt(
            PROMPT, True, NEGATIVE, complex_human_instruction=instruction, clean_caption=False
        )
    assert prompt["ctx"].shape == (300, 24) and isinstance(bundle.text_encoder(), GemmaText)
    for found, ctx, mask in ((prompt, a, a_mask), (negative, b, b_mask)):
        assert torch.equal(found["ctx_mask"], mask[0].float()) and 0 < mask.sum() < 300
        real = mask[0].bool()
        torch.testing.assert_close(found["ctx"][real], ctx[0][real], rtol=1e-4, atol=1e-5)


def test_sprint_speaks_trigflow(served):
    """At pi/2 all is noise and F is minus the clean sample; the velocity of a network that gives zero is known."""
    bundle, engine, _ = served("sana-sprint-tiny")
    net = bundle.denoiser_net()
    assert isinstance(net, SprintNet)
    torch.nn.init.zeros_(net.transformer.proj_out.weight)
    torch.nn.init.zeros_(net.transformer.proj_out.bias)
    feeds = random_feeds(bundle, "denoiser", batch=2, size=bundle.spec.sizes[0], seed=0, run=engine.run)
    feeds["t"] = torch.tensor([torch.pi / 2, 0.3])
    with torch.no_grad():
        f = net(*(feeds[name] for name in net.inputs))
    q = torch.sin(feeds["t"]) / (torch.cos(feeds["t"]) + torch.sin(feeds["t"]))
    torch.testing.assert_close(f, (1 - 2 * q)[:, None, None, None] * feeds["x"])


def test_every_role_reads_and_gives_what_the_decoder_and_encoder_say(served):
    for shape in ("sana-tiny", "sd3-tiny"):
        bundle, engine, pipeline = served(shape)
        latent = bundle.spec.latent
        picture = torch.rand(1, 3, *reversed(bundle.spec.sizes[0]), generator=torch.Generator().manual_seed(0)) * 2 - 1
        (code,) = engine.run("encoder", {"picture": picture})
        assert code.shape == (1, latent.channels, *(side // latent.factor for side in reversed(bundle.spec.sizes[0])))
        with torch.no_grad():
            (raw,) = pipeline.vae.encode(picture, return_dict=False)
            raw = raw if isinstance(raw, torch.Tensor) else raw.mode()
            torch.testing.assert_close(code, (raw - latent.shift) * latent.scale, rtol=1e-4, atol=1e-5)
            shown = pipeline.vae.decode(raw, return_dict=False)[0]
        torch.testing.assert_close(engine.run("decoder", {"latent": code})[0], shown, rtol=1e-3, atol=1e-4)


def test_times_that_depend_on_the_picture_refuse_several_sizes(served, tmp_path):
    served("flux-dev-tiny")
    folder = make_folder("flux-dev-tiny", tmp_path / "flux")
    with pytest.raises(BundleError, match="import it once for each --size"):
        import_folder(folder, tmp_path / "out", answers=known("flux-dev"), sizes=[(64, 96), (96, 64)])
    large = import_folder(folder, tmp_path / "large", answers=known("flux-dev"), sizes=[(256, 256)])
    small = served("flux-dev-tiny")[0]
    assert large.spec.grids[4][1] > small.spec.grids[4][1], "a larger picture stays noisy for longer"


def test_a_t5_saved_with_its_tied_weights_twice_still_loads(tmp_path):
    """Checkpoints from older transformers hold the embedding under both of its names."""
    folder = make_folder("pixart-sigma-tiny", tmp_path / "pixart")
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    before = load_component(folder, "text_encoder").encoder.embed_tokens.weight.clone()
    names = {"shared.weight", "encoder.embed_tokens.weight"}
    (kept,) = names & set(weights)
    weights[(names - {kept}).pop()] = weights[kept].clone()
    save_file(weights, path, metadata={"format": "pt"})
    assert torch.equal(load_component(folder, "text_encoder").encoder.embed_tokens.weight, before)
    del weights["shared.weight"], weights["encoder.embed_tokens.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BundleError, match="missing keys"):
        load_component(folder, "text_encoder")


def test_a_family_is_found_by_its_network(served):
    for shape, family in (("sana-tiny", "sana"), ("sana-sprint-tiny", "sana-sprint"), ("flux-dev-tiny", "flux-dev")):
        assert find_family(served(shape)[0].root).name == family


def test_a_size_that_does_not_fit_the_patches_is_refused(tmp_path):
    folder = make_folder("flux-schnell-tiny", tmp_path / "flux")
    with pytest.raises(BundleError, match="--size is 72x64; each side of a flux-schnell picture is a multiple of 16"):
        import_folder(folder, tmp_path / "out", answers=known("flux-schnell"), sizes=[(72, 64)])


@pytest.mark.parametrize("shape", ["z-image-tiny", "sana-sprint-tiny"])
def test_the_riskiest_denoisers_export(served, tmp_path, shape):
    """Z-Image's rotations are complex numbers in diffusers; of SANA's attention an exporter drops the 1e-15."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    from fewstep.export.onnx import export_role

    bundle, engine, _ = served(shape)
    graph = export_role(role_graph(bundle, "denoiser"), tmp_path)
    session = ort.InferenceSession(tmp_path / graph.file, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        feeds = random_feeds(bundle, "denoiser", batch=batch, size=bundle.spec.sizes[0], seed=batch, run=engine.run)
        (found,) = session.run(None, {port.name: feeds[port.name].numpy() for port in graph.inputs})
        (wanted,) = engine.run("denoiser", feeds)
        assert np.abs(found - wanted.numpy()).max() < 1e-4 * wanted.abs().max()
    if shape.startswith("sana"):
        constants = map(onnx.numpy_helper.to_array, onnx.load(tmp_path / graph.file).graph.initializer)
        assert any(c.size == 1 and np.isclose(float(c.reshape(-1)[0]), FLOOR, atol=0) for c in constants)


def test_a_token_that_attends_to_nothing_gives_nothing(served):
    """Where diffusers' 1e-15 was lost it is 0/0; elsewhere ours is diffusers' own."""
    bundle, _, pipeline = served("sana-tiny")
    theirs_, ours_ = pipeline.transformer.transformer_blocks[0].attn1, bundle.denoiser_net().transformer
    mended = ours_.transformer_blocks[0].attn1
    tokens = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = 0.0
    with torch.no_grad():
        found = mended(tokens)
        torch.testing.assert_close(found, theirs_(tokens), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[0, 0], mended.to_out[0].bias)
