"""Progressive distillation: the halving target, its inverse, and which times a round practises."""

import pytest
import torch

from fewstep.models.analytic import exact, mixture
from fewstep.models.denoiser import Denoiser
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.trainers.objectives.progressive import halving_target
from fewstep.trainers.parts.objective import Turn
from fewstep.trainers.parts.times import HalvingPairs, clean
from fewstep.trainers.parts.transitions import ddim_chain

PATHS = [(VP(), "v"), (EDM(), "x0"), (RectifiedFlow(), "flow"), (TrigFlow(), "trig")]
DATA = mixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), torch.tensor([0.3, 0.5]), torch.tensor([1.0, 2.0]))
COND = {"ctx": torch.zeros(6, 1)}


@pytest.mark.parametrize(("path", "prediction"), PATHS)
def test_one_step_to_the_target_is_two_steps_of_the_teacher(path, prediction):
    teacher = exact(DATA, path, prediction)
    x = torch.randn(6, 2, dtype=torch.float64) * float(path.sigma(path.start))
    t, mid, s = HalvingPairs(4).draw(path, 6, Turn.of(0, 0, 1, "student"))
    target = halving_target(teacher, x, t, mid, s, COND)
    perfect = Denoiser(lambda x, t, cond: target, path, "x0")
    assert torch.allclose(perfect.jump(x, t, s, COND), ddim_chain(teacher, x, (t, mid, s), COND), atol=1e-9)


def test_kept_rows_aim_at_the_teachers_own_step():
    path, teacher = VP(), exact(DATA, VP(), "v")
    x = torch.randn(6, 2, dtype=torch.float64)
    t = torch.tensor([999.0, 749.0, 249.0, 999.0, 749.0, 249.0], dtype=torch.float64)
    s = torch.tensor([499.0, 499.0, clean(path)] * 2, dtype=torch.float64)
    mid = torch.cat([torch.tensor([749.0], dtype=torch.float64), s[1:3], s[3:]])
    target = halving_target(teacher, x, t, mid, s, COND)
    own = teacher.x0(x, t, COND)
    assert torch.isfinite(target).all()
    assert torch.allclose(target[1:], own[1:], atol=1e-9) and not torch.allclose(target[0], own[0], atol=1e-3)


def test_rows_of_a_round():
    rows, weights = HalvingPairs(2, keep=(4,), keep_share=0.25).table(VP())
    end = float("-inf")
    assert rows.tolist() == [[499.0, 249.0, end], [999.0, 749.0, 499.0], [249.0, end, end], [749.0, 499.0, 499.0]]
    assert weights.tolist() == [0.375, 0.375, 0.125, 0.125]


def test_coarser_rounds_claim_their_times_first():
    rows, _ = HalvingPairs(1, keep=(4, 2)).table(RectifiedFlow())
    assert rows.tolist() == [[1.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.25, 0.0, 0.0], [0.75, 0.5, 0.5]]


def test_draws_follow_their_probabilities():
    t, _, _ = HalvingPairs(1, keep=(2,), keep_share=0.2).draw(VP(), 4000, Turn.of(0, 3, 1, "student"))
    assert float((t == 999).double().mean()) == pytest.approx(0.8, abs=0.03)
    assert set(t.tolist()) == {999.0, 499.0}
