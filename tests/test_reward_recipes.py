"""Recipes with a reward: short runs on the plane and on pictures, rewards of pictures, a preference model's folder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from fewstep.models.paths import VP
from fewstep.trainers.bench.recipes import Setup, compare, on_plane
from fewstep.trainers.bench.recipes_report import markdown
from fewstep.trainers.distribution import rewarding
from fewstep.trainers.distribution.rewarding import Favour, Rewarded
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.loop.player import PlayerSettings
from fewstep.trainers.networks.preference_model import load_preference, with_prompts
from fewstep.trainers.networks.rewards import Typical, check_reward, colourfulness, picture_reward
from fewstep.trainers.networks.student import Student
from fewstep.trainers.oracle.suite import checks_of
from fewstep.trainers.plane.net import plain_state, plane_student
from fewstep.trainers.plane.plane import CLASSES, conditions, plane
from fewstep.trainers.plane.rewards import plane_reward
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.recipes.distribution import dmd2
from fewstep.trainers.recipes.pleasing import rewarded
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.recipes.reward import REWARD, distillation_dpo, pso, rocm
from fewstep.trainers.runs.distill import distill
from tiny import tiny_latents

TINY = Setup(budget=PlaneBudget(steps=6, start_steps=4, batch=16, pairs=32), points=32)
FAST = {"batch": 4, "steps": 2, "picture_every": 0, "checkpoint_every": 0, "bf16": False}
FORMS = {
    **{name: {} for name in REWARD},
    "rg-lcd by proxy": {"proxy": True},
    "pso offline": {"offline": True},
    "pso of the data": {"offline": True, "winners": "data"},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_trains_and_samples_on_the_plane(form, start):
    name = form.split(" ")[0]
    plain = on_plane(name, TINY)
    recipe = configure(RECIPES[name], {**FORMS[form], "order": 2, **({} if name == "rg-lcd" else {"guidance": 1.0})})
    assert [stage.name for stage in recipe.stages] == [stage.name for stage in plain.stages]
    trained = run_recipe(recipe, plane(), start, TINY.budget)
    cond, uncond = conditions(torch.arange(CLASSES))
    for steps in trained.spec.grids:
        points = sample_points(trained, cond, uncond, steps, seed=0)
        assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())
    assert (trained.before is None) == (name == "rg-lcd")
    assert name == "rg-lcd" or any(
        not torch.equal(a, b) for a, b in zip(trained.net.parameters(), trained.before.parameters(), strict=True)
    )


def test_the_planes_lora_is_merged_before_another_is_laid_on(start):
    torch.manual_seed(1)
    first = plane_student(start, Student(lora_rank=2), path=VP(), seed=0)
    with torch.no_grad():
        for name, weight in first.named_parameters():
            if ".lora_B" in name:
                weight.normal_()
    second = plane_student(first, Student(lora_rank=2), path=VP(), seed=0)
    x, t, cond = torch.randn(4, 2), torch.full((4,), 500.0), conditions(torch.arange(4))[0]
    torch.testing.assert_close(second(x, t, cond), first(x, t, cond))
    assert not torch.allclose(first(x, t, cond), start(x, t, cond)) and set(plain_state(first)) == set(
        start.state_dict()
    )


def test_a_row_says_what_the_reward_gained_and_what_it_cost(tmp_path):
    report = compare(["pso"], TINY, tmp_path)
    found = report["rows"][0]["reward"]
    assert set(found["before"]) == set(found["after"]) == {"2", "4"} and 0.0 < found["aim"] < 1.0
    line = next(line for line in markdown(report).splitlines() if line.startswith("| pso | 0."))
    after = found["after"]["4"]
    assert f"-> {after['reward']:.3f} ({after['swd']:.3f})" in line


@pytest.fixture(scope="module")
def pictures(tiny_teacher):
    return tiny_latents(tiny_teacher)


@pytest.mark.parametrize("form", FORMS)
def test_each_trains_and_samples_pictures(form, tiny_teacher, pictures, tmp_path):
    name = form.split(" ")[0]
    warm = {} if name == "rg-lcd" else {"warm": 2}
    student = distill(
        name, tiny_teacher, tmp_path / "out", FAST | FORMS[form] | warm, data=pictures, device="cpu"
    )  # fmt: skip
    assert student.spec.recipe == name and student.spec.steps == RECIPES[name]().steps
    assert list((tmp_path / "out.run" / name / "samples").glob("step_*.png")), "its bundle's sampler has drawn pictures"


@pytest.mark.parametrize("kind", ["tiny_dmd2", "tiny_lcm"])
def test_a_distilled_student_is_tuned_and_keeps_how_it_is_sampled(
    kind, request, tiny_teacher, pictures, tmp_path
):  # fmt: skip
    init = request.getfixturevalue(kind)
    settings = FAST | {"init": str(init.root), "reward": "typical", "steps": 3}
    student = distill("rocm", tiny_teacher, tmp_path / "out", settings, data=pictures, device="cpu")
    assert [stage.name for stage in rocm(init="x").stages] == ["rocm"]
    assert student.spec.sampler == init.spec.sampler and student.spec.boundary == init.spec.boundary
    assert student.spec.grids == {n: init.spec.grids[n] for n in (1, 2, 4)}
    rows = [json.loads(line) for line in (tmp_path / "out.run" / "rocm" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["divergence"] == pytest.approx(0.0, abs=1e-9), "its reference is the start itself"


def test_another_contract_is_refused(tiny_teacher, pictures, tmp_path):
    settings = FAST | {"init": str(tiny_teacher.root)}
    with pytest.raises(RecipeError, match="tunes students whose sampler is 'lcm', and that of init 'tiny-teacher'"):
        distill("pso", tiny_teacher, tmp_path / "out", settings, data=pictures, device="cpu")


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: rocm(reward="nicer"), "reward is 'nicer'; it must be one of colourful, typical, objects, or a folder"),
        (lambda: rocm(divergence="tv"), "divergence is 'tv'; it must be one of kl, hellinger, fisher, js"),
        (lambda: rocm(warm=0), "name one by init=DIR"),
        (lambda: pso(counts=(1, 4)), "each must be at least 2, since one step has no noisy one"),
        (lambda: pso(winners="data"), "with offline=true data"),
        (lambda: distillation_dpo(counts=()), r"counts is \[\]"),
        (lambda: rewarded(RECIPES["lcm"](), "typical", scale=1.0), "lcm is a Consistency and takes no reward"),
        (lambda: plane_reward("/a/folder", plane()), "the plane has none; leave it out"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_remedy(make, wrong):
    with pytest.raises(RecipeError, match=wrong):
        make()


@pytest.fixture
def both_ways():
    return rewarded(dmd2(steps=2), "typical", scale=0.5, power=1.0, proxy=PlayerSettings(lr=1e-3))


def test_a_reward_is_set_beside_any_distribution_recipe():
    asked = {"reward": "typical", "reward_scale": 0.5, "reward_power": 1.0, "reward_proxy_lr": 1e-3}
    by_settings = configure(dmd2, asked)
    by_hand = rewarded(dmd2(), "typical", scale=0.5, power=1.0, proxy=PlayerSettings(lr=1e-3, warmup=50))
    assert by_settings == by_hand != dmd2()
    with pytest.raises(RecipeError, match="a reward is named and reward_scale is 0"):
        configure(dmd2, {"reward": "typical"})
    with pytest.raises(RecipeError, match="takes no reward beside its loss"):
        configure(RECIPES["cd"], {"reward_scale": 1.0})
    assert configure(rocm, {"reward": "typical"}).reward == "typical", "its own setting"
    with pytest.raises(RecipeError, match="rocm is about a reward already; reward_scale"):
        configure(rocm, {"reward": "typical", "reward_scale": 1.0})


def test_every_student_that_is_sold_has_the_reward():
    found = configure(RECIPES["msd"], {"students": 3, "reward_scale": 0.5, "reward_power": 1.0})
    for stage in found.stages:
        own = stage.objective.terms["student"]
        assert isinstance(own[-1], Favour) and all(isinstance(term, Rewarded) for term in own[:-1]), stage.name


def test_only_what_comes_back_through_the_samples_is_weighed():
    with pytest.raises(RecipeError, match=r"reward_power is 2\.0, and emd has no term on the samples as they were"):
        configure(RECIPES["emd"], {"reward_power": 2.0})
    terms = configure(RECIPES["dmd"], {"reward_power": 2.0}).objective.terms["student"]
    assert {type(term).__name__ for term in terms} == {"Rewarded", "Regress"}, "pairs of the teacher are no samples"
    guided = configure(RECIPES["swiftbrush"], {"reward_power": 2.0}).objective
    assert guided.guidance == RECIPES["swiftbrush"]().objective.guidance, "what a term says of itself holds"


def test_any_distribution_recipe_takes_a_reward(both_ways, start):
    assert both_ways.objective.players == ("student", "fake", "proxy")
    assert all(check.passed for check in checks_of(both_ways))
    trained = run_recipe(both_ways, plane(), start, replace(TINY.budget, steps=8))
    assert trained.net is not start
    assert rewarded(dmd2(), "typical").objective == dmd2().objective, "no scale and no power change nothing"


@pytest.mark.parametrize(
    "faulty",
    [
        lambda x, weight: x * weight.reshape(-1, *[1] * (x.ndim - 1)),
        lambda x, weight: x,
        lambda x, weight: x.detach() + (x - x.detach()) * weight.mean(),
    ],
)
def test_a_wrong_weight_of_samples_is_caught(faulty, both_ways, monkeypatch):
    monkeypatch.setattr(rewarding, "weighed", faulty)
    failed = [check.name for check in checks_of(both_ways) if not check.passed]
    assert any(name.startswith("weighed") for name in failed)


def test_colourfulness_is_hasler_and_suesstrunks():
    rng = np.random.default_rng(0)
    picture = rng.random((3, 8, 8))
    r, g, b = picture
    rg, yb = r - g, 0.5 * (r + g) - b
    wanted = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    grey = np.repeat(picture[:1], 3, 0)
    found = colourfulness(torch.tensor(np.stack([picture, grey])) * 2.0 - 1.0)
    assert float(found[0]) == pytest.approx(wanted, rel=1e-4) and float(found[1]) < 1e-3


def test_typical_is_the_density_of_the_features():
    eye = torch.nn.Flatten()
    pictures = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(Typical(eye)(pictures), -0.5 * pictures.flatten(1).square().mean(1))


def test_the_planes_reward_is_one_at_the_heaviest_mode():
    data = plane()
    judge = plane_reward("colourful", data)
    cond = conditions(torch.arange(CLASSES))[0]
    torch.testing.assert_close(judge(judge.modes, cond), torch.ones(CLASSES, dtype=torch.float64))
    assert float(judge(judge.modes + 5.0, cond).max()) < 1e-4


@pytest.fixture(scope="module")
def clip_folder(tiny_teacher, tmp_path_factory):
    """A CLIPModel of the real class with random weights, its tokenizer and its image processor, as PickScore's."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("preference")
    tokenizer = tiny_teacher.tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=8, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8,
        projection_dim=8,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_mean=[0.5, 0.4, 0.3]
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_preference_model_scores_as_its_own_class_does(clip_folder):
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    judge = load_preference(clip_folder, torch.nn.Identity())
    pixels = torch.randint(0, 256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(tokenizer(["a red circle", "b"], padding="max_length", max_length=24)["input_ids"])
    with torch.no_grad():
        seen = processor(images=list(pixels.byte()), return_tensors="pt")["pixel_values"]
        wanted = model(input_ids=ids, pixel_values=seen).logits_per_image.diagonal()
    x = (pixels.float() / 127.5 - 1.0).requires_grad_()
    found = judge(x, {"prompt": ids})
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert float(x.grad.abs().sum()) > 0.0 and all(w.grad is None for w in judge.model.parameters())
    assert judge.see(torch.randn(1, 3, 40, 60)).shape == (1, 3, 24, 24)
    with pytest.raises(RecipeError, match="reads prompts"):
        judge(x, {})


def test_a_student_is_tuned_to_a_preference_model(clip_folder, tiny_teacher, pictures, tmp_path):
    told = with_prompts(pictures, tiny_teacher, clip_folder)
    assert torch.equal(told.feeds["prompt"], pictures.feeds["ids"]), "the same tokenizer reads the same captions"
    settings = FAST | {"reward": str(clip_folder), "warm": 2}
    student = distill("rocm", tiny_teacher, tmp_path / "out", settings, data=pictures, device="cpu")
    assert student.spec.recipe == "rocm"
    rows = [json.loads(line) for line in (tmp_path / "out.run" / "rocm" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["reward"]) and row["norm"] > 0.0 for row in rows)


def test_a_folder_of_another_class_is_refused(tiny_teacher, tmp_path):
    with pytest.raises(RecipeError, match="holds a CLIPTextModel; a reward is a CLIPModel"):
        picture_reward(str(tiny_teacher.root / "text_encoder"), tiny_teacher)
    with pytest.raises(RecipeError, match="has no tokenizer"):
        with_prompts(tiny_latents(tiny_teacher), tiny_teacher, tmp_path)
    with pytest.raises(RecipeError, match=r"CLIPModel's config\.json"):
        check_reward(str(tmp_path))
