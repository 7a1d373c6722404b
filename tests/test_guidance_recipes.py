"""Guidance distilled alone: settings, refusals, runs on the plane and on pictures, adapters beside a frozen U-Net."""

import dataclasses
import json

import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.models.bundle import load_bundle
from fewstep.models.errors import BundleError
from fewstep.models.guidance_adapter import FIELD, adapt, is_adapter
from fewstep.models.net_negative import Negative, NegativeDenoiser
from fewstep.models.networks import DenoiserNet
from fewstep.models.paths import VP
from fewstep.trainers.bench.recipes import Setup, on_plane
from fewstep.trainers.bench.recipes_report import markdown
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.pictures.preview import sample
from fewstep.trainers.plane.net import PlaneNet
from fewstep.trainers.plane.plane import CLASSES, conditions, plane
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.recipes.guidance import GUIDANCE, agd, w_embedding
from fewstep.trainers.runs.distill import distill
from tiny import copy_bundle, tiny_latents

TINY = Setup(budget=PlaneBudget(steps=4, start_steps=4, batch=16, pairs=32), points=8)
FAST = {"batch": 4, "steps": 2, "picture_every": 0, "checkpoint_every": 1, "bf16": False}
SMALL = {"w-embedding": {"guidance_width": 32}, "agd": {"width": 8, "walk": 2}, "lora-guided": {"rank": 2}}
INPUT = (torch.randn(2, 4, 16, 16), torch.tensor([999.0, 259.0]), torch.randn(2, 24, 32))


def answer(unet, w=None):
    with torch.no_grad():
        return DenoiserNet(unet.eval())(*INPUT, *([] if w is None else [w]))


@pytest.fixture(scope="module")
def data(tiny_teacher):
    return tiny_latents(tiny_teacher)


@pytest.fixture(scope="module")
def students(tiny_teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    return {
        name: distill(name, tiny_teacher, folder / name, FAST | SMALL[name], data=data, device="cpu")
        for name in GUIDANCE
    }


@pytest.mark.parametrize("name", GUIDANCE)
def test_each_trains_and_samples_on_the_plane(name):
    torch.manual_seed(0)
    start = PlaneNet(VP()).requires_grad_(False)
    trained = run_recipe(on_plane(name, TINY), plane(), start, TINY.budget)
    assert trained.w == 3.0 and set(trained.spec.grids) == {2, 4, 8, 20, 40}
    cond, uncond = conditions(torch.arange(CLASSES))
    points = sample_points(trained, cond, uncond, 4, seed=0)
    assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())
    kept = {
        key
        for key, weight in start.state_dict().items()
        if torch.equal(weight, trained.net.state_dict().get(key, weight))
    }
    assert (len(kept) == len(start.state_dict())) == (name != "w-embedding"), (
        "adapters and LoRA leave the base as it is"
    )


@pytest.mark.parametrize(("name", "mode"), [("w-embedding", "embedded"), ("agd", "embedded"), ("lora-guided", "none")])
def test_a_student_is_a_bundle_that_samples_in_one_evaluation_a_step(students, tiny_teacher, name, mode):
    bundle = students[name]
    assert (bundle.spec.guidance.mode, bundle.spec.steps, bundle.spec.sampler) == (mode, (2, 4, 8, 20, 40), "ddim")
    net, calls = bundle.denoiser(), []
    counted = dataclasses.replace(net, net=lambda x, t, cond: (calls.append(len(x)), net.raw(x, t, cond))[1])
    cond = {"ctx": INPUT[2]}
    x = sample(counted.net, bundle.spec, 4, cond, (2, 4, 16, 16), w=2.0, uncond=None)
    assert torch.isfinite(x).all() and calls == [2] * 4
    pipe = json.loads((bundle.root / "model_index.json").read_text())
    assert (pipe["_class_name"], pipe["scheduler"][1]) == ("StableDiffusionPipeline", "DDIMScheduler")


def test_diffusers_makes_the_embedded_students_picture(students):
    pipe = DiffusionPipeline.from_pretrained(students["w-embedding"].root, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((len(args[0]), kwargs["timestep_cond"])), with_kwargs=True
    )
    pipe("a red circle", num_inference_steps=4, guidance_scale=2.0, output_type="latent", height=32, width=32)
    assert [count for count, _ in calls] == [1] * 4 and all(told is not None for _, told in calls)


def test_adapters_stand_beside_weights_that_stay(students, tiny_teacher):
    adapted, base = students["agd"].load("unet"), tiny_teacher.load("unet")
    mine = adapted.state_dict()
    assert all(torch.equal(mine[key], weight.half().float()) for key, weight in base.state_dict().items())
    added = {key for key in mine if is_adapter(key)}
    assert set(mine) - added == set(base.state_dict()) and 0 < sum(mine[key].numel() for key in added) < 0.1 * sum(
        weight.numel() for weight in mine.values()
    )
    assert adapted.config[FIELD] == 8 and DenoiserNet(adapted).inputs == ("x", "t", "ctx", "w")
    changed = answer(adapted, torch.tensor([1.0, 1.0])) - answer(adapted, torch.tensor([5.0, 5.0]))
    assert changed.abs().max() > 0


def test_fresh_adapters_change_nothing(tiny_teacher):
    before = answer(tiny_teacher.load("unet"))
    torch.testing.assert_close(answer(adapt(tiny_teacher.load("unet"), 8), torch.tensor([1.0, 7.0])), before)


def test_one_row_does_not_know_another(students):
    unet = students["agd"].load("unet")
    both = answer(unet, torch.tensor([2.0, 4.0]))
    with torch.no_grad():
        alone = DenoiserNet(unet)(*(value[1:] for value in INPUT), torch.tensor([4.0]))
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [3, 7, 0, "32", True, None])
def test_an_impossible_width_is_refused(tiny_teacher, width):
    with pytest.raises(BundleError, match=r"fewstep_guidance_adapter is .*; it must be an even width"):
        adapt(tiny_teacher.load("unet"), width)


def test_a_broken_folder_is_refused(students, tmp_path):
    folder = copy_bundle(students["agd"], tmp_path / "broken")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {FIELD: 16}))
    with pytest.raises(BundleError, match="cannot be loaded"):
        load_bundle(folder, check_digests=False).load("unet")


def test_an_attention_is_not_two_of_them(students):
    with pytest.raises(BundleError, match="is a GuidanceAdapter already"):
        NegativeDenoiser(students["agd"].load("unet"), Negative())


def test_what_cannot_be_taught_is_refused_with_both_names(students, tiny_teacher, tiny_lcm, data, tmp_path):
    with pytest.raises(
        RecipeError, match=r"w-embedding takes in classifier-free guidance, and 'tiny-lcm'|has guidance 'embedded'"
    ):
        distill("w-embedding", tiny_lcm, tmp_path / "a", FAST, data=data)
    with pytest.raises(RecipeError, match="has guidance adapters of width 8, and this recipe's student has none"):
        distill("lcm-lora", tiny_teacher, tmp_path / "b", FAST | {"init": str(students["agd"].root)}, data=data)
    with pytest.raises(RecipeError, match="has guidance adapters of width 8, and this recipe's student has 16"):
        distill("agd", tiny_teacher, tmp_path / "c", FAST | {"width": 16, "init": str(students["agd"].root)}, data=data)


def test_a_default_outside_of_what_is_trained_is_refused():
    with pytest.raises(RecipeError, match=r"agd: guidance_default is 8\.0, outside"):
        agd(guidance_default=8.0)
    assert w_embedding(guidance_high=9.0, guidance_default=8.0).sampling.guidance_range == (1.0, 9.0)


def test_a_table_compares_at_equal_evaluations():
    score = {"swd": 0.3, "coverage": 1.0, "weight_error": 0.0}
    steps = dict.fromkeys(("1", "2", "4", "10", "100", "reference"), score)
    row = {
        "recipe": "agd", "family": "guidance", "guidance": 3.0, "steps": {"2": score}, "seconds": 1.0,
        "against": {"2": {"better": True, "near": False}}, "student_evaluations": 1, "teacher_evaluations": 1,
    }  # fmt: skip
    run = {"trained": 1, "kept": 2, "jobs": 2, "minutes": 3.5}
    table = markdown({"teacher": {"3": {"steps": steps}}, "rows": [row], "left_out": {}, "run": run})
    assert "1 trained in 3.5 minutes, 2 at a time; 2 kept from runs before." in table
    assert "| 2 evaluations | 4 evaluations | 8 evaluations | 20 evaluations |" in table
    assert "| agd | guidance | 3 | 0.300 (100%, 0.000) |" in table and "| 1 step |" not in table
