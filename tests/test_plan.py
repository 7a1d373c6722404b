import numpy as np
import pytest

from fewstep.models.spec import Guidance, Spacing
from fewstep.runtime.engines.fake_engine import fake_spec
from fewstep.runtime.sampling.plan import compile_plan
from fewstep.runtime.sampling.request import Control, GenerateRequest, resolve
from fewstep.runtime.sampling.samplers import updates

CFG = Guidance(mode="cfg", default=4.0, range=(1.0, 9.0))
EDGE = np.zeros((64, 64, 3), np.uint8)


def plan(spec, **settings):
    return compile_plan(resolve(GenerateRequest(prompt="a cat", **settings), spec), spec)


def test_rows_hold_the_grid_and_the_samplers_numbers():
    spec = fake_spec()
    rows = plan(spec, steps=4).rows
    assert [row.t for row in rows] == [999.0, 759.0, 499.0, 259.0]
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert [(row.t, row.a, row.b, row.c) for row in rows] == [(t, u.a, u.b, u.c) for t, u in updates(spec, 4)]
    assert rows[-1].c == 0.0 and all(row.c > 0 for row in rows[:-1])


def test_guidance_modes():
    embedded = plan(fake_spec(), guidance=5.0)
    assert [(row.w, row.pair) for row in embedded.rows] == [(5.0, False)] * 4
    assert embedded.nfe == 4
    guided = plan(fake_spec(guidance=CFG))
    assert [(row.w, row.pair) for row in guided.rows] == [(4.0, True)] * 4
    assert guided.nfe == 8
    assert plan(fake_spec(guidance=CFG), guidance=1.0).nfe == 4, "no second evaluation where it changes nothing"


@pytest.mark.parametrize(
    ("start", "end", "scales"),
    [
        (0.0, 1.0, [0.7, 0.7, 0.7, 0.7]),
        (0.0, 0.5, [0.7, 0.7, 0.0, 0.0]),
        (0.25, 1.0, [0.0, 0.7, 0.7, 0.7]),
        (0.3, 0.8, [0.0, 0.0, 0.7, 0.0]),
    ],
)
def test_control_is_on_while_a_step_lies_inside_its_part(start, end, scales):
    control = Control(edge=EDGE, scale=0.7, start=start, end=end)
    assert [row.control for row in plan(fake_spec(), control=control).rows] == scales


def test_gamma_of_the_request_wins_over_the_specs():
    spec = fake_spec(sampler="tcd", gamma=0.3, boundary=None, final_alpha_one=False)
    quiet = plan(spec, gamma=0.0).rows
    assert all(row.c == 0.0 for row in quiet)
    assert any(row.c > 0 for row in plan(spec).rows)
    ddim = plan(fake_spec(sampler="ddim", final_alpha_one=False, stochastic=False, boundary=None)).rows
    assert [row.a for row in quiet] == pytest.approx([row.a for row in ddim])
    assert [row.b for row in quiet] == pytest.approx([row.b for row in ddim])


def test_a_teacher_makes_a_grid_of_any_count():
    spec = fake_spec(
        sampler="ddim", grids={}, spacing=Spacing(kind="trailing", max_steps=50), stochastic=False, boundary=None
    )
    assert [row.t for row in plan(spec, steps=3).rows] == [999.0, 666.0, 332.0]
    assert len(plan(spec, steps=50).rows) == 50


def test_only_resolved_requests_are_compiled():
    with pytest.raises(ValueError, match="resolved"):
        compile_plan(GenerateRequest(prompt="a"), fake_spec())
