"""Closed forms against independent arithmetic: sampling, numerical derivatives, quadrature, and the ODE itself."""

import math

import pytest
import torch

from fewstep.models import analytic
from fewstep.models.analytic import gaussian, mixture
from fewstep.models.denoiser import expand, guide
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.models.spec import Boundary

PATHS = [(VP(), "v"), (VP(), "eps"), (EDM(), "x0"), (RectifiedFlow(), "flow"), (TrigFlow(sigma_data=0.5), "trig")]
IDS = [f"{path.kind}-{kind}" for path, kind in PATHS]
ONE = gaussian(torch.tensor([[0.3, -0.5], [1.2, 0.0]]), torch.tensor([[0.6, 0.2], [1.1, 0.4]]))
TWO = mixture(torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), torch.tensor([0.3, 0.5]), torch.tensor([1.0, 3.0]))


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch):
    """Fourth order: 100 steps are good to 1e-7 here, and ten times faster than the reference's 1000."""
    monkeypatch.setattr(analytic, "RK4_STEPS", 100)


def spread(path, count, low=0.15, high=0.85):
    return path.end + (path.start - path.end) * torch.linspace(low, high, count, dtype=torch.float64)


def state(data, path, count=7, seed=0):
    """Times, and samples noised to them."""
    rng = torch.Generator().manual_seed(seed)
    t = spread(path, count)
    x0 = data.draw(count, rng)
    noise = torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    return t, expand(path.alpha(t), x0) * x0 + expand(path.sigma(t), x0) * noise


@pytest.mark.parametrize("data", [ONE, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("path", "prediction"), PATHS, ids=IDS)
def test_score_is_the_gradient_of_the_log_density(data, path, prediction):
    t, x = state(data, path)
    x.requires_grad_()
    analytic.log_density(data, x, path.alpha(t), path.sigma(t)).sum().backward()
    torch.testing.assert_close(analytic.score(data, path, x.detach(), t), x.grad, rtol=1e-8, atol=1e-8)


def test_density_integrates_to_one():
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    data = mixture(torch.tensor([[-1.0], [2.0]]), torch.tensor([0.3, 0.5]), torch.tensor([0.2, 0.8]))
    one = torch.ones(len(x), dtype=torch.float64)
    density = analytic.log_density(data, x, 0.7 * one, 0.4 * one).exp()
    assert float(density.sum() * 16 / 4000) == pytest.approx(1.0, abs=1e-9)
    assert float((density * x[:, 0]).sum() * 16 / 4000) == pytest.approx(0.7 * (0.8 * 2.0 - 0.2), abs=1e-9)


def test_posterior_by_quadrature():
    """E[x0 | x] and E[eps | x] of a mixture, integrated over x0."""
    data = mixture(torch.tensor([[-1.0], [2.0]]), torch.tensor([0.3, 0.5]), torch.tensor([0.2, 0.8]))
    alpha, sigma, x = 0.6, 0.8, 0.35
    x0 = torch.linspace(-6, 8, 20001, dtype=torch.float64)
    prior = 0.2 / 0.3 * (-0.5 * ((x0 + 1) / 0.3) ** 2).exp() + 0.8 / 0.5 * (-0.5 * ((x0 - 2) / 0.5) ** 2).exp()
    weight = prior * (-0.5 * ((x - alpha * x0) / sigma) ** 2).exp()
    mean = float((weight * x0).sum() / weight.sum())
    one = torch.ones(1, dtype=torch.float64)
    found = analytic.posterior(data, torch.tensor([[x]], dtype=torch.float64), alpha * one, sigma * one)
    assert float(found[0]) == pytest.approx(mean, abs=1e-9)
    assert float(found[1]) == pytest.approx((x - alpha * mean) / sigma, abs=1e-9)


@pytest.mark.parametrize("data", [ONE, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("path", "prediction"), PATHS, ids=IDS)
def test_exact_denoiser_through_every_prediction(data, path, prediction):
    t, x = state(data, path)
    net = analytic.exact(data, path, prediction)
    x0, eps = analytic.posterior(data, x, path.alpha(t), path.sigma(t))
    torch.testing.assert_close(net.x0(x, t, {}), x0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(net.eps(x, t, {}), eps, rtol=1e-7, atol=1e-7)


def test_exact_denoiser_beats_any_bent_one():
    """The exact denoiser minimises the denoising error, by 40,000 samples of a mixture."""
    path, rng = VP(), torch.Generator().manual_seed(0)
    x0 = TWO.draw(40_000, rng)
    t = torch.full((len(x0),), 600.0, dtype=torch.float64)
    x = path.alpha(600.0) * x0 + path.sigma(600.0) * torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    guess = analytic.exact(TWO, path, "v").x0(x, t, {})
    least = (guess - x0).square().mean()
    assert all((guess + bend - x0).square().mean() > least for bend in (0.05, -0.05, 0.05 * x, -0.05 * x))


def test_draws_have_the_moments_of_the_mixture():
    drawn = TWO.draw(200_000, torch.Generator().manual_seed(0))
    mean = 0.25 * TWO.means[0] + 0.75 * TWO.means[1]
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=6e-3)
    square = 0.25 * (TWO.means[0] ** 2 + 0.09) + 0.75 * (TWO.means[1] ** 2 + 0.25)
    torch.testing.assert_close(drawn.square().mean(0), square, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("path", "prediction"), PATHS, ids=IDS)
def test_flow_map_solves_the_ode(path, prediction):
    """d/ds of the flow map is the velocity of the exact denoiser there; and going back returns."""
    t, x = state(ONE, path)
    s = path.end + 0.5123 * (t - path.end)
    h = 1e-5 * (path.start - path.end)
    there = analytic.flow_map(ONE, path, x, t, s)
    slope = (analytic.flow_map(ONE, path, x, t, s + h) - analytic.flow_map(ONE, path, x, t, s - h)) / (2 * h)
    velocity = analytic.exact(ONE, path, prediction).velocity(there, s, {})
    torch.testing.assert_close(slope, velocity, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(analytic.flow_map(ONE, path, there, s, t), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("path", "prediction"), PATHS[::2], ids=IDS[::2])
def test_runge_kutta_agrees_with_the_closed_form(path, prediction):
    """A mixture of two equal components is one Gaussian, but is integrated."""
    twin = mixture(torch.stack([ONE.means[0]] * 2), torch.stack([ONE.stds[0]] * 2), torch.tensor([0.3, 0.7]))
    t, x = state(ONE, path, count=3)
    for to in (None, path.end + 0.4 * (t - path.end)):
        integrated = analytic.flow_map(twin, path, x, t, to)
        torch.testing.assert_close(integrated, analytic.flow_map(ONE, path, x, t, to), rtol=1e-8, atol=1e-8)


def test_mixture_flow_keeps_quantiles():
    """In one dimension the flow map keeps the order of samples: the p-quantile of p_t goes to the p-quantile of p_0."""
    data = mixture(torch.tensor([[-1.0], [1.5]]), torch.tensor([0.3, 0.5]), torch.tensor([0.3, 0.7]))
    path = RectifiedFlow()
    normal = torch.distributions.Normal(0.0, 1.0)
    x = torch.tensor([[-1.5], [-0.3], [0.4], [1.8]], dtype=torch.float64)
    end = analytic.flow_map(data, path, x, torch.ones(4, dtype=torch.float64), None)  # at t = 1 there is only noise
    share = 0.3 * normal.cdf((end + 1.0) / 0.3) + 0.7 * normal.cdf((end - 1.5) / 0.5)
    torch.testing.assert_close(share, normal.cdf(x), rtol=0, atol=1e-7)


def test_mean_velocity():
    path = RectifiedFlow()
    t, x = state(ONE, path)
    s = 0.3 * t
    u = analytic.mean_velocity(ONE, path, x, t, s)
    torch.testing.assert_close(x - expand(t - s, x) * u, analytic.flow_map(ONE, path, x, t, s))
    near = analytic.mean_velocity(ONE, path, x, t, t - 1e-7)
    torch.testing.assert_close(near, analytic.exact(ONE, path, "flow").velocity(x, t, {}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data", [ONE, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("path", "prediction"), PATHS, ids=IDS)
def test_jumper_lands_on_the_flow_map(data, path, prediction):
    t, x = state(data, path, count=3)
    clean = analytic.jumper(data, path, prediction).x0(x, t, {})
    torch.testing.assert_close(clean, analytic.flow_map(data, path, x, t, None), rtol=1e-6, atol=1e-6)
    net = analytic.jumper(data, path, prediction, lambda t, cond: cond["s"])
    s = path.end + 0.4 * (t - path.end)
    landed = net.jump(x, t, s, {"s": s})
    torch.testing.assert_close(landed, analytic.flow_map(data, path, x, t, s), rtol=1e-6, atol=1e-6)
    still = net.x0(x, t, {"s": t})
    torch.testing.assert_close(still, analytic.exact(data, path, prediction).x0(x, t, {}), rtol=1e-6, atol=1e-6)


def test_consistency_behind_lcm_scalings():
    path, boundary = VP(), Boundary()
    net = analytic.consistency(ONE, path, "v", boundary)
    t, x = state(ONE, path)
    end = torch.zeros_like(t)
    skip = 0.25 / ((10 * t) ** 2 + 0.25)
    out = 10 * t / ((10 * t) ** 2 + 0.25).sqrt()
    value = expand(skip, x) * x + expand(out, x) * net.x0(x, t, {})
    torch.testing.assert_close(value, analytic.flow_map(ONE, path, x, t, end))
    assert bool(net.x0(x, end, {}).isfinite().all())
    plain = analytic.consistency(ONE, EDM(), "x0")
    t, x = state(ONE, EDM())
    floor = torch.full_like(t, EDM().sigma_min)
    torch.testing.assert_close(plain.x0(x, t, {}), analytic.flow_map(ONE, EDM(), x, t, floor))
    torch.testing.assert_close(plain.x0(x, floor, {}), x)


@pytest.mark.parametrize(("path", "prediction"), PATHS, ids=IDS)
def test_condition_and_guidance_are_shifts(path, prediction):
    t, x = state(ONE, path)
    shift, w = 0.7, 2.5
    ctx = torch.full((len(t), 2, 3), shift)
    uncond, cond = {"ctx": torch.zeros_like(ctx)}, {"ctx": ctx}
    net = analytic.exact(ONE, path, prediction)
    moved = analytic.exact(ONE.moved(torch.tensor(shift).double()), path, prediction)
    torch.testing.assert_close(net.x0(x, t, cond), moved.x0(x, t, {}), rtol=1e-5, atol=1e-5)
    guided = net.guided(uncond, w).x0(x, t, cond)
    torch.testing.assert_close(guided, guide(net.x0(x, t, uncond), net.x0(x, t, cond), w), rtol=1e-7, atol=1e-7)
    taught = analytic.exact(ONE, path, prediction, takes_w=True)
    scale = torch.full((len(t),), w)
    torch.testing.assert_close(taught.x0(x, t, {**cond, "w": scale}), guided, rtol=1e-5, atol=1e-5)
    assert not torch.equal(net.x0(x, t, {**cond, "w": scale}), guided), "a network without the input ignores w"
    student = analytic.jumper(ONE, path, prediction, takes_w=True).x0(x, t, {**cond, "w": scale})
    truth = analytic.flow_map(ONE.moved(w * torch.tensor(shift).double()), path, x, t, None)
    torch.testing.assert_close(student, truth, rtol=1e-5, atol=1e-5)


def test_any_shape_and_the_samples_dtype():
    for shape in ((1,), (2, 3), (2, 2, 4, 4), (1, 2, 2, 2, 2)):
        data = gaussian(torch.zeros(shape), 1.0)
        x, t = torch.randn(3, *shape), torch.tensor([100.0, 500.0, 900.0])
        for net in (analytic.exact(data, VP(), "v"), analytic.jumper(data, VP(), "v")):
            assert net.raw(x, t, {}).shape == x.shape
            assert net.raw(x, t, {}).dtype == torch.float32


def test_pushforward_of_an_affine_generator():
    data = analytic.pushforward(lambda z: -2.0 * z + torch.tensor([[1.0, 3.0]]), (1, 2))
    assert data.means.tolist() == [[[1.0, 3.0]]]
    assert data.stds.expand_as(data.means).tolist() == [[[2.0, 2.0]]]


@pytest.mark.parametrize(("stds", "weights"), [([0.0, 1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, -1.0])])
def test_impossible_mixtures_are_refused(stds, weights):
    with pytest.raises(ValueError, match="above 0"):
        mixture(torch.zeros(2, 3), torch.tensor(stds), torch.tensor(weights))


def test_golden_numbers_of_the_methods_notes():
    """DMD's gradient for two equal bumps and a student N(2.5, 1) at noise 1, by plain sums over a grid."""
    data = mixture(torch.tensor([[-3.0], [3.0]]), torch.tensor([0.5, 0.5]), torch.ones(2))
    y = torch.linspace(-12, 15, 20001, dtype=torch.float64)[:, None]
    one = torch.ones(len(y), dtype=torch.float64)
    real = analytic.posterior(data, y, one, one)[0]
    fake = analytic.posterior(gaussian(torch.tensor([2.5]), 1.0), y, one, one)[0]
    law = (-0.25 * (y - 2.5) ** 2).exp() / math.sqrt(4 * math.pi)
    assert float(((fake - real) * law).sum() * 27 / 20000) == pytest.approx(-0.18963, abs=5e-6)
    z = (y - 2.5) / 2  # E[z | y]
    assert float(((fake - real) * z * law).sum() * 27 / 20000) == pytest.approx(-0.00390, abs=5e-6)
