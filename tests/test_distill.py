"""From teacher to sealed student: exact surgery, a whole small run per recipe, resume, and diffusers' own pipelines."""

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.models.bundle import load_bundle
from fewstep.models.networks import DenoiserNet
from fewstep.models.paths import TrigFlow
from fewstep.trainers.bench.commands import distill as command
from fewstep.trainers.errors import CheckpointError, RecipeError
from fewstep.trainers.networks.student import Student, add_guidance, build_student, fold_guidance, merged
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs import distill as module
from fewstep.trainers.runs.budget import estimate
from fewstep.trainers.runs.distill import distill
from tiny import tiny_latents

FAST = {"batch": 4, "steps": 2, "picture_every": 0, "checkpoint_every": 1, "bf16": False}
INPUT = (torch.randn(2, 4, 16, 16), torch.tensor([999.0, 259.0]), torch.randn(2, 24, 32))


@pytest.fixture(scope="module")
def data(tiny_teacher):
    return tiny_latents(tiny_teacher)


def answer(unet, w=None):
    with torch.no_grad():
        net = DenoiserNet(unet.eval())
        return net(*INPUT, *([w] if net.takes_w else []))


def test_a_new_guidance_input_changes_nothing(tiny_teacher):
    unet = tiny_teacher.load("unet")
    wider = add_guidance(unet, 32)
    assert torch.equal(answer(wider, torch.tensor([1.0, 7.0])), answer(unet))
    assert add_guidance(wider, 32) is wider
    with pytest.raises(RecipeError, match="guidance_width"):
        add_guidance(wider, 64)


def test_folding_the_guidance_input_is_exact(tiny_lcm):
    unet = tiny_lcm.load("unet")
    folded = fold_guidance(unet, 3.5)
    assert folded.config.time_cond_proj_dim is None
    assert torch.allclose(answer(folded), answer(unet, torch.full((2,), 3.5)), atol=1e-5)
    assert not torch.allclose(answer(folded), answer(unet, torch.full((2,), 2.0)), atol=1e-3)


def test_new_lora_changes_nothing_and_merges_exactly(tiny_teacher):
    unet = tiny_teacher.load("unet")
    student = build_student(tiny_teacher, Student(lora_rank=2), fold_scale=1.0)
    assert torch.allclose(answer(student), answer(unet), atol=1e-6)
    trained = [p for name, p in student.named_parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in unet.parameters())
    with torch.no_grad():
        for p in trained:
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    plain = merged(student)
    assert type(plain) is type(unet) and list(plain.state_dict()) == list(unet.state_dict())
    assert torch.allclose(answer(plain), answer(student), atol=1e-4)
    assert not torch.allclose(answer(plain), answer(unet), atol=1e-2)


EXPECTED = {
    "lcm": ("LatentConsistencyModelPipeline", "LCMScheduler", "embedded", (1, 2, 4, 8)),
    "lcm-lora": ("StableDiffusionPipeline", "LCMScheduler", "none", (1, 2, 4, 8)),
    "dmd2": ("StableDiffusionPipeline", "LCMScheduler", "none", (1, 2, 4)),
    "progressive": ("StableDiffusionPipeline", "DDIMScheduler", "none", (1, 2)),
    "bk-sdm": ("StableDiffusionPipeline", "DDIMScheduler", "cfg", (4, 8, 25)),
}
COMPRESSED = ("edgefusion", "a-sdm", "vdmini", "slim", "linfusion")
EXPECTED |= dict.fromkeys(COMPRESSED, EXPECTED["lcm"])
EXPECTED |= {
    "ct": EXPECTED["lcm-lora"],
    "tcd": ("StableDiffusionPipeline", "TCDScheduler", "none", (1, 2, 4, 8)),
    "pcm": ("StableDiffusionPipeline", "DDIMScheduler", "none", (4,)),
    "hyper-sd": ("StableDiffusionPipeline", "DDIMScheduler", "none", (1, 2, 4, 8)),
}
FOR_UNETS = list(EXPECTED)
"""Of each way to be trained or sampled one recipe at least; those for transformers are in test_ppcl."""


@pytest.fixture(scope="module")
def students(tiny_teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    extra = {"lcm": {"guidance_width": 32}, "lcm-lora": {"rank": 2}, "dmd2": {"every": 1}}
    extra["progressive"] = {"start_steps": 4, "final_steps": 1}
    extra |= {name: {"guidance_width": 32} for name in ("edgefusion", "vdmini", "slim", "linfusion")}
    extra["a-sdm"] = {"guidance_width": 32, "steps": 4}
    extra["hyper-sd"] = {"steps": 8}
    extra["slim"] |= {"pairs": 5, "pair_steps": 2}
    return {
        name: distill(name, tiny_teacher, folder / f"tiny-{name}", FAST | extra.get(name, {}), data=data, device="cpu")
        for name in FOR_UNETS
    }


STAGES = {"progressive": ["2-to-1", "4-to-2"], "a-sdm": ["apart", "kd", "lcm"]}
STAGES |= {name: ["kd", "lcm"] for name in ("edgefusion", "vdmini", "linfusion")}
STAGES["hyper-sd"] = ["segments-1", "segments-2", "segments-4", "segments-8"]
STAGES["slim"] = ["lcm", "reflow"]


@pytest.mark.parametrize("name", FOR_UNETS)
def test_a_student_is_a_bundle_with_its_contract(students, tiny_teacher, name):
    pipeline, scheduler, guidance, steps = EXPECTED[name]
    bundle = students[name]
    spec, index = bundle.spec, json.loads((bundle.root / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == (pipeline, scheduler)
    assert (spec.guidance.mode, spec.steps, spec.recipe, spec.teacher) == (guidance, steps, name, tiny_teacher.name)
    assert spec.path == tiny_teacher.spec.path and spec.latent == tiny_teacher.spec.latent
    assert bundle.has("controlnet") == (name not in ("slim", "a-sdm")), "a ControlNet goes along where its outputs fit"
    plain = answer(bundle.load("unet"), torch.full((2,), 3.0))
    assert torch.isfinite(plain).all() and not torch.allclose(plain, answer(tiny_teacher.load("unet")), atol=1e-6)
    assert (bundle.root / "pytorch_lora_weights.safetensors").is_file() == (name == "lcm-lora")
    run = bundle.root.with_name(bundle.root.name + ".run")
    stages = sorted(p.name for p in run.iterdir() if p.is_dir())
    assert stages == STAGES.get(name, [name])
    for stage in stages:
        made = {p.name for p in (run / stage).iterdir()}
        pairs = {"pairs.safetensors"} if stage == "reflow" else set()
        assert made == pairs | {"checkpoint.pt", "metrics.jsonl", "loss.png", "samples", "student.safetensors"}


@pytest.mark.parametrize("name", ["lcm", "dmd2", "progressive", "edgefusion", "slim", "tcd", "pcm"])
def test_diffusers_loads_a_student_and_walks_our_times(students, name):
    bundle = students[name]
    pipe = DiffusionPipeline.from_pretrained(bundle.root, local_files_only=True)
    assert type(pipe).__name__ == EXPECTED[name][0]
    for steps, times in bundle.spec.grids.items():
        pipe.scheduler.set_timesteps(steps)
        assert pipe.scheduler.timesteps.tolist() == list(times)


def test_a_cut_run_resumes_to_the_same_student(students, tiny_teacher, data, tmp_path, monkeypatch):
    settings = FAST | {"start_steps": 4, "final_steps": 1}
    out, real = tmp_path / "student", module.train

    def cut(method, source, loop, folder, **kwargs):
        if kwargs["label"] == "2-to-1" and not kwargs["resume"]:
            real(method, source, dataclasses.replace(loop, steps=1), folder, **kwargs)
            raise KeyboardInterrupt
        return real(method, source, loop, folder, **kwargs)

    monkeypatch.setattr(module, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        distill("progressive", tiny_teacher, out, settings, data=data, device="cpu")
    assert not out.exists()
    resumed = distill("progressive", tiny_teacher, out, settings, data=data, device="cpu", resume=True)
    assert resumed.weights_digest == students["progressive"].weights_digest
    with pytest.raises(CheckpointError, match="differs"):
        distill("progressive", tiny_teacher, out, settings | {"lr": 0.5}, data=data, resume=True)
    with pytest.raises(CheckpointError, match="holds no run"):
        distill("lcm", tiny_teacher, tmp_path / "other", data=data, resume=True)


def test_a_student_may_start_from_another(students, tiny_teacher, data, tmp_path):
    settings = FAST | {"steps": 1, "lr": 0.0, "guidance": 2.5, "init": str(students["lcm"].root), "fp16_weights": False}
    bundle = distill("dmd2", tiny_teacher, tmp_path / "warm", settings, data=data, device="cpu")
    folded = fold_guidance(students["lcm"].load("unet"), 2.5)
    assert torch.allclose(answer(bundle.load("unet")), answer(folded), atol=1e-5)


def test_a_one_step_student_may_be_deeper_than_its_teacher(tiny_teacher, data, tmp_path):
    deeper = FAST | {"every": 1, "counts": [1], "extra_layers": [1, 1]}
    first = distill("dmd2", tiny_teacher, tmp_path / "first", deeper, data=data, device="cpu")
    assert first.spec.steps == (1,)
    assert list(first.load("unet").config.transformer_layers_per_block) == [2, 2]
    pipe = DiffusionPipeline.from_pretrained(first.root, local_files_only=True)
    assert list(pipe.unet.config.transformer_layers_per_block) == [2, 2]
    further = FAST | {"every": 1, "counts": [1], "init": str(first.root)}
    second = distill("dmd2", tiny_teacher, tmp_path / "second", further, data=data, device="cpu")
    assert list(second.load("unet").config.transformer_layers_per_block) == [2, 2], "it begins as the student it is"


def test_a_stage_may_start_from_random_weights(tiny_teacher, data, tmp_path):
    recipe = configure(RECIPES["lcm"], FAST)
    stage = dataclasses.replace(recipe.stages[0], start="noise", steps=1)
    settings = dataclasses.replace(stage.player_settings["student"], lr=0.0)
    stage = dataclasses.replace(stage, player_settings={"student": settings}, average=None)
    student = distill(dataclasses.replace(recipe, stages=(stage,)), tiny_teacher, tmp_path / "out", data=data)
    mine, theirs = (bundle.load("unet").conv_in.weight for bundle in (student, tiny_teacher))
    assert mine.shape == theirs.shape and (mine - theirs).abs().max() > 1e-3


def test_another_path_is_refused(tiny_teacher, data, tmp_path):
    recipe = configure(RECIPES["progressive"], FAST)
    with pytest.raises(RecipeError, match=r"'trig' path.*'vp'"):
        distill(dataclasses.replace(recipe, path=TrigFlow()), tiny_teacher, tmp_path / "p", data=data)


def test_the_command_trains_and_lists_what_it_will_do(tiny_teacher, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(_picture(tmp_path), pictures / "a.png")
    (pictures / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red circle"}\n')
    args = ["dmd2", "--teacher", str(tiny_teacher.root), "--steps", "1", "--set", "batch=2", "--set", "every=1"]
    assert command([*args, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"]["run"]["batch"] == 2 and plan["recipe"]["stages"][0]["steps"] == 1
    parameters = sum(p.numel() for p in tiny_teacher.load("unet").parameters())
    student = plan["estimate"]["players"]["student"]
    assert student["parameters"] == parameters and student["bytes"] == 4 * parameters * (2 + 3)
    out = tmp_path / "student"
    kept = tmp_path / "latents.safetensors"
    more = ["--set", f"data={pictures}", "--set", f"latents={kept}", "--out", str(out), "--device", "cpu"]
    assert command([*args, *more]) == 0
    assert kept.is_file() and load_bundle(out).spec.recipe == "dmd2"
    assert "for 1, 2, 4 steps" in capsys.readouterr().out


def _picture(folder):
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 0, 0)).save(folder / "picture.png")
    return folder / "picture.png"


def test_the_command_refuses_what_it_does_not_know(tiny_teacher):
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        command(["lcm", "--teacher", str(tiny_teacher.root), "--set", "step=1", "--dry-run"])
    with pytest.raises(SystemExit, match="2"):
        command(["lcm", "--teacher", str(tiny_teacher.root)])


def test_the_estimate_counts_lora_weights_once(tiny_teacher):
    whole = estimate(configure(RECIPES["lcm"], {"guidance_width": 32}), tiny_teacher.root)["players"]["student"]
    lora = estimate(configure(RECIPES["lcm-lora"], {"rank": 2}), tiny_teacher.root)["players"]["student"]
    assert whole["trained"] == whole["parameters"] and 0 < lora["trained"] < lora["parameters"] / 2
