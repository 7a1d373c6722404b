"""Tangents, continuous-time, flow-map and rectified-flow recipes: settings, refusals, and a short run of each."""

import pytest
import torch

from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.trainers.bench.recipes import Setup, on_plane
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.parts.tangent import FLOW, Difference, Jvp, tangent_of
from fewstep.trainers.parts.u_shape import flow_time_to_path
from fewstep.trainers.plane.plane import CLASSES, conditions, plane
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.recipes.continuous import CONTINUOUS
from fewstep.trainers.recipes.flow import FLOWS, boot, instaflow

TINY = Setup(budget=PlaneBudget(steps=4, start_steps=4, batch=16, pairs=32), points=8)


@pytest.mark.parametrize("name", [*CONTINUOUS, *FLOWS])
def test_each_trains_and_samples_on_the_plane(name, start):
    trained = run_recipe(on_plane(name, TINY), plane(), start, TINY.budget)
    cond, uncond = conditions(torch.arange(CLASSES))
    for steps in trained.spec.grids:
        points = sample_points(trained, cond, uncond, steps, seed=0)
        assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())
    changed = [
        not torch.equal(w, start.state_dict()[k])
        for k, w in trained.net.state_dict().items()
        if k in start.state_dict()
    ]
    assert any(changed)


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_network_without_forward_derivative_is_refused_with_a_remedy():
    x, t = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(RecipeError, match="set difference above 0"):
        Jvp()(lambda x, t: _Opaque.apply(x), x, t, x, t)
    found = Difference(0.01)(lambda x, t: _Opaque.apply(x), x, t, x, t)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_a_failure_of_the_network_itself_is_not_renamed():
    with pytest.raises(RuntimeError, match="must match"):
        Jvp()(lambda x, t: x + torch.ones(5), torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), torch.ones(2))


def test_an_exact_tangent_has_all_its_digits_under_autocast():
    """Autocast used to cast a convolution's weight and not the input that carries a derivative, which then failed."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 3, 3, padding=1)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2, dtype=torch.float64)
    along = torch.randn_like(x), torch.ones_like(t)
    exact = Jvp()(lambda x, t: net(x), x, t, *along)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Jvp()(lambda x, t: net(x), x, t, *along), exact)


def test_difference_zero_is_exact():
    assert tangent_of(0.0) == Jvp() and tangent_of(0.02) == Difference(0.02)


@pytest.mark.parametrize("path", [VP(), RectifiedFlow(), TrigFlow(), EDM()], ids=lambda path: path.kind)
def test_flow_times_go_to_every_path_and_back(path):
    tau = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(FLOW.time(path, flow_time_to_path(path, tau)), tau, rtol=1e-9, atol=1e-9)
    ends = flow_time_to_path(path, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert abs(float(ends[0]) - path.end) < 1e-6 and float(ends[1]) == path.start


@pytest.mark.parametrize("gap", [0.0, -0.1, 0.6])
def test_boot_refuses_a_gap_that_is_no_step(gap):
    with pytest.raises(RecipeError, match="gap is"):
        boot(gap=gap)


def test_instaflow_shares_its_steps():
    recipe = instaflow(steps=100, share=0.25)
    assert [stage.steps for stage in recipe.stages] == [25, 75]
    assert (recipe.stages[1].teacher, recipe.stages[1].start) == ("previous", "previous")
    with pytest.raises(RecipeError, match="each of its two stages"):
        instaflow(steps=100, share=1.0)
