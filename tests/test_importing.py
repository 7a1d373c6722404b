"""Folders of the real classes become bundles that sample as diffusers' own pipeline does."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.export.golden import golden_steps
from fewstep.models import commands
from fewstep.models.bundle import load_bundle
from fewstep.models.errors import BundleError
from fewstep.models.importing import import_checkpoint, import_folder, merged_answers
from fewstep.models.known import FAMILIES, KNOWN, Answers, known
from fewstep.models.shapes import make_folder
from fewstep.models.spec import Guidance
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest, spec_steps

PROMPT = "a red cat"
CFG = Guidance(mode="cfg", default=5.0, range=(1.0, 9.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Shape -> folder, each made once."""
    root, made = tmp_path_factory.mktemp("folders"), {}

    def get(shape):
        if shape not in made:
            made[shape] = make_folder(shape, root / shape)
        return made[shape]

    return get


def pictures(bundle, steps, **settings):
    result = run_request(TorchEngine(bundle), bundle, GenerateRequest(prompt=PROMPT, seed=3, steps=steps, **settings))
    return result.pictures[0] / 255


def theirs(bundle, steps, **settings):
    pipeline = DiffusionPipeline.from_pretrained(bundle.root)
    pipeline.set_progress_bar_config(disable=True)
    width, height = bundle.spec.sizes[0]
    generator = torch.Generator("cpu").manual_seed(3)
    return pipeline(
        PROMPT, generator=generator, output_type="np", width=width, height=height, num_inference_steps=steps, **settings
    ).images[0]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("sd15-tiny", "sd15"), ("sd21-tiny", "sd21"), ("sd-turbo-tiny", "sd-turbo"), ("lcm-tiny", "lcm"),
        ("sdxl-tiny", "sdxl"), ("sdxl-turbo-tiny", "sdxl-turbo"), ("ssd-tiny", "ssd-1b"), ("sdxl-tiny", "tcd-lora"),
        ("sdxl-tiny", "lightning-1"), ("sdxl-tiny", "lightning-4"), ("sdxl-tiny", "dmd2-4"),
        ("sd15-tiny", "hyper-sd-2"), ("sd15-tiny", "hyper-sd-4"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The custom timestep schedule")
def test_a_folder_samples_as_diffusers_does(folders, tmp_path, shape, name):
    bundle = import_folder(folders(shape), tmp_path / name, answers=known(name))
    counts = [n for n in (1, 2, 4) if bundle.spec.allows(n)]
    seen = []
    for steps in counts:
        settings = {"guidance_scale": bundle.spec.guidance.default}
        if name.startswith("dmd2"):
            settings["timesteps"] = [int(t) for t in bundle.spec.grids[steps]]
        if bundle.spec.gamma is not None:
            settings["eta"] = bundle.spec.gamma
        reference = theirs(bundle, steps, **settings)
        assert np.std(reference) > 0.01, "the reference is a flat picture: nothing is compared"
        ours = pictures(bundle, steps)
        assert np.abs(ours - reference).max() <= 1 / 255
        seen.append(ours)
    for one, two in itertools.pairwise(seen):
        assert np.abs(one - two).max() > 4 / 255, "the step count made no difference"


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_a_student_of_ddim_serves_the_counts_it_was_made_for(folders, tmp_path, steps):
    """And so its golden cases, its calibration and its graphs of whole requests are of these."""
    bundle = import_folder(folders("sd15-tiny"), tmp_path / "b", answers=known(f"hyper-sd-{steps}"))
    assert [n for n in range(1, 51) if bundle.spec.allows(n)] == [steps]
    assert golden_steps(bundle.spec) == bundle.spec.steps == (steps,)
    assert bundle.extra_roles == ((f"picture-{steps}",) if steps <= 4 else ())
    assert spec_steps(None, bundle.spec) == steps


def test_sdxl_with_guidance_and_a_negative_prompt(folders, tmp_path):
    """The empty negative prompt is zeros, a written one is encoded."""
    bundle = import_folder(folders("sdxl-tiny"), tmp_path / "b", answers=known("sdxl"))
    assert bundle.spec.guidance.zero_empty and bundle.spec.size_ids == "sdxl"
    plain = theirs(bundle, 2, guidance_scale=6.0)
    assert np.abs(pictures(bundle, 2, guidance=6.0) - plain).max() <= 1 / 255
    negative = theirs(bundle, 2, guidance_scale=6.0, negative_prompt="a blue dog")
    assert np.abs(pictures(bundle, 2, guidance=6.0, negative_prompt="a blue dog") - negative).max() <= 1 / 255
    assert np.abs(plain - negative).max() > 4 / 255


@pytest.mark.parametrize(
    ("family", "answers", "said"),
    [
        ("sd15-tiny", Answers(guidance=CFG), r"does not state the step counts.*--steps 1,2,4.*--as NAME.*sd-turbo"),
        ("sdxl-tiny", Answers(steps=(4,)), r"does not state its guidance.*--guidance none or.*dmd2-4"),
        ("lcm-tiny", Answers(steps=(4,)), r"takes the guidance scale.*--guidance embedded:DEFAULT:LOW-HIGH.*lcm"),
        (
            "lcm-tiny",
            Answers(steps=(4,), guidance=CFG),
            r"guidance is 'cfg', but the network.*takes the guidance scale",
        ),
        ("sd15-tiny", replace(known("lcm"), steps=(4,)), r"'embedded', but the network.*does not take"),
        ("sd15-tiny", replace(known("sd15"), sampler="heun"), r"--sampler is 'heun'; use one of ddim, lcm"),
        ("sd15-tiny", replace(known("dmd2-4"), grids={4: (999.0, 749.0, 1499.0, 249.0)}), r"grids.4.*times must fall"),
    ],
)
def test_what_a_folder_does_not_state_is_asked_for(folders, tmp_path, family, answers, said):
    with pytest.raises(BundleError, match=said):
        import_folder(folders(family), tmp_path / "out", answers=answers)
    assert not list(tmp_path.iterdir()), "a refused import leaves nothing behind"


def edited(folder, tmp_path, file, **changes):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**data, **changes}))
    return copy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "PNDMScheduler"}, r"'PNDMScheduler', which this release does not sample; say --sampler ddim"),
        ({"rescale_betas_zero_snr": True}, r"rescale_betas_zero_snr = True; this release samples False"),
        ({"clip_sample": True}, r"clip_sample = True"),
        ({"thresholding": True}, r"thresholding = True"),
        ({"timestep_spacing": "linspace"}, r"timestep_spacing = 'linspace'; this release samples trailing or leading"),
        ({"beta_schedule": "sigmoid"}, r"refused by diffusers' own DDIMScheduler: sigmoid is not implemented"),
    ],
)
def test_a_scheduler_that_cannot_be_sampled_exactly_is_refused(folders, tmp_path, changes, said):
    folder = edited(folders("sd15-tiny"), tmp_path, "scheduler/scheduler_config.json", **changes)
    with pytest.raises(BundleError, match=said):
        import_folder(folder, tmp_path / "out", answers=replace(known("sd15"), sampler=None))


def test_a_stated_sampler_takes_the_place_of_one_it_cannot(folders, tmp_path):
    folder = edited(folders("sd15-tiny"), tmp_path, "scheduler/scheduler_config.json", _class_name="PNDMScheduler")
    bundle = import_folder(folder, tmp_path / "out", answers=known("sd15"))
    assert json.loads((bundle.root / "scheduler/scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    assert np.abs(pictures(bundle, 2) - theirs(bundle, 2, guidance_scale=7.5)).max() <= 1 / 255


def test_missing_and_dangerous_files_are_named(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders("sd15-tiny"), folder)
    answers = known("sd15")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"diffusion_pytorch_model.bin may hold code.*safe_serialization"):
        import_folder(folder, tmp_path / "out", answers=answers)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"unet cannot be loaded"):
        import_folder(folder, tmp_path / "out", answers=answers)
    shutil.rmtree(folder / "vae")
    with pytest.raises(BundleError, match=r"names vae, and there is no such folder"):
        import_folder(folder, tmp_path / "out", answers=answers)
    (folder / "model_index.json").unlink()
    with pytest.raises(BundleError, match=r"no model_index\.json; name a diffusers pipeline folder"):
        import_folder(folder, tmp_path / "out", answers=answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_variant_alone_is_taken_and_the_source_stays_as_it_was(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders("sd15-tiny"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    config = (folder / "unet" / "config.json").read_text()
    bundle = import_folder(folder, tmp_path / "out", answers=known("sd15"))
    assert (bundle.root / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "unet" / "config.json").read_text() == config
    with pytest.raises(BundleError, match="exists already"):
        import_folder(folder, tmp_path / "out", answers=known("sd15"))


def test_a_single_file_needs_the_settings_of_its_base(folders, tmp_path):
    weights = folders("sd15-tiny") / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(BundleError, match=r"is a single file: say --config DIR"):
        import_checkpoint(weights, tmp_path / "out", answers=known("sd15"))
    with pytest.raises(BundleError, match=r"is a folder with settings of its own: leave it out"):
        import_checkpoint(folders("sd15-tiny"), tmp_path / "out", config=tmp_path, answers=known("sd15"))
    with pytest.raises(BundleError, match=r"is not there; name a diffusers folder or"):
        import_checkpoint(tmp_path / "absent", tmp_path / "out", answers=known("sd15"))


def test_a_stated_prediction_reaches_diffusers_too(folders, tmp_path):
    answers = Answers(steps=(2,), guidance=Guidance(mode="none"), prediction="v")
    bundle = import_folder(folders("sd-turbo-tiny"), tmp_path / "out", answers=answers)
    assert bundle.spec.prediction == "v"
    assert np.abs(pictures(bundle, 2) - theirs(bundle, 2, guidance_scale=1.0)).max() <= 1 / 255


def test_stated_answers_go_before_known_ones():
    both = merged_answers(Answers(steps=(2,)), "sdxl-turbo")
    assert (both.steps, both.guidance) == ((2,), Guidance(mode="none"))
    with pytest.raises(BundleError, match=r"--as is 'sdxl-turo'; known checkpoints are"):
        merged_answers(Answers(), "sdxl-turo")
    with pytest.raises(BundleError, match=r"knows the times of \[4\] steps, not of \[2\]: say --grid"):
        merged_answers(Answers(steps=(2,)), "dmd2-4")
    assert merged_answers(Answers(steps=(2,), grids={2: (999.0, 499.0)}), "dmd2-4").grids == {2: (999.0, 499.0)}


def test_every_suggested_name_is_known_and_has_a_source():
    assert {name for names in FAMILIES.values() for name in names} <= set(KNOWN)
    assert all(answers.source and answers.steps and answers.guidance for answers in KNOWN.values())


def test_the_commands(tmp_path, capsys):
    assert commands.folder(["sd-turbo-tiny", "--out", str(tmp_path / "f")]) == 0
    arguments = ["--steps", "1,2,4", "--guidance", "none", "--out", str(tmp_path / "b"), "--name", "turbo"]
    assert commands.import_([str(tmp_path / "f"), *arguments]) == 0
    assert "sd, euler-ancestral, eps, steps 1, 2, 4, 32x32" in capsys.readouterr().out
    bundle = load_bundle(tmp_path / "b")
    assert bundle.name == "turbo" and bundle.spec.grids[2] == (999.0, 499.0)
    with pytest.raises(BundleError, match="there is no shape 'sd16'"):
        commands.folder(["sd16", "--out", str(tmp_path / "g")])
    for wrong in (["--steps", "0"], ["--guidance", "cfg"], ["--grid", "x"], ["--size", "64"]):
        with pytest.raises(SystemExit):
            commands.import_([str(tmp_path / "f"), *wrong, "--out", str(tmp_path / "c")])
