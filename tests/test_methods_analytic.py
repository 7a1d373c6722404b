"""Methods on data whose score is known: each does what its paper says that it does, in numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pointwise import CFG, PATH, Knows, apart, clean, draws, exact, latents, served, spec_of

from fewstep.models.predictions import estimates
from fewstep.models.spec import Guidance, Spacing
from fewstep.runtime.sampling.plan import Hooks, Row
from fewstep.runtime.sampling.request import Edit, GenerateRequest, Helper
from fewstep.runtime.sampling.rng import NoiseStream
from fewstep.runtime.sampling.step import History, RowState, advance

TEACHER = spec_of("ddim", grids={}, spacing=Spacing(kind="trailing", max_steps=50))
LCM = spec_of("lcm")
DDIM = spec_of("ddim")
SHAPE = (4, 8, 8)
TIMES = (999.0, 400.0, 250.0, 120.0)
N = 8


def ask(**settings):
    return GenerateRequest(**{"prompt": "a", "n": N, **settings})


# --- Distillation++


def test_the_teachers_pull_brings_a_biased_student_nearer_to_the_data():
    """A student of two steps whose first estimate leans to one mode; the teacher's, at the second time, does not."""
    teacher = served("base", TEACHER, Knows(TEACHER, exact()))
    student = Knows(LCM, lambda x, t, a, s: _off(x, a, s, 0.6 if t > 900 else 0.0))

    def run(weight):
        helper = None if weight is None else Helper(model="base", mode="pull", weight=weight)
        found, _ = latents(LCM, student, ask(times=(999.0, 300.0), helper=helper), {"base": teacher})
        return found

    distances = {weight: apart(run(weight), draws(N * 256)) for weight in (0.0, 0.1, 0.3, 1.0)}
    assert torch.equal(run(0.0), run(None)), "no pull is the plain path to the bit"
    assert distances[1.0] < distances[0.3] < distances[0.1] < distances[0.0], distances
    assert distances[1.0] < 0.8 * distances[0.0], distances


def _off(x, alpha, sigma, shift):
    """The exact clean estimate, shifted: x0 and eps no longer belong together as the data have them."""
    x0 = clean(x, alpha, sigma) + shift
    return x0, (x - alpha * x0) / sigma


def test_a_pull_of_one_is_the_teachers_estimate_with_the_students_direction():
    """By hand: x' = a' ((1 - lam) x0_s + lam x0_t(a_u x0_s + s_u n)) + s' z."""
    teacher = served("base", TEACHER, Knows(TEACHER, exact()))
    request = ask(n=1, seed=3, helper=Helper(model="base", mode="pull", weight=0.7))
    _, seen = latents(LCM, Knows(LCM, exact()), request, {"base": teacher})
    noise = NoiseStream(3)
    x, n = noise.draw(SHAPE).double(), noise.draw(SHAPE, aside=True).double()
    x0 = clean(x, PATH.alpha(999.0), PATH.sigma(999.0))
    alpha, sigma = PATH.alpha(759.0), PATH.sigma(759.0)
    theirs = clean(alpha * x0 + sigma * n, alpha, sigma)
    expected = alpha * (0.3 * x0 + 0.7 * theirs) + sigma * noise.draw(SHAPE).double()
    assert torch.allclose(seen[0, 2].double(), expected, atol=2e-4)


# --- diversity distillation


def test_the_base_models_first_step_restores_diversity():
    """A student that collapsed to one mode at its first step; the base decides that step, and the modes come back."""

    def collapsed(x, t, alpha, sigma):
        x0 = clean(x, alpha, sigma) if t < 900 else torch.ones_like(x)
        return x0, (x - alpha * x0) / sigma

    base = served("base", TEACHER, Knows(TEACHER, exact()))
    alone, _ = latents(DDIM, Knows(DDIM, collapsed), ask(times=TIMES))
    first = ask(times=TIMES, helper=Helper(model="base", mode="first"))
    hybrid, _ = latents(DDIM, Knows(DDIM, collapsed), first, {"base": base})
    whole, _ = latents(TEACHER, Knows(TEACHER, exact()), ask(times=TIMES))
    spreads = [x.std().item() for x in (whole, hybrid, alone)]
    assert spreads[2] < 0.85 * spreads[1] and abs(spreads[1] - spreads[0]) < 0.1 * spreads[0], spreads


# --- clip


def row_state(row, x, **settings):
    return RowState(row, x, {"ctx": torch.zeros(2, 3)}, NoiseStream(0), history=History(), **settings)


def estimated(spec, engine, x, t, **hooks):
    """The clean estimate of a row at time t with hooks."""
    out = estimates(spec.prediction, spec.path, t)
    row = Row(0, t, -1.0, out.x0_x, out.x0_f, 0.0, 1.0, False, 0.0, hooks=Hooks(**hooks) if hooks else None)
    return advance(engine, [row_state(row, x)], spec)[0]


def test_clipping_leaves_rows_within_the_bound_to_the_bit_and_lessens_saturation():
    def hot(x, t, alpha, sigma):
        x0 = 3.0 * clean(x, alpha, sigma)
        return x0, (x - alpha * x0) / sigma

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    free = estimated(DDIM, Knows(DDIM, hot), x, 400.0)
    for quantile in (None, 0.9, 1.0):
        same = estimated(DDIM, Knows(DDIM, hot), x, 400.0, clip=free.abs().max().item() + 0.1, quantile=quantile)
        assert torch.equal(same, free)
    hard = estimated(DDIM, Knows(DDIM, hot), x, 400.0, clip=1.0)
    assert torch.allclose(hard, free.clamp(-1, 1), atol=1e-4)
    soft = estimated(DDIM, Knows(DDIM, hot), x, 400.0, clip=1.0, quantile=0.9)
    limit = free.abs().flatten().quantile(0.9)
    assert torch.allclose(soft, free.clamp(-limit, limit) / limit, atol=1e-4)
    saturated = [(found.abs() >= 0.999).float().mean().item() for found in (free, hard, soft)]
    assert saturated[2] < 0.5 * saturated[1] <= 0.5 * saturated[0] + 1e-9, saturated


# --- noise correction


def test_noise_correction_leaves_only_the_error_of_the_clean_estimate():
    """At pure noise eps is x to within the signal that is left in x_T, so a true predictor's step stays; a biased one's
    direction is mended, and what is left is `a'` times the error of its x0. (Where one output gives both, the errors
    partly cancel without the correction: it pays in students that were trained with it.)"""

    def gaussian(bias):
        def answer(x, t, alpha, sigma):
            x0 = alpha * 0.25 * x / (alpha**2 * 0.25 + sigma**2)
            return x0, (x - alpha * x0) / sigma + bias * (t > 900)

        return answer

    def first_step(bias, **settings):
        return latents(DDIM, Knows(DDIM, gaussian(bias)), ask(n=1, steps=2, **settings))[1][0, 1]

    truth, corrected = first_step(0.0), first_step(0.0, noise_correction=True)
    assert (truth - corrected).abs().max() < 0.02
    alpha, sigma, to = PATH.alpha(999.0), PATH.sigma(999.0), PATH.alpha(499.0)
    wrong = first_step(0.01, noise_correction=True)
    assert torch.allclose(wrong - corrected, torch.tensor(-to * sigma * 0.01 / alpha), atol=1e-4)


# --- inversion


def test_an_inverse_student_takes_a_picture_to_noise_and_back():
    """Exact hops up (and down) along one Gaussian's ODE; DDIM up and down by the same number of calls is worse."""
    grid = (779.0, 519.0, 259.0, 19.0)
    down = spec_of("ddim", grids={4: (999.0, 779.0, 519.0, 259.0)}, guidance=Guidance(mode="none"))
    up = spec_of("ddim", grids={4: grid}, guidance=Guidance(mode="none"))
    landing_up = dict(zip(reversed(grid), (259.0, 519.0, 779.0, 999.0), strict=True))
    landing_down = {999.0: 779.0, 779.0: 519.0, 519.0: 259.0, 259.0: None}

    def spread(t):
        return 1.0 * 0.5 if t is None else (PATH.alpha(t) ** 2 * 0.25 + PATH.sigma(t) ** 2) ** 0.5

    def hopping(landings):
        def answer(x, t, alpha, sigma):
            to = landings[round(t)]
            a, s = (1.0, 0.0) if to is None else (PATH.alpha(to), PATH.sigma(to))
            end = x * spread(to) / spread(t)
            x0 = (end - s * x / sigma) / (a - s * alpha / sigma)  # where the straight hop lands on the ODE's end
            return x0, (x - alpha * x0) / sigma

        return answer

    def gaussian(x, t, alpha, sigma):
        x0 = alpha * 0.25 * x / (alpha**2 * 0.25 + sigma**2)
        return x0, (x - alpha * x0) / sigma

    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    request = ask(n=1, steps=4, invert="up", edit=Edit(image=picture, strength=1.0, prompt="a"))
    errors = []
    for up_net, down_net in ((hopping(landing_up), hopping(landing_down)), (gaussian, gaussian)):
        inverse = served("up", up, Knows(up, up_net))
        found, seen = latents(down, Knows(down, down_net), request, {"up": inverse})
        begun = seen[0, 0] / spread(19.0) * spread(None)
        errors.append((found[0] - begun).pow(2).mean().sqrt().item())
    assert errors[0] < 1e-3 and errors[0] < 0.1 * errors[1], errors


# --- residual guidance


@pytest.mark.parametrize("mode", ["self", "onetime"])
def test_residual_guidance_near_one_is_none_and_above_it_guides(mode):
    engine = Knows(LCM, exact())
    plain, _ = latents(LCM, engine, ask(n=2))
    near, _ = latents(LCM, engine, ask(n=2, guidance=1.0 + 1e-6, residual=mode))
    assert torch.allclose(near, plain, atol=1e-3)
    far, _ = latents(LCM, engine, ask(n=2, guidance=1.6, residual=mode))
    assert (far - plain).abs().max() > 0.1


def test_the_kept_residual_is_streamdiffusions():
    """By hand, as its `unet_step`: e' = n' + a' f(eps, s e) / s', f the consistency step without boundary."""
    engine, request = Knows(LCM, exact()), ask(n=1, seed=5, steps=4, guidance=1.4, residual="self", residual_delta=0.8)
    _, seen = latents(LCM, engine, request)
    noise = NoiseStream(5)
    x = noise.draw(SHAPE).double()
    e, times = x.clone(), [999.0, 759.0, 499.0, 259.0]
    for k, t in enumerate(times):
        alpha, sigma = PATH.alpha(t), PATH.sigma(t)
        eps = (x - alpha * clean(x, alpha, sigma)) / sigma
        eps = 0.8 * e + 1.4 * (eps - 0.8 * e)
        step = lambda y, eps=eps, a=alpha, s=sigma: (y - s * eps) / a  # noqa: E731
        if k == 3:
            x = step(x)
            break
        alpha_next, sigma_next, z = PATH.alpha(times[k + 1]), PATH.sigma(times[k + 1]), noise.draw(SHAPE).double()
        x, e = alpha_next * step(x) + sigma_next * z, z + alpha_next * step(sigma * e) / sigma_next
        assert torch.allclose(seen[0, k + 1].double(), x, atol=2e-3, rtol=1e-3), k
    assert torch.allclose(seen[0, 4].double(), x, atol=5e-3, rtol=1e-3)


def test_residual_guidance_is_a_matter_of_rows_alone():
    """A row with a residual beside plain rows equals its solo run: nothing of it reaches the others."""
    spec = replace(LCM, guidance=CFG)
    plain, _ = latents(spec, Knows(spec, exact()), ask(n=3, seed=2))
    alone, _ = latents(spec, Knows(spec, exact()), ask(n=1, seed=3))
    assert torch.equal(plain[1], alone[0])
