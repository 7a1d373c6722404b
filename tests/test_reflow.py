"""Annealing reflow: its schedule, pairs drawn once and kept, and batches of them."""

import math
from itertools import pairwise

import pytest
import torch

from fewstep.models.analytic import exact, gaussian
from fewstep.models.paths import RectifiedFlow
from fewstep.trainers.errors import DataError, RecipeError
from fewstep.trainers.objectives.reflow import KINDS, Annealing
from fewstep.trainers.parts.objective import Batch, Cast, Turn
from fewstep.trainers.parts.pairs import Pairs, PairSource, draw_pairs, load_pairs, save_pairs
from fewstep.trainers.parts.times import UniformScale
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES


def at(step, total=100):
    return Turn.of(0, step, total, "student")


@pytest.mark.parametrize("kind", KINDS)
def test_beta_falls_from_one_over_its_share(kind):
    betas = [Annealing(0.5, kind).beta(at(step)) for step in range(101)]
    assert betas[0] == 1.0 and all(a >= b for a, b in pairwise(betas))
    middle = {"linear": 0.5, "cosine": 0.5, "exponential": math.exp(-0.5)}[kind]
    end = {"exponential": math.exp(-1.0)}.get(kind, 0.0)
    assert betas[25] == pytest.approx(middle) and betas[50] == pytest.approx(end)
    fifth = {"linear": 0.8, "cosine": 0.5 + 0.5 * math.cos(math.pi / 5), "exponential": math.exp(-0.2)}[kind]
    assert betas[10] == pytest.approx(fifth)


def test_no_share_is_reflow_from_the_start():
    z = torch.randn(5, 3)
    assert torch.equal(Annealing(0.0).noise(z, at(0)), z)


class Entries:
    """Three samples, each with a prompt of its own number."""

    def choose(self, step):
        return torch.tensor([[0, 0], [1, 0], [2, 1]])

    def gather(self, chosen):
        ctx = chosen[:, :1, None].double()
        return Batch(torch.zeros(len(chosen), 2, dtype=torch.float64), {"ctx": ctx}, {"ctx": torch.zeros_like(ctx)})


@pytest.fixture
def drawn():
    teacher = exact(gaussian(torch.zeros(2, dtype=torch.float64), 1.0), RectifiedFlow(), "flow")
    return draw_pairs(teacher, True, Pairs(count=4, steps=200, guidance=UniformScale(2.0, 4.0)), Entries(), seed=3)


def test_pairs_follow_the_guided_ode(drawn):
    """Of N(0, 1) with prompt c the data is N(c, 1), so that guidance w moves noise z to z + w c."""
    assert drawn.chosen.tolist() == [[0, 0], [1, 0], [2, 1], [0, 0]], "the last batch is cut"
    assert ((drawn.w >= 2.0) & (drawn.w <= 4.0)).all() and len(drawn.w.unique()) == 4
    wanted = drawn.noise + (drawn.w * drawn.chosen[:, 0])[:, None]
    torch.testing.assert_close(drawn.made, wanted, atol=0.05, rtol=0.0)


def test_batches_keep_what_belongs_together(drawn):
    source = PairSource(drawn, Entries(), 16, seed=1)
    batch = source.batch(5)
    assert torch.equal(batch.x0, source.batch(5).x0) and not torch.equal(batch.x0, source.batch(6).x0)
    prompt, w = batch.cond["ctx"][:, 0, 0], batch.cond["w"]
    torch.testing.assert_close(batch.x0 - batch.noise, (w * prompt)[:, None].expand(-1, 2), atol=0.05, rtol=0.0)
    assert len(batch.x0.unique(dim=0)) == 4 and not batch.uncond["ctx"].any()


def test_pairs_are_kept_in_a_file(drawn, tmp_path):
    save_pairs(tmp_path / "x" / "pairs.safetensors", drawn)
    found = load_pairs(tmp_path / "x" / "pairs.safetensors")
    assert all(torch.equal(getattr(found, name), getattr(drawn, name)) for name in ("noise", "made", "w", "chosen"))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"bad\.safetensors is not a file of pairs"):
        load_pairs(tmp_path / "bad.safetensors")


def test_settings_reach_the_schedule_and_the_pairs():
    stage = configure(RECIPES["slim"], {"anneal": 0.25, "schedule": "cosine", "pairs": 9, "pair_steps": 3}).stages[0]
    assert stage.objective.anneal == Annealing(0.25, "cosine") and (stage.pairs.count, stage.pairs.steps) == (9, 3)
    with pytest.raises(RecipeError, match="schedule is 'sine'"):
        configure(RECIPES["slim"], {"schedule": "sine"})
    with pytest.raises(RecipeError, match="anneal 0"):
        configure(RECIPES["slim"], {"anneal": 0})


def test_a_batch_without_noise_is_refused():
    objective = RECIPES["slim"]().stages[0].objective
    with pytest.raises(DataError, match="give its stage pairs"):
        objective.loss("student", Cast({}), Batch(torch.zeros(2, 3), {}, {}), at(0))
