from dataclasses import replace

import numpy as np
import pytest

from fewstep.models.spec import Guidance, Spacing
from fewstep.runtime.engines.fake_engine import fake_spec
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.request import MAX_SEED, Control, GenerateRequest, Limits, resolve

SPEC = fake_spec()
TEACHER = fake_spec(
    sampler="ddim", grids={}, spacing=Spacing(kind="trailing", max_steps=50), stochastic=False, boundary=None,
    guidance=Guidance(mode="cfg", default=4.0, range=(1.0, 9.0)),
)  # fmt: skip
BARE = fake_spec(guidance=Guidance(mode="none"))
EDGE = np.zeros((64, 64, 3), np.uint8)


def ask(**settings):
    return GenerateRequest(**{"prompt": "a cat", **settings})


def test_the_spec_decides_what_the_caller_left_open():
    found = resolve(ask(), SPEC)
    assert (found.steps, found.width, found.height, found.guidance) == (4, 64, 64, 3.0)
    assert resolve(ask(), TEACHER).steps == 25
    assert resolve(ask(), replace(TEACHER, spacing=Spacing(kind="trailing", max_steps=9))).steps == 9
    assert resolve(ask(), fake_spec(grids={1: (999.0,), 2: (999.0, 499.0)})).steps == 2


def test_what_the_caller_said_is_kept():
    asked = ask(steps=2, guidance=5, seed=7, n=3, width=64, height=64, priority=-4, deadline_s=2)
    assert resolve(asked, SPEC) == replace(asked, guidance=5.0)


GOOD = [
    (SPEC, {"steps": 8}),
    (SPEC, {"guidance": 1.0}),
    (SPEC, {"seed": MAX_SEED - 10}),
    (TEACHER, {"steps": 50, "negative_prompt": "blue"}),
    (SPEC, {"negative_prompt": ""}),
    (SPEC, {"deadline_s": 1e6}),
    (SPEC, {"control": Control(edge=EDGE, scale=0.0)}),
    (replace(SPEC, sampler="tcd", gamma=0.3, boundary=None), {"gamma": 0.0}),
]


@pytest.mark.parametrize(("spec", "settings"), GOOD)
def test_good_requests_pass(spec, settings):
    assert resolve(ask(**settings), spec).prompt == "a cat"


BAD = [
    (SPEC, {"prompt": ""}, "prompt", "empty"),
    (SPEC, {"prompt": " \n"}, "prompt", "empty"),
    (SPEC, {"prompt": None}, "prompt", "must be text"),
    (SPEC, {"prompt": 3}, "prompt", "3; it must be text"),
    (SPEC, {"prompt": "x" * 4001}, "prompt", "4001 characters; at most 4000"),
    (TEACHER, {"negative_prompt": "x" * 4001}, "negative_prompt", "4001 characters"),
    (SPEC, {"negative_prompt": "blue"}, "negative_prompt", "'embedded'"),
    (BARE, {"negative_prompt": "blue"}, "negative_prompt", "'none'"),
    (TEACHER, {"negative_prompt": "blue", "guidance": 1.0}, "negative_prompt", "does nothing"),
    (TEACHER, {"negative_prompt": 3}, "negative_prompt", "must be text"),
    (SPEC, {"steps": 3}, "steps", "3; this model was made for: 1, 2, 4, 8"),
    (SPEC, {"steps": 0}, "steps", "0; this model"),
    (TEACHER, {"steps": 51}, "steps", "any from 1 to 50"),
    (SPEC, {"steps": 4.0}, "steps", "whole number"),
    (SPEC, {"steps": True}, "steps", "whole number"),
    (SPEC, {"steps": "4"}, "steps", "whole number"),
    (SPEC, {"seed": -1}, "seed", "-1; use a whole number from 0"),
    (SPEC, {"seed": 2**63 - 1}, "seed", "whole number from 0"),
    (SPEC, {"seed": None}, "seed", "whole number"),
    (SPEC, {"n": 0}, "n", "1 to 10"),
    (SPEC, {"n": 11}, "n", "11; ask for 1 to 10"),
    (SPEC, {"n": "2"}, "n", "whole number"),
    (SPEC, {"guidance": 9.0}, "guidance", "1.0 to 8.0"),
    (SPEC, {"guidance": float("nan")}, "guidance", "nan"),
    (SPEC, {"guidance": "3"}, "guidance", "number"),
    (BARE, {"guidance": 2.0}, "guidance", "distilled away"),
    (SPEC, {"gamma": 0.3}, "gamma", "'lcm'"),
    (replace(SPEC, sampler="tcd", gamma=0.3, boundary=None), {"gamma": 1.5}, "gamma", "1.5"),
    (SPEC, {"width": 128}, "size", "128x64 is not supported; this model makes 64x64"),
    (SPEC, {"height": 63}, "size", "64x63"),
    (SPEC, {"width": "64"}, "width", "whole number of pixels"),
    (SPEC, {"priority": 0.5}, "priority", "whole number"),
    (SPEC, {"deadline_s": 0}, "deadline_s", "above 0"),
    (SPEC, {"deadline_s": float("nan")}, "deadline_s", "above 0"),
    (SPEC, {"deadline_s": float("inf")}, "deadline_s", "inf; it must be above 0 and at most 1000000 seconds"),
    (SPEC, {"deadline_s": 1e10}, "deadline_s", "at most 1000000 seconds"),
    (SPEC, {"deadline_s": 1_000_001}, "deadline_s", "1000001; it must be"),
    (SPEC, {"deadline_s": "soon"}, "deadline_s", "seconds"),
    (SPEC, {"control": Control(edge=EDGE[:32])}, "control.edge", "(32, 64, 3)"),
    (SPEC, {"control": Control(edge=EDGE.astype(np.float32))}, "control.edge", "float32"),
    (SPEC, {"control": Control(edge="edge.png")}, "control.edge", "uint8"),
    (SPEC, {"control": Control(edge=EDGE, scale=2.1)}, "control.scale", "2.1; use 0 to 2"),
    (SPEC, {"control": Control(edge=EDGE, scale="1")}, "control.scale", "number"),
    (SPEC, {"control": Control(edge=EDGE, start=0.5, end=0.5)}, "control.start", "0.5"),
    (SPEC, {"control": Control(edge=EDGE, end=1.1)}, "control.start", "1.1"),
]


@pytest.mark.parametrize(("spec", "settings", "field", "said"), BAD)
def test_bad_requests_are_refused_by_field_and_value(spec, settings, field, said):
    with pytest.raises(InvalidRequest) as caught:
        resolve(ask(**settings), spec)
    assert caught.value.field == field
    assert said in str(caught.value)


def test_limits_are_the_servers():
    assert resolve(ask(n=20), SPEC, Limits(max_n=20)).n == 20
    with pytest.raises(InvalidRequest, match="1 to 2"):
        resolve(ask(n=3), SPEC, Limits(max_n=2))
