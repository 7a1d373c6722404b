"""Paths: agreement with diffusers' tables, inverse maps, derivatives, floats against tensors, and bad settings."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from fewstep.models.denoiser import renoise
from fewstep.models.errors import SpecError
from fewstep.models.paths import (
    BETA_SCHEDULES,
    EDM,
    PATHS,
    VP,
    RectifiedFlow,
    TrigFlow,
    _linspace32,
    path_from_json,
    path_to_json,
)

ALL = [VP(), VP(beta_schedule="squaredcos_cap_v2"), EDM(), RectifiedFlow(), TrigFlow(), TrigFlow(sigma_data=0.5)]
FUSED = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
"""torch's own tables depend on the machine: without fused multiply-add their last bit differs from everybody else's."""


def inside(path, count=97):
    edge = 1e-3 * (path.start - path.end)
    return torch.linspace(path.end + edge, path.start - edge, count, dtype=torch.float64)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_float_and_tensor_agree(path):
    t = inside(path)
    for name in ("alpha", "sigma", "dalpha", "dsigma", "level"):
        tensor = getattr(path, name)(t)
        floats = torch.tensor([getattr(path, name)(float(v)) for v in t], dtype=torch.float64)
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, floats, rtol=1e-14, atol=1e-15)
    back = torch.tensor([path.time(path.level(float(v))) for v in t], dtype=torch.float64)
    torch.testing.assert_close(path.time(path.level(t)), back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_level_and_time_are_inverse(path):
    t = inside(path)
    torch.testing.assert_close(path.time(path.level(t)), t, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(path.level(t), path.sigma(t) / path.alpha(t), rtol=1e-12, atol=0)
    assert bool((path.level(t).diff() > 0).all()), "noise must grow with time"


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_derivatives(path):
    t = inside(path) + 0.0123 * (path.start - path.end) / 97  # off the VP table's corners
    h = 1e-6 * (path.start - path.end)
    for value, slope in (("alpha", "dalpha"), ("sigma", "dsigma")):
        measured = (getattr(path, value)(t + h) - getattr(path, value)(t - h)) / (2 * h)
        torch.testing.assert_close(getattr(path, slope)(t), measured, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_shapes_and_integers(path):
    t = inside(path, 6).reshape(2, 3)
    assert path.alpha(t).shape == path.sigma(t).shape == path.time(path.level(t)).shape == (2, 3)
    assert isinstance(path.alpha(1), float)
    half = t.to(torch.float32)
    assert path.alpha(half).dtype == torch.float64


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("count", [1000, 100])
@pytest.mark.parametrize(("low", "high"), [(0.00085, 0.012), (1e-4, 0.02)])
def test_vp_table_is_diffusers_table(schedule, count, low, high):
    settings = {"num_train_timesteps": count, "beta_start": low, "beta_end": high, "beta_schedule": schedule}
    theirs = DDIMScheduler(**settings).alphas_cumprod.numpy()
    path = VP(**settings)
    ours = np.array(path.abar)
    if FUSED:
        assert np.array_equal(ours, theirs.astype(np.float64))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)
    at_integers = np.array([path.alpha(float(n)) ** 2 for n in range(count)])
    np.testing.assert_allclose(at_integers, ours, rtol=1e-12)


def test_linspace_is_torch_linspace():
    for start, stop, n in [(0.00085, 0.012, 1000), (1e-4, 0.02, 4000), (0.03, 0.11, 999), (0.1, 0.3, 17)]:
        theirs = torch.linspace(start, stop, n, dtype=torch.float32).numpy()
        ours = _linspace32(start, stop, n)
        assert ours.dtype == np.float32
        assert np.array_equal(ours, theirs) if FUSED else np.allclose(ours, theirs, rtol=1e-6)


def test_vp_rounds_to_nothing_outside_its_table():
    path = VP()
    assert path.time(path.level(0.0)) == 0.0
    assert path.time(path.level(999.0)) == pytest.approx(999.0, abs=1e-9)
    assert path.alpha(999.0) ** 2 == pytest.approx(0.0046602, rel=1e-4)


def test_trig_is_the_flow_path_turned():
    """The time change of the methods' notes: tau = sin / (sin + cos), the same noise level."""
    t = torch.linspace(0.1, 1.4, 7, dtype=torch.float64)
    tau = t.sin() / (t.sin() + t.cos())
    torch.testing.assert_close(RectifiedFlow().time(TrigFlow().level(t)), tau)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_renoise_keeps_the_marginal(path):
    """Noise to s, then from s to t, must equal noise to t: coefficients of x0 and variance agree."""
    t = inside(path, 5)[3:4]
    s = inside(path, 5)[1:2]
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    signal = renoise(path, path.alpha(s)[:, None] * one, s, t, zero)
    from_old = renoise(path, path.sigma(s)[:, None] * one, s, t, zero)
    fresh = renoise(path, zero, s, t, one)
    torch.testing.assert_close(signal[0], path.alpha(t))
    torch.testing.assert_close((from_old**2 + fresh**2)[0], path.sigma(t) ** 2)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_json_round_trip(path):
    data = json.loads(json.dumps(path_to_json(path)))
    assert path_from_json(data) == path
    path.alpha(torch.zeros(1))  # a path that was used is still equal and still writes the same
    assert path_to_json(path) == data


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"kind": "ddpm"}, "path.kind"),
        ({}, "path.kind"),
        ({"kind": "vp", "betas": 3}, "path.betas"),
        ({"kind": "vp", "num_train_timesteps": 10.5}, "path.num_train_timesteps"),
        ({"kind": "vp", "num_train_timesteps": 1}, "path.num_train_timesteps"),
        ({"kind": "vp", "num_train_timesteps": True}, "path.num_train_timesteps"),
        ({"kind": "vp", "beta_start": "0.1"}, "path.beta_start"),
        ({"kind": "vp", "beta_start": 0.5, "beta_end": 0.1}, "path.beta_start"),
        ({"kind": "vp", "beta_schedule": "sigmoid"}, "path.beta_schedule"),
        ({"kind": "vp", "_tables": {}}, "path._tables"),
        ({"kind": "edm", "sigma_min": 90.0}, "path.sigma_min"),
        ({"kind": "edm", "sigma_data": 0.0}, "path.sigma_data"),
        ({"kind": "flow", "start": 1.5}, "path.start"),
        ({"kind": "flow", "start": math.nan}, "path.start"),
        ({"kind": "trig", "sigma_data": -1.0}, "path.sigma_data"),
        ({"kind": "trig", "start": 3.0}, "path.start"),
    ],
)
def test_bad_settings_are_named(data, named):
    with pytest.raises(SpecError, match=named.replace(".", r"\.")):
        path_from_json(data)


def test_every_path_is_tried_here():
    assert {path.kind for path in ALL} == set(PATHS)
