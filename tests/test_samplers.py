"""Rows of the sampler table against diffusers' schedulers, and against each other where theory says they agree."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from fewstep.models.errors import BundleError
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.models.predictions import estimates
from fewstep.models.schedulers import Wanted, sampling_of
from fewstep.models.spec import Boundary, Spacing
from fewstep.runtime.engines.fake_engine import fake_spec
from fewstep.runtime.sampling.samplers import SAMPLERS, path_start, start_scale, time_pairs, updates

TABLE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE |= {"clip_sample": False}
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SHAPE = (1, 4, 8, 8)
BETAS = {name: value for name, value in TABLE.items() if name != "clip_sample"}
DETERMINISTIC = {"stochastic": False, "boundary": None}


def fake_output(x, t):
    """A stand-in for a network: any smooth function of latent and time."""
    return torch.tanh(0.3 * x) + 0.3 * math.cos(t / 150)


def ours(spec, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    x = x * start_scale(spec, time_pairs(spec, steps)[0][0])
    seen, kept = [], None
    for t, row in updates(spec, steps):
        f = fake_output(x, t)
        out = row.a * x + row.b * f
        if row.d:
            out = out + row.d * kept
        kept = row.keep and row.keep[0] * x + row.keep[1] * f
        x = out + row.c * torch.randn(SHAPE, generator=generator) if row.c else out
        seen.append(x)
    return seen


def theirs(scheduler, steps, seed, **settings):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    scheduler.set_timesteps(steps)
    seen = []
    for t in scheduler.timesteps:
        x = scheduler.step(fake_output(x, float(t)), t, x, generator=generator, **settings).prev_sample
        seen.append(x)
    return seen


def assert_steps_equal(mine, reference):
    assert len(mine) == len(reference)
    for k, (a, b) in enumerate(zip(mine, reference, strict=True)):
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error < 1e-5, f"step {k + 1}: relative error {error:.1e}"


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_is_diffusers_lcm(prediction, steps):
    scheduler = LCMScheduler(**TABLE, prediction_type=NAMES[prediction], original_inference_steps=50)
    spec = fake_spec(prediction=prediction)
    scheduler.set_timesteps(steps)
    assert [float(t) for t in scheduler.timesteps] == list(spec.grids[steps])
    assert_steps_equal(ours(spec, steps, 5), theirs(scheduler, steps, 5))


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(("kind", "offset"), [("trailing", 0), ("leading", 1)])
@pytest.mark.parametrize("final_alpha_one", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 4, 25])
def test_ddim_is_diffusers_ddim(prediction, kind, offset, final_alpha_one, steps):
    scheduler = DDIMScheduler(
        **TABLE, prediction_type=NAMES[prediction], timestep_spacing=kind, steps_offset=offset,
        set_alpha_to_one=final_alpha_one,
    )  # fmt: skip
    spec = fake_spec(
        **DETERMINISTIC, prediction=prediction, sampler="ddim", grids={}, final_alpha_one=final_alpha_one,
        spacing=Spacing(kind=kind, offset=offset),
    )  # fmt: skip
    assert_steps_equal(ours(spec, steps, 6), theirs(scheduler, steps, 6))


def imported(scheduler, steps, grids=None):
    """What of a spec the importer reads from a scheduler."""
    wanted = Wanted(steps=steps, size=(64, 64), grids=grids or {})
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    return fake_spec(**{"boundary": None, **sampling_of(config, wanted)})


@pytest.mark.parametrize(("kind", "offset"), [("trailing", 1), ("leading", 1), ("leading", 0)])
@pytest.mark.parametrize("final_alpha_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_imported_with_ddim_has_its_stated_counts_and_is_diffusers(kind, offset, final_alpha_one, steps):
    scheduler = DDIMScheduler(**TABLE, timestep_spacing=kind, steps_offset=offset, set_alpha_to_one=final_alpha_one)
    for stated in ((steps,), (1, 2, 4, 8)):
        spec = imported(scheduler, stated)
        assert spec.spacing is None and spec.steps == stated
        assert [n for n in range(1, 51) if spec.allows(n)] == list(stated)
        assert_steps_equal(ours(spec, steps, 6), theirs(scheduler, steps, 6))


def test_a_teacher_imported_with_ddim_has_a_rule_and_so_has_what_no_grid_can_say():
    trailing = DDIMScheduler(**TABLE, timestep_spacing="trailing", steps_offset=1)
    teacher = imported(trailing, tuple(range(1, 51)))
    assert (teacher.steps, teacher.spacing) == ((), Spacing(kind="trailing", max_steps=50))
    assert imported(trailing, tuple(range(1, 51)), {2: (999.0, 499.0)}).steps == (2,), "stated times replace the rule"
    three = imported(trailing, (1, 2, 3))
    assert three.spacing == Spacing(kind="trailing", max_steps=3), "three steps land a time beside the next"
    assert_steps_equal(ours(three, 3, 6), theirs(trailing, 3, 6))
    with pytest.raises(BundleError, match=r"trailing times of 6 steps .* lands 166 below.*leave 6 out.*--steps 1-6"):
        imported(trailing, (2, 6))
    leading = DDIMScheduler(**TABLE, timestep_spacing="leading", steps_offset=1)
    for steps in (3, 6, 30):
        assert_steps_equal(ours(imported(leading, (2, steps)), steps, 6), theirs(leading, steps, 6))
    assert imported(trailing, (2, 6), {6: (999.0, 833.0, 666.0, 499.0, 333.0, 166.0)}).steps == (2, 6)
    assert imported(trailing, (4,), {2: (999.0, 499.0)}).steps == (2, 4), "stated times are kept"
    with pytest.raises(BundleError, match="DDIMScheduler has no times of 2000 steps"):
        imported(leading, (2000,))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_tcd_is_diffusers_tcd(gamma, steps):
    """Its last step lands on the least noisy time, so `final_alpha_one` is false for a TCD student."""
    scheduler = TCDScheduler(**TABLE, prediction_type="epsilon", original_inference_steps=50)
    spec = fake_spec(
        sampler="tcd", gamma=gamma, prediction="eps", stochastic=gamma > 0, boundary=None, final_alpha_one=False
    )
    assert_steps_equal(ours(spec, steps, 7), theirs(scheduler, steps, 7, eta=gamma))


def grid_of(scheduler, steps, unit=1.0):
    """The times a scheduler asks for, as a spec's grid in the path's unit."""
    scheduler.set_timesteps(steps)
    return {steps: tuple(float(t) / unit for t in scheduler.timesteps)}


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_euler_is_diffusers_euler_in_other_units(prediction, cls, spacing, steps):
    """diffusers' Euler lives at x / alpha; its start noise is sigma / alpha, or one more in quadrature."""
    ancestral = cls is EulerAncestralDiscreteScheduler
    scheduler = cls(**BETAS, prediction_type=NAMES[prediction], timestep_spacing=spacing, steps_offset=1)
    if ancestral and prediction == "x0":
        pytest.skip("diffusers' ancestral Euler has no x0 prediction")
    spec = fake_spec(
        prediction=prediction, sampler="euler-ancestral" if ancestral else "euler", stochastic=ancestral,
        boundary=None, grids=grid_of(scheduler, steps), start="sigma" if spacing == "trailing" else "unit",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(8)
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    reference = []
    for k, t in enumerate(scheduler.timesteps):
        output = fake_output(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(output, t, x, generator=generator).prev_sample
        reference.append(x / (1 + float(scheduler.sigmas[k + 1]) ** 2) ** 0.5)
    assert_steps_equal(ours(spec, steps, 8), reference)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
def test_dpmpp_2m_is_diffusers(prediction, spacing, steps):
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, prediction_type=NAMES[prediction], timestep_spacing=spacing, steps_offset=1
    )
    grids = grid_of(scheduler, steps)
    spec = fake_spec(**DETERMINISTIC, prediction=prediction, sampler="dpmpp-2m", grids=grids)
    assert_steps_equal(ours(spec, steps, 9), theirs(scheduler, steps, 9))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_dpmpp_2m_on_flow_is_diffusers(steps):
    """As SANA samples: times are 1000 sigma there, cut to whole numbers only when they reach the network."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    grids = {steps: tuple(float(s) for s in scheduler.sigmas[:-1])}
    flow = {"path": RectifiedFlow(), "prediction": "flow"}
    spec = fake_spec(**DETERMINISTIC, **flow, sampler="dpmpp-2m", grids=grids)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=generator)
    reference = []
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(fake_output(x, grids[steps][k]), t, x).prev_sample
        reference.append(x)
    assert_steps_equal(ours(spec, steps, 3), reference)


def test_gamma_zero_is_ddim_and_gamma_one_forgets_the_noise():
    grids = {3: (0.9, 0.6, 0.3)}
    flow = {"path": RectifiedFlow(), "prediction": "flow", "grids": grids, "boundary": None}
    ddim = updates(fake_spec(**flow, sampler="ddim", stochastic=False), 3)
    still = updates(fake_spec(**flow, sampler="tcd", gamma=0.0, stochastic=False), 3)
    for (_, a), (_, b) in zip(ddim, still, strict=True):
        assert (a.a, a.b, a.c) == pytest.approx((b.a, b.b, b.c))
    restless = updates(fake_spec(**flow, sampler="tcd", gamma=1.0, stochastic=True), 3)
    fresh = updates(fake_spec(**flow, sampler="lcm", stochastic=True), 3)
    for (_, a), (_, b) in zip(restless, fresh, strict=True):
        assert (a.a, a.b, a.c) == pytest.approx((b.a, b.b, b.c)), "gamma 1 is LCM without boundary scalings"


def test_flow_euler_is_a_straight_step():
    spec = fake_spec(**DETERMINISTIC, path=RectifiedFlow(), prediction="flow", sampler="euler", grids={2: (1.0, 0.4)})
    (_, first), (_, last) = updates(spec, 2)
    assert (first.a, first.b, first.c) == pytest.approx((1.0, -0.6, 0.0))
    assert (last.a, last.b, last.c) == pytest.approx((1.0, -0.4, 0.0))


def test_trigflow_rows_are_the_papers():
    path = TrigFlow(sigma_data=0.5)
    spec = fake_spec(path=path, prediction="trig", sampler="trig", boundary=None, grids={2: (math.pi / 2, 1.1)})
    (t, first), (_, last) = updates(spec, 2)
    assert first.a == pytest.approx(math.cos(1.1) * math.cos(t))
    assert first.b == pytest.approx(-math.cos(1.1) * math.sin(t))
    assert first.c == pytest.approx(0.5 * math.sin(1.1))
    assert (last.a, last.b, last.c) == pytest.approx((math.cos(1.1), -math.sin(1.1), 0.0))
    assert path_start(path) == pytest.approx(0.5)


def test_edm_consistency_rows_are_the_papers():
    path = EDM(sigma_min=0.002, sigma_max=80.0)
    spec = fake_spec(path=path, prediction="x0", sampler="edm", boundary=None, grids={2: (80.0, 0.8)})
    (_, first), (_, last) = updates(spec, 2)
    assert (first.a, first.b) == (0.0, 1.0)
    assert first.c == pytest.approx(math.sqrt(0.8**2 - 0.002**2))
    assert (last.a, last.b, last.c) == (0.0, 1.0, 0.0)
    assert path_start(path) == 80.0


PATHS = [
    (VP(), "v", (999.0, 499.0, 259.0)),
    (RectifiedFlow(), "flow", (1.0, 0.7, 0.2)),
    (EDM(), "x0", (80.0, 5.0, 0.5)),
]
PATHS += [(TrigFlow(sigma_data=0.5), "trig", (1.5, 1.1, 0.6))]


HOME = {"edm": "edm", "trig": "trig"}  # samplers defined on one path
PAIRS = [(s, *case) for s in SAMPLERS for case in PATHS if HOME.get(s, case[0].kind) == case[0].kind]


@pytest.mark.parametrize(("sampler", "path", "prediction", "grid"), PAIRS)
def test_every_sampler_keeps_a_perfect_student_on_the_path(sampler, path, prediction, grid):
    """With the exact estimates of one pair (x0, eps), every landing is `alpha x0 + sigma noise` of that x0.

    The noise is eps where the step is deterministic, fresh where it is LCM-like; either way its weight is sigma.
    """
    stochastic = sampler in ("lcm", "trig", "edm", "tcd", "euler-ancestral")
    spec = fake_spec(
        path=path, prediction=prediction, sampler=sampler, boundary=None, grids={3: grid}, stochastic=stochastic,
        gamma=0.4 if sampler == "tcd" else None, phases=3 if sampler == "phased" else None,
    )  # fmt: skip
    x0, eps = 0.37, -1.2
    kept_estimate = 0.0
    for (t, row), (_, to) in zip(updates(spec, 3), time_pairs(spec, 3), strict=True):
        out = estimates(prediction, path, t)
        x = path.alpha(t) * x0 + path.sigma(t) * eps
        f = (x0 - out.x0_x * x) / out.x0_f  # the raw output that means this x0
        alpha, sigma = (1.0, 0.0) if to is None else (path.alpha(to), path.sigma(to))
        mean = row.a * x + row.b * f + row.d * kept_estimate
        kept_estimate = row.keep[0] * x + row.keep[1] * f if row.keep else 0.0
        kept = (mean - alpha * x0) / eps  # what is left of the old noise
        assert math.hypot(kept, row.c) == pytest.approx(sigma, abs=3e-3 if sampler == "edm" else 1e-9)


def test_boundary_scalings_matter_only_near_the_end():
    bare = updates(fake_spec(boundary=None, grids={2: (999.0, 1.0)}), 2)
    scaled = updates(fake_spec(boundary=Boundary(), grids={2: (999.0, 1.0)}), 2)
    assert scaled[0][1].b == pytest.approx(bare[0][1].b, rel=1e-6)
    assert abs(scaled[1][1].b / bare[1][1].b - 1) > 1e-3
