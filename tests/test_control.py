"""ControlNets of few-step students: the detector, who hears the control, small runs on pictures and on the plane."""

import json
import random

import pytest
import torch

from fewstep.models.bundle import load_bundle
from fewstep.trainers.bench.commands import distill as command
from fewstep.trainers.bench.control import asked as asked_of
from fewstep.trainers.bench.control import bench, measure, recipe_of, table
from fewstep.trainers.bench.control import command as bench_command
from fewstep.trainers.bench.recipes import Setup, on_plane
from fewstep.trainers.distribution.control_terms import CONTROL
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.student import load_denoiser
from fewstep.trainers.pictures import scenes
from fewstep.trainers.pictures.data import to_pixels
from fewstep.trainers.pictures.edges import EdgeLikelihood, agreement, detect
from fewstep.trainers.plane.control import NOISE, Likelihood, asked, seen
from fewstep.trainers.plane.plane import CLASSES, conditions, plane
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.recipes.casting import assemble_stage
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.control import control_networks, fresh_control
from fewstep.trainers.runs.distill import distill

FAST = {"batch": 2, "steps": 2, "scenes": 4, "checkpoint_every": 0, "bf16": False}
TINY = Setup(budget=PlaneBudget(steps=4, start_steps=4, batch=16), points=8)


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(3)
    found = [scenes.sample(rng).scene for _ in range(16)]
    pictures = torch.stack([to_pixels(scenes.render(scene)) for scene in found])
    edges = torch.stack([to_pixels(scenes.edges(scene)).add(1).div(2) for scene in found])
    return pictures, edges


def test_the_detector_finds_the_outlines_that_scenes_draws(drawn):
    pictures, edges = drawn
    own, other = agreement(pictures, edges), agreement(pictures, edges.roll(1, 0))
    assert own.precision > 0.97 and own.recall > 0.9 and own.f1 > 0.94
    assert other.f1 < 0.4 and float(detect(torch.zeros(1, 3, 8, 8)).max()) == 0.0


def test_the_likelihood_is_greatest_at_the_own_picture_and_has_a_gradient(drawn):
    pictures, edges = drawn
    likely = EdgeLikelihood(lambda x: x)
    own, other = likely(pictures, {"edge": edges}), likely(pictures, {"edge": edges.roll(1, 0)})
    assert bool((own > other).all()) and bool((own < 0).all())
    x = pictures.roll(1, 3).requires_grad_()
    likely(x, {"edge": edges}).sum().backward()
    assert float(x.grad.abs().sum()) > 0.0


def test_only_the_student_and_the_fake_hear_the_control(tiny_lcm, tiny_teacher):
    networks = control_networks(configure(RECIPES["jdm"], {}), tiny_lcm, tiny_teacher, torch.device("cpu"))
    control, method = networks.learner, assemble_stage(networks)
    x, t = torch.randn(2, 4, 16, 16), torch.full((2,), 500.0, dtype=torch.float64)
    cond = {"ctx": torch.randn(2, 24, 32), "edge": torch.rand(2, 3, 32, 32), "s": torch.full((2,), 999.0)}
    for layer in method.players[1].module.control.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.2)  # a fresh one is silent
    torch.nn.init.normal_(method.players[1].module.control.controlnet_cond_embedding.conv_out.weight, std=0.2)
    with torch.no_grad():
        for role, hears in (("student", True), ("fake", True), ("teacher", False), ("kept", True)):
            net = method.cast[role]
            same = torch.equal(net.raw(x, t, cond), net.raw(x, t, {**cond, "edge": 1.0 - cond["edge"]}))
            assert same is not hears, role
    trains = {id(p) for p in method.players[0].weights}
    assert trains == {id(p) for p in control.parameters()}
    assert CONTROL in method.cast.rewards and [p.name for p in method.players] == ["student", "fake"]


def test_a_fresh_controlnet_has_the_encoder_and_changes_nothing(tiny_lcm, tiny_teacher):
    for bundle in (tiny_lcm, tiny_teacher):
        unet = load_denoiser(bundle)
        net = fresh_control(unet, bundle.spec.latent.factor)
        assert torch.equal(net.conv_in.weight, unet.conv_in.weight)
        out = net(torch.randn(1, 4, 16, 16), 5.0, torch.randn(1, 24, 32), torch.rand(1, 3, 32, 32), return_dict=False)
        assert all(not part.detach().any() for part in (*out[0], out[1])), bundle.name


@pytest.mark.parametrize("name", ["control-student", "jdm"])
def test_a_controlnet_is_trained_and_the_rest_stays(name, tiny_lcm, tiny_teacher, tmp_path):
    settings = {**FAST, "init": str(tiny_lcm.root), "lr": 0.5} | ({"every": 1} if name == "jdm" else {})
    made = distill(name, tiny_teacher, tmp_path / name, settings, device="cpu")
    assert made.spec.grids == tiny_lcm.spec.grids and load_bundle(made.root).has("controlnet")
    was, now = load_denoiser(tiny_lcm).state_dict(), load_denoiser(made).state_dict()
    assert all(torch.equal(was[key], now[key]) for key in was)
    old, new = tiny_lcm.load("controlnet").state_dict(), made.load("controlnet").state_dict()
    assert any((new[key] - old[key]).abs().max() > 1e-3 for key in old)
    assert all(bool(torch.isfinite(value).all()) for value in new.values())


@pytest.mark.parametrize("name", ["control-student", "jdm", "finetune-student"])
def test_each_trains_and_samples_on_the_plane(name, start):
    trained = run_recipe(on_plane(name, TINY), plane(), start, TINY.budget)
    cond, uncond = conditions(torch.arange(CLASSES))
    for steps in (1, 2, 4):
        points = sample_points(trained, cond, uncond, steps, seed=0)
        assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())
    assert (trained.net.control is not None) == (name != "finetune-student")


def test_the_planes_control_is_the_first_coordinate_in_noise():
    data = plane()
    points = data.even(2000, torch.Generator().manual_seed(0)).float()
    control = seen(points, 1)
    assert float((control - points[:, :1]).std()) == pytest.approx(NOISE, rel=0.05)
    likely = Likelihood()(points, {CONTROL: control})
    assert float(likely.mean()) == pytest.approx(-0.5, abs=0.05)
    cond, _ = conditions(torch.arange(CLASSES))
    assert torch.equal(asked(data, cond, 4)[CONTROL], asked(data, cond, 4)[CONTROL])
    assert set(asked(data, cond, 4)) == {"label", CONTROL}


def test_the_bench_asks_for_real_edges_and_makes_a_table(tiny_lcm, monkeypatch):
    wanted = asked_of(tiny_lcm, 2, 0)
    assert wanted.edges.shape == (2, 3, 64, 64) and set(wanted.edges.unique().tolist()) == {0.0, 1.0}
    assert wanted.real.shape == (2, 4, 64), "of each caption, real scenes are the unit of diversity"
    row = measure("carried", tiny_lcm, tiny_lcm.load("controlnet"), 1, wanted)
    again = measure("none", tiny_lcm, None, 1, wanted)
    assert 0.0 <= row.precision <= 1.0 and row.compliance >= 0.0 and 0.0 < row.diversity != again.diversity
    assert table([vars(row), vars(again)]).count("\n") == 3
    assert f"{row.diversity:.3f}" in table([vars(row)]) and "diversity" in table([])


def test_the_bench_gives_every_way_the_same_steps_of_its_controlnet(tiny_lcm, tiny_teacher, tmp_path, capsys):
    changes = {name: value for name, value in FAST.items() if name != "steps"} | {"init": str(tiny_lcm.root)}
    starts = {way: recipe_of(way, changes, 3).stages[-1] for way in ("control-student", "jdm", "jdm-fresh")}
    assert [stage.steps // stage.player_settings["student"].every for stage in starts.values()] == [3, 3, 3]
    assert [stage.start for stage in starts.values()] == ["init", "init", "fresh"]
    found = bench(tiny_lcm, tiny_teacher, tmp_path, ("none", "jdm-fresh"), changes, 2, (1,), 1)
    log = (tmp_path / "jdm-fresh.run" / "jdm" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["player"] for line in log].count("student") == 1
    assert [row["trained"] for row in found["rows"]] == [0, 1] and found["training_s"]["jdm-fresh"] > 0.0
    with pytest.raises(SystemExit, match="2"):
        bench_command(["--out", str(tmp_path / "out"), "--set", "steps=3"])
    assert "use --train-steps" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_a_remedy(tiny_teacher, tmp_path):
    with pytest.raises(RecipeError, match=r"name it with --set init=DIR"):
        distill("jdm", tiny_teacher, tmp_path / "out", FAST)
    for name in ("jdm", "control-student"):
        with pytest.raises(RecipeError, match=f"{name}: start is 'noise'; set it to carried or fresh"):
            configure(RECIPES[name], {"start": "noise"})
    for settings in ({"follow": -1.0}, {"every": 0}):
        with pytest.raises(RecipeError, match="follow to 0 or more"):
            configure(RECIPES["jdm"], settings)


def test_a_fresh_start_is_silent_and_a_carried_one_is_the_students(tiny_lcm, tiny_teacher):
    for start in ("fresh", "carried"):
        recipe = configure(RECIPES["jdm"], {"start": start})
        learner = control_networks(recipe, tiny_lcm, tiny_teacher, torch.device("cpu")).learner
        silent = not any(layer.weight.detach().any() for layer in learner.controlnet_down_blocks)
        assert silent == (start == "fresh")
        if not silent:
            own = tiny_lcm.load("controlnet").state_dict()
            assert all(torch.equal(value, own[key]) for key, value in learner.state_dict().items())


@pytest.fixture
def pictures(drawn, tmp_path):
    """A folder of one picture."""
    from PIL import Image

    pixels = ((drawn[0][0].permute(1, 2, 0) + 1.0) * 127.5).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "one.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "one.png", "text": "b"}) + "\n")
    return tmp_path


def dry_run(capsys, name, student, teacher, *settings):
    told = [part for setting in (f"init={student.root}", *settings) for part in ("--set", setting)]
    assert command([name, "--teacher", str(teacher.root), *told, "--dry-run"]) == 0
    return json.loads(capsys.readouterr().out)["estimate"]


@pytest.mark.parametrize("name", ["control-student", "jdm"])
def test_a_dry_run_estimates_the_controlnets_run(name, tiny_lcm, tiny_teacher, pictures, capsys):
    weights = sum(w.numel() for w in tiny_lcm.load("controlnet").parameters())
    found = dry_run(capsys, name, tiny_lcm, tiny_teacher, "batch=2")
    student = found["players"]["student"]
    assert student["parameters"] == student["trained"] == weights and found["stage_steps"] == {name: 2000}
    assert found["teacher_parameters"] == sum(w.numel() for w in load_denoiser(tiny_teacher).parameters())
    assert ("fake" in found["players"]) == (name == "jdm")
    assert 0 < found["step_bytes"] < dry_run(capsys, name, tiny_lcm, tiny_teacher, "batch=8")["step_bytes"]
    own = dry_run(capsys, name, tiny_lcm, tiny_teacher, "batch=2", f"data={pictures}")
    assert own["players"] == found["players"], "a user's pictures change nothing but what reads them"
    assert own["bytes"] - own["step_bytes"] > found["bytes"] - found["step_bytes"], "the text and the edges' decoder"


def test_a_dry_run_refuses_what_the_run_would(tiny_lcm, tiny_teacher, capsys):
    with pytest.raises(RecipeError, match=r"name it with --set init=DIR"):
        command(["jdm", "--teacher", str(tiny_teacher.root), "--dry-run"])
    with pytest.raises(RecipeError, match="picture_every is 7"):
        dry_run(capsys, "jdm", tiny_lcm, tiny_teacher, "picture_every=7")
    with pytest.raises(
        RecipeError, match=r"reward is 'objects', which reads prompts.* take one .*: colourful, typical"
    ):
        dry_run(capsys, "jdm", tiny_lcm, tiny_teacher, "reward=objects", "reward_scale=1")


@pytest.mark.parametrize("beside", [{}, {"reward_proxy_lr": 1e-3}], ids=["reward", "proxy"])
def test_a_reward_of_pictures_is_taken_beside_the_control(beside, tiny_lcm, tiny_teacher, tmp_path):
    asked = {**FAST, "init": str(tiny_lcm.root), "every": 1, "reward": "typical", "reward_scale": 1.0, **beside}
    made = distill("jdm", tiny_teacher, tmp_path / "pleased", asked, device="cpu")
    rows = [json.loads(row) for row in (tmp_path / "pleased.run" / "jdm" / "metrics.jsonl").read_text().splitlines()]
    students = [row for row in rows if row["player"] == "student"]
    assert len(students) == 2 and {row["player"] for row in rows} >= ({"proxy"} if beside else {"student"})
    term = "proxy" if beside else "reward"
    assert all(any(term in name for name in row) for row in students), students
    assert all(bool(torch.isfinite(value).all()) for value in made.load("controlnet").state_dict().values())
