"""The oracle suite passes on every registered recipe and sampler, and its evidence is read only while it is true."""

import inspect
import json
from itertools import pairwise

import pytest
import torch

from fewstep.models import analytic
from fewstep.models.denoiser import Denoiser
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.models.spec import SAMPLERS
from fewstep.trainers import evidence
from fewstep.trainers.objectives.consistency import consistency_residual
from fewstep.trainers.oracle import suite as oracle
from fewstep.trainers.oracle.samplers import sampler_checks
from fewstep.trainers.oracle.world import Check, between, rms, world
from fewstep.trainers.parts.jumps import DdimJump, ToClean
from fewstep.trainers.parts.times import clean, grid
from fewstep.trainers.parts.transitions import ddim_chain, guided, inverse_ddim
from fewstep.trainers.pictures import plot
from fewstep.trainers.recipes.registry import RECIPES


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(plot, "plot_losses", lambda log, picture: None)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_passes(name, no_plots):
    checks = oracle.check_recipe(RECIPES[name]())
    assert [(c.name, c.value, c.low, c.high) for c in checks if not c.passed] == []
    assert len(checks) > 30


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_passes(name):
    checks = list(sampler_checks(name))
    assert [(c.name, c.value, c.low, c.high) for c in checks if not c.passed] == []


def test_an_unknown_objective_fails():
    class Stranger:
        objective = object()

    assert not oracle.passed(oracle.check_recipe(Stranger()))
    assert not oracle.passed([])


def test_checks_that_break_are_failures(no_plots, monkeypatch):
    def broken(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(Denoiser, "jump", broken)
    checks = oracle.check_recipe(RECIPES["lcm"]())
    assert {c.name for c in checks if not c.passed} == {"runs: RuntimeError: no"}


def test_nan_never_passes():
    assert not Check("x", float("nan"), 0.0, 1.0).passed
    assert not between("x", float("nan"), float("-inf"), float("inf")).passed
    assert json.loads(json.dumps(Check("x", float("nan"), 0.0, 1.0).to_json()))["value"] is None


FLOWS = [(VP(), "v"), (VP(), "x0"), (EDM(sigma_max=5.0), "x0"), (RectifiedFlow(), "flow"), (TrigFlow(), "trig")]


@pytest.mark.parametrize(("path", "prediction"), FLOWS, ids=lambda v: getattr(v, "kind", v))
@pytest.mark.parametrize("jump", [ToClean(), DdimJump()], ids=["to clean", "ddim"])
@pytest.mark.parametrize("w", [None, 1.0, 3.5])
def test_consistency_residual_is_second_order_on_every_path(path, prediction, jump, w):
    stage = world(path, prediction)
    count = 64
    t = path.end + (path.start - path.end) * torch.linspace(0.3, 0.9, count, dtype=torch.float64)
    x = stage.marginal(t)
    batch = stage.batch(count)
    scale = torch.full((count,), w or 1.0, dtype=torch.float64)
    teacher = stage.teacher() if w is None else guided(stage.teacher(), batch.uncond, scale)
    student = stage.jumper(None, takes_w=w is not None)
    residuals = []
    for share in (0.02, 0.01, 0.005):
        s = t - share * (path.start - path.end)
        cond = {**batch.cond, "w": scale}
        end = torch.full_like(t, clean(path))
        x_s = ddim_chain(teacher, x, (t, s), cond)
        guess, aim = consistency_residual(student, student, jump, x, t, x_s, s, end, cond)
        residuals.append(rms(guess - aim))
    assert residuals[-1] < 2e-3
    for coarse, finer in pairwise(residuals):
        assert 3.5 < coarse / finer < 4.5


@pytest.mark.parametrize(("path", "prediction"), FLOWS, ids=lambda v: getattr(v, "kind", v))
def test_inverse_of_two_steps_on_every_path(path, prediction):
    stage = world(path, prediction)
    t = path.end + (path.start - path.end) * torch.linspace(0.3, 0.9, 16, dtype=torch.float64)
    x, teacher = stage.marginal(t), stage.teacher()
    mid, s = 0.8 * t, 0.6 * t
    landed = ddim_chain(teacher, x, (t, mid, s), {})
    x0 = inverse_ddim(path, landed, x, t, s)
    eps = (x - analytic._row(path.alpha(t), x) * x0) / analytic._row(path.sigma(t), x)
    torch.testing.assert_close(teacher.mix(x0, eps, s), landed)


def test_clean_is_the_end_of_every_path():
    for path in (VP(), EDM(), RectifiedFlow(), TrigFlow()):
        end = torch.tensor([clean(path)], dtype=torch.float64)
        assert path.alpha(end).item() == 1.0 and path.sigma(end).item() == 0.0
        assert grid(path, 4)[-1].item() == path.start


def test_evidence_is_current_and_green():
    """The committed evidence belongs to these sources; if not, make it anew and commit it."""
    found = evidence.read_evidence("oracle")
    assert found is not None, "stale: run `python -m fewstep.trainers.oracle`"
    assert {name: row["status"] for name, row in found["recipes"].items()} == dict.fromkeys(RECIPES, "passed")
    assert {row["status"] for row in found["samplers"].values()} == {"passed"}
    assert all(evidence.oracle_status(name) == "passed" for name in RECIPES)


def test_stale_evidence_counts_as_none(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "kept")
    assert evidence.read_evidence("oracle") is None
    assert evidence.oracle_status("lcm") == "none"
    evidence.write_evidence("oracle", {"recipes": {"lcm": {"status": "passed"}}})
    assert evidence.oracle_status("lcm") == "passed"
    assert evidence.oracle_status("unheard-of") == "none"
    monkeypatch.setattr(evidence, "source_digest", lambda: "another")
    assert evidence.read_evidence("oracle") is None
    assert evidence.oracle_status("lcm") == "none"
    (tmp_path / "kept" / "oracle.json").write_text("{")
    assert evidence.read_evidence("oracle") is None


def test_the_digest_covers_files_that_exist_and_all_of_the_suite():
    listed = {f"{room}/{name}.py" for room, name in evidence.sources()}
    assert all((evidence.ROOMS / name).is_file() for name in listed)
    suite = {f"trainers/oracle/{path.name}" for path in (evidence.ROOMS / "trainers" / "oracle").glob("*.py")}
    assert suite and suite <= listed
    from fewstep.trainers.recipes.registry import RECIPES

    parts = {inspect.getmodule(type(stage.objective)) for recipe in RECIPES.values() for stage in recipe().stages}
    made = {f"{module.__name__.removeprefix('fewstep.').replace('.', '/')}.py" for module in parts}
    assert made <= listed and not {"trainers/pictures/plot.py", "trainers/bench/scenes.py"} & listed


def test_the_digest_follows_the_sources(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(name)
    monkeypatch.setattr(evidence, "ROOMS", tmp_path)
    monkeypatch.setattr(evidence, "sources", lambda: [(".", "a"), (".", "b")])
    first = evidence.source_digest.__wrapped__()
    (tmp_path / "a.py").write_bytes(b"a\r\n")
    second = evidence.source_digest.__wrapped__()
    (tmp_path / "a.py").write_bytes(b"a\n")
    assert first != second == evidence.source_digest.__wrapped__()


def test_command_writes_evidence(tmp_path, monkeypatch, capsys, no_plots):
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    monkeypatch.setattr(oracle, "run_oracle", lambda: {"lcm": [Check("a", 0.5, 0.0, 1.0)]})
    monkeypatch.setattr(oracle, "all_sampler_checks", lambda: {"lcm": [Check("b", 2.0, 0.0, 1.0)]})
    assert oracle.main(["--dry-run"]) == 1
    assert not list(tmp_path.iterdir())
    assert oracle.main([]) == 1
    out = capsys.readouterr().out
    assert "sampler lcm: b: 2 is not in [0, 1]" in out
    kept = json.loads((tmp_path / "oracle.json").read_text())
    assert (kept["recipes"]["lcm"]["status"], kept["samplers"]["lcm"]["status"]) == ("passed", "failed")
