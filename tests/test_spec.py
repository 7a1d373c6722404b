"""The sampling contract: round trip through JSON, and every bad field refused by name."""

import json
from dataclasses import replace

import pytest

from fewstep.models.errors import SpecError
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.models.spec import (
    SAMPLERS,
    STOCHASTIC,
    Boundary,
    GoldenCase,
    Guidance,
    Latent,
    QualityRow,
    SamplerSpec,
    Spacing,
)
from fewstep.runtime.sampling.samplers import SAMPLERS as RULES
from tiny import tiny_spec


def full_spec():
    """Every field given."""
    row = {"steps": 4, "nfe": 4, "guidance": 3.0, "frechet": 1.5, "compliance": 0.9, "diversity": 0.2, "pictures": 64}
    golden = GoldenCase(prompt="a red circle", seed=1, steps=4, guidance=3.0, file="case.safetensors", control="e.png")
    return SamplerSpec(
        prediction="v",
        path=VP(),
        sampler="tcd",
        grids={1: (999.0,), 4: (999.0, 749.0, 499.0, 249.0)},
        spacing=Spacing(kind="leading", max_steps=20, offset=1),
        stochastic=True,
        gamma=0.3,
        phases=4,
        final_alpha_one=False,
        guidance=Guidance(mode="embedded", default=3.0, range=(1.0, 8.0)),
        boundary=Boundary(sigma_data=0.5, timestep_scaling=4.0),
        latent=Latent(channels=4, factor=8, scale=0.18215, shift=0.1),
        sizes=((512, 512), (768, 512)),
        clip=3.0,
        recipe="tcd",
        teacher="sd",
        quality=(QualityRow(**row),),
        golden=(golden,),
    )


SPECS = [full_spec(), *(tiny_spec(kind) for kind in ("teacher", "lcm", "dmd2"))]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.recipe)
def test_json_round_trip(spec):
    text = json.dumps(spec.to_json())
    again = SamplerSpec.from_json(json.loads(text))
    assert again == spec
    assert json.dumps(again.to_json()) == text


@pytest.mark.parametrize(("path", "kind"), [(EDM(), "x0"), (RectifiedFlow(), "flow"), (TrigFlow(), "trig")])
def test_every_path_round_trips(path, kind):
    grid = {1: (path.start,), 2: (path.start, 0.5 * path.start)}
    spec = replace(tiny_spec("dmd2"), path=path, prediction=kind, grids=grid)
    assert SamplerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_spec_never_used_before_is_the_same_as_a_used_one():
    spec = full_spec()
    spec.path.alpha(3.0)
    assert spec == full_spec()


REQUIRED = ["prediction", "path", "sampler", "grids", "stochastic", "guidance", "latent", "sizes", "recipe"]


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_field_is_named(name):
    data = full_spec().to_json()
    del data[name]
    with pytest.raises(SpecError, match=f"{name} is missing"):
        SamplerSpec.from_json(data)


def changed(data, where, value):
    *parents, last = where.split(".")
    for parent in parents:
        data = data[int(parent)] if isinstance(data, list) else data[parent]
    data[int(last) if isinstance(data, list) else last] = value


BAD = [
    ("version", 2, "version"),
    ("surprise", 1, "surprise"),
    ("prediction", "epsilon", "prediction"),
    ("prediction", "flow", "prediction"),
    ("prediction", 3, "prediction"),
    ("path", "vp", "path"),
    ("path", None, "path"),
    ("path.kind", "ddpm", "path.kind"),
    ("path.betas", [], "path.betas"),
    ("path.beta_end", "big", "path.beta_end"),
    ("sampler", "euler_a", "sampler"),
    ("sampler", "ddim", "stochastic"),
    ("grids", [999.0], "grids"),
    ("grids", {}, None),
    ("grids", {"four": [999.0]}, "grids"),
    ("grids", {"1": 999.0}, "grids.1"),
    ("grids", {"1": ["999"]}, "grids.1[0]"),
    ("grids", {"2": [999.0]}, "grids.2"),
    ("grids", {"2": [499.0, 999.0]}, "grids.2"),
    ("grids", {"2": [999.0, 999.0]}, "grids.2"),
    ("grids", {"1": [1000.0]}, "grids.1"),
    ("grids", {"1": [-1.0]}, "grids.1"),
    ("grids", {"1": [float("nan")]}, "grids.1"),
    ("grids", {"0": []}, "grids.0"),
    ("spacing.kind", "linspace", "spacing.kind"),
    ("spacing.max_steps", 0, "spacing.max_steps"),
    ("spacing.max_steps", 2000, "spacing.max_steps"),
    ("spacing.offset", -1, "spacing.offset"),
    ("spacing", 4, "spacing"),
    ("stochastic", False, "stochastic"),
    ("stochastic", "yes", "stochastic"),
    ("gamma", None, "gamma"),
    ("gamma", 1.5, "gamma"),
    ("gamma", "0.3", "gamma"),
    ("phases", 0, "phases"),
    ("phases", 1.5, "phases"),
    ("final_alpha_one", 1, "final_alpha_one"),
    ("guidance", "none", "guidance"),
    ("guidance.mode", "omega", "guidance.mode"),
    ("guidance.mode", "none", "guidance.range"),
    ("guidance.default", 9.0, "guidance.default"),
    ("guidance.default", float("nan"), "guidance.default"),
    ("guidance.range", [1.0], "guidance.range"),
    ("guidance.range", [1.0, "8"], "guidance.range[1]"),
    ("guidance.scale", 1.0, "guidance.scale"),
    ("boundary.sigma_data", 0.0, "boundary.sigma_data"),
    ("boundary.timestep_scaling", -1, "boundary.timestep_scaling"),
    ("latent.channels", 0, "latent.channels"),
    ("latent.channels", 4.0, "latent.channels"),
    ("latent.factor", 0, "latent.factor"),
    ("latent.scale", 0.0, "latent.scale"),
    ("latent.shift", None, "latent.shift"),
    ("latent.mean", 0.0, "latent.mean"),
    ("sizes", [], "sizes"),
    ("sizes", [[512]], "sizes[0]"),
    ("sizes", [[512, 500]], "sizes"),
    ("sizes", [[512, -512]], "sizes"),
    ("sizes", 512, "sizes"),
    ("clip", 0.0, "clip"),
    ("recipe", None, "recipe"),
    ("teacher", 3, "teacher"),
    ("quality.0.steps", "4", "quality[0].steps"),
    ("quality.0.clip", 0.3, "quality[0].clip"),
    ("golden.0.seed", 1.5, "golden[0].seed"),
    ("golden.0", "case", "golden[0]"),
]


@pytest.mark.parametrize(("where", "value", "named"), BAD, ids=[f"{w}={v}" for w, v, _ in BAD])
def test_bad_field_is_named(where, value, named):
    data = full_spec().to_json()
    if named is None:
        data["spacing"], named = None, "grids"
    changed(data, where, value)
    with pytest.raises(SpecError) as caught:
        SamplerSpec.from_json(data)
    assert str(caught.value).startswith(named), str(caught.value)


@pytest.mark.parametrize("data", [None, [], "spec", 3])
def test_a_spec_is_an_object(data):
    with pytest.raises(SpecError, match="must be an object"):
        SamplerSpec.from_json(data)


def test_spacing_needs_the_discrete_path():
    flow = {"path": RectifiedFlow(), "prediction": "flow", "grids": {1: (1.0,)}}
    with pytest.raises(SpecError, match="spacing"):
        replace(tiny_spec("teacher"), **flow)


def test_missing_phases():
    with pytest.raises(SpecError, match="phases is missing"):
        replace(tiny_spec("teacher"), sampler="phased")


def test_allowed_step_counts():
    teacher, lcm = tiny_spec("teacher"), tiny_spec("lcm")
    assert [n for n in range(60) if teacher.allows(n)] == list(range(1, 51))
    assert [n for n in range(60) if lcm.allows(n)] == list(lcm.steps) == [1, 2, 4, 8]


def test_names_agree_with_the_runtime():
    assert set(SAMPLERS) == set(RULES)
    assert set(STOCHASTIC) < set(SAMPLERS)
