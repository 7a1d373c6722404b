"""Methods as plans: which rows, of which models, with which coefficients; counted in network evaluations."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fewstep.models.spec import Guidance, Spacing
from fewstep.runtime.engines.fake_engine import fake_spec
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.plan import Hooks, compile_plan, ramped
from fewstep.runtime.sampling.request import Edit, GenerateRequest, Helper, resolve
from fewstep.runtime.sampling.samplers import updates

CFG = Guidance(mode="cfg", default=4.0, range=(1.0, 9.0))
LCM = fake_spec()
DDIM = fake_spec(sampler="ddim", stochastic=False, boundary=None, guidance=CFG)
TEACHER = replace(DDIM, grids={}, spacing=Spacing(kind="trailing", max_steps=50))
PICTURE = np.zeros((64, 64, 3), np.uint8)
MASK = np.full((64, 64), 255, np.uint8)


def plan(spec, others=None, **settings):
    return compile_plan(resolve(GenerateRequest(prompt="a cat", **settings), spec), spec, others)


def numbers(rows):
    return [(row.t, row.a, row.b, row.c) for row in rows]


# --- times (TDD)


@pytest.mark.parametrize("grid", [(999.0, 875.0, 751.0, 499.0, 251.0), (999.0, 879.0, 759.0, 499.0, 259.0), (999.0,)])
def test_uneven_grids_are_the_samplers_own_steps(grid):
    rows = plan(LCM, times=grid).rows
    spec = replace(LCM, grids={len(grid): grid})
    assert numbers(rows) == [(t, u.a, u.b, u.c) for t, u in updates(spec, len(grid))]
    assert rows[0].t == 999.0 and all(b.t < a.t for a, b in pairwise(rows))


def test_the_specs_own_grid_said_aloud_changes_nothing():
    assert plan(LCM, times=LCM.grids[4]).rows == plan(LCM, steps=4).rows


# --- dynamic guidance


@pytest.mark.parametrize("ramp", [(0.0, 0.0), (0.3, 0.6), (0.5, 0.5), (0.8, 0.8), (1.0, 1.0)])
@pytest.mark.parametrize("steps", [4, 25])
def test_rows_without_guidance_drop_their_partner(ramp, steps):
    made = plan(TEACHER, steps=steps, guidance=7.0, guidance_ramp=ramp)
    taus = [row.t / 1000 for row in made.rows]
    g = [7.0 if tau <= ramp[0] else 1.0 if tau >= ramp[1] else None for tau in taus]
    g = [1 + 6 * (ramp[1] - tau) / (ramp[1] - ramp[0]) if w is None else w for w, tau in zip(g, taus, strict=True)]
    assert [row.w for row in made.rows] == pytest.approx(g)
    assert made.nfe == sum(1 + (w > 1) for w in g)


def test_a_ramp_of_one_is_off_and_an_embedded_scale_is_ramped_too():
    assert plan(LCM, guidance_ramp=(1.0, 1.0)).rows == plan(LCM).rows
    assert [row.w for row in plan(LCM, guidance=5.0, guidance_ramp=(0.5, 0.5)).rows] == [1.0, 1.0, 5.0, 5.0]
    assert ramped(5.0, (0.2, 0.6), LCM, 400.0) == pytest.approx(3.0)


# --- beginning from a picture


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("strength", [0.01, 0.1, 0.25, 0.3, 0.5, 0.75, 0.99, 1.0])
def test_what_remains_of_the_grid_is_never_nothing(steps, strength):
    made = plan(TEACHER, steps=steps, edit=Edit(image=PICTURE, strength=strength))
    assert len(made.rows) == max(1, int(steps * strength))
    assert numbers(made.rows) == numbers(plan(TEACHER, steps=steps).rows[-len(made.rows) :])
    t = made.rows[0].t
    expected = (0.0, 1.0) if strength == 1.0 else (TEACHER.path.alpha(t), TEACHER.path.sigma(t))
    assert (made.start_signal, made.start_scale) == pytest.approx(expected)


def test_students_of_an_even_grid_take_as_many_steps_from_its_lower_part():
    spec = replace(LCM, origin_steps=50)
    assert [row.t for row in plan(spec, steps=4, edit=Edit(image=PICTURE, strength=0.5)).rows] == [499, 379, 259, 139]
    assert [row.t for row in plan(spec, steps=1, edit=Edit(image=PICTURE, strength=0.5)).rows] == [499]
    assert [row.t for row in plan(spec, steps=4, edit=Edit(image=PICTURE, strength=0.03)).rows] == [19]
    own = plan(spec, times=(999.0, 500.0, 30.0, 20.0), edit=Edit(image=PICTURE, strength=0.5))
    assert [row.t for row in own.rows] == [30.0, 20.0], "a grid of the caller's own is not replaced"


def test_masks_know_the_picture_at_each_landing():
    made = plan(DDIM, steps=4, edit=Edit(image=PICTURE, mask=MASK, strength=1.0))
    landings = [(DDIM.path.alpha(t), DDIM.path.sigma(t)) for t in (759.0, 499.0, 259.0)]
    assert [row.hooks.known for row in made.rows] == [*landings, (1.0, 0.0)]
    assert [row.hooks.restore for row in plan(DDIM, edit=Edit(image=PICTURE, keep="grey")).rows] == ["grey"] * 3


# --- a second model


def test_diversity_gives_the_first_step_to_the_base_model():
    made = plan(LCM, {"base": TEACHER}, helper=Helper(model="base", mode="first", guidance=7.0))
    plain = plan(LCM).rows
    base = updates(replace(DDIM, grids={4: LCM.grids[4]}), 4)[0][1]
    first = made.rows[0]
    assert (first.model, first.pair, first.w, first.c) == ("base", True, 7.0, 0.0)
    assert (first.a, first.b) == (base.a, base.b), "it hands over without noise"
    assert made.rows[1:] == plain[1:] and made.nfe == 5


def test_the_teachers_row_follows_the_first_of_a_pulled_student():
    helper = Helper(model="base", mode="pull", weight=0.3, guidance=7.0)
    made = plan(LCM, {"base": TEACHER}, helper=helper)
    plain = plan(LCM).rows
    assert [row.model for row in made.rows] == [None, "base", None, None, None]
    assert [row.index for row in made.rows] == [0, 1, 2, 3, 4] and made.nfe == 6
    assert made.rows[1].t == plain[1].t and made.rows[1].c == plain[0].c
    assert made.rows[0].hooks == Hooks(aside=True) and made.rows[1].d == 1.0
    assert numbers(made.rows[2:]) == numbers(plain[1:])
    assert plan(LCM, {"base": TEACHER}, helper=replace(helper, weight=0.0)) == plan(LCM), "no pull, no teacher"


def test_an_inverse_student_climbs_to_where_the_student_begins():
    inverse = replace(DDIM, grids={4: (779.0, 519.0, 259.0, 19.0)})
    edit = Edit(image=PICTURE, strength=1.0)
    made = plan(DDIM, {"up": inverse}, invert="up", edit=edit, guidance=5.0)
    assert [row.t for row in made.rows] == [19.0, 259.0, 519.0, 779.0, 999.0, 759.0, 499.0, 259.0]
    assert [row.model for row in made.rows] == ["up"] * 4 + [None] * 4
    assert not any(row.pair for row in made.rows[:4]) and all(row.pair for row in made.rows[4:])
    assert (made.start_signal, made.start_scale) == (DDIM.path.alpha(19.0), DDIM.path.sigma(19.0))
    half = plan(DDIM, {"up": inverse}, invert="up", edit=replace(edit, strength=0.5))
    assert [row.t for row in half.rows] == [19.0, 259.0, 499.0, 259.0]


# --- gamma, noise correction, residuals


def test_noise_correction_changes_the_first_step_alone():
    rows, plain = plan(DDIM, noise_correction=True).rows, plan(DDIM).rows
    assert numbers(rows[1:]) == numbers(plain[1:])
    sigma = DDIM.path.sigma(759.0)
    with_x, with_f = rows[0].a, rows[0].b
    alpha = DDIM.path.alpha(759.0)
    out_x, out_f = DDIM.path.alpha(999.0), -DDIM.path.sigma(999.0)  # x0 of a v-prediction
    assert (with_x, with_f) == pytest.approx((alpha * out_x + sigma, alpha * out_f))


def test_residual_guidance_costs_one_evaluation_per_step_and_perhaps_one_more():
    assert plan(DDIM, steps=4).nfe == 8
    assert plan(DDIM, steps=4, residual="self").nfe == 4
    once = plan(DDIM, steps=4, residual="onetime")
    assert [row.pair for row in once.rows] == [True, False, False, False] and once.nfe == 5


def test_clips_reach_every_row_and_the_specs_own_stands_in():
    assert {row.hooks for row in plan(DDIM, clip=1.5, clip_quantile=0.9).rows} == {Hooks(clip=1.5, quantile=0.9)}
    assert {row.hooks for row in plan(replace(DDIM, clip=2.0)).rows} == {Hooks(clip=2.0)}
    assert {row.hooks for row in plan(DDIM).rows} == {None}


def test_a_request_that_no_plan_can_follow_was_refused_before():
    with pytest.raises(InvalidRequest, match="2 steps or more"):
        plan(DDIM, {"base": TEACHER}, steps=1, helper=Helper(model="base", mode="first"))
