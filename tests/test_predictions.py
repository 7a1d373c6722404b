"""Predictions: five ways to say the same thing, and back."""

import math

import pytest
import torch

from fewstep.models.denoiser import expand
from fewstep.models.errors import SpecError
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.models.predictions import PREDICTIONS, check_prediction, estimates, target

VALID = [
    *((kind, path) for kind in ("eps", "x0") for path in (VP(), EDM(), RectifiedFlow(), TrigFlow(sigma_data=0.5))),
    ("v", VP()),
    ("flow", RectifiedFlow()),
    ("trig", TrigFlow()),
    ("trig", TrigFlow(sigma_data=0.5)),
]
IDS = [f"{kind}-{path.kind}" for kind, path in VALID]


def pair(path):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64) * path.start
    x = expand(path.alpha(t), x0) * x0 + expand(path.sigma(t), x0) * eps
    return x0, eps, t, x


@pytest.mark.parametrize(("kind", "path"), VALID, ids=IDS)
def test_estimates_undo_target(kind, path):
    x0, eps, t, x = pair(path)
    f = target(kind, path, expand(t, x), x0, eps)
    c = estimates(kind, path, t)
    torch.testing.assert_close(expand(c.x0_x, x) * x + expand(c.x0_f, x) * f, x0, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(expand(c.eps_x, x) * x + expand(c.eps_f, x) * f, eps, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("kind", "path"), VALID, ids=IDS)
def test_any_output_explains_the_sample(kind, path):
    """alpha x0 + sigma eps = x whatever the network says, so a step to the same time changes nothing."""
    _, _, t, x = pair(path)
    f = torch.full_like(x, 1.7)
    c = estimates(kind, path, t)
    x0 = expand(c.x0_x, x) * x + expand(c.x0_f, x) * f
    eps = expand(c.eps_x, x) * x + expand(c.eps_f, x) * f
    torch.testing.assert_close(expand(path.alpha(t), x) * x0 + expand(path.sigma(t), x) * eps, x, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("kind", "path"), VALID, ids=IDS)
def test_float_time_gives_the_same_coefficients(kind, path):
    t = 0.4 * path.start
    tensor = estimates(kind, path, torch.tensor([t], dtype=torch.float64))
    number = estimates(kind, path, t)
    for name in ("x0_x", "x0_f", "eps_x", "eps_f"):
        assert isinstance(getattr(number, name), float)
        assert getattr(tensor, name).item() == pytest.approx(getattr(number, name), rel=1e-13, abs=1e-15)


def test_velocity_targets_are_time_derivatives():
    """flow and trig predict dx/dt of one pair; v predicts it in the angle of the VP path."""
    h = 1e-6
    for kind, path in (("flow", RectifiedFlow()), ("trig", TrigFlow(sigma_data=0.5))):
        x0, eps, t, _ = pair(path)
        t = expand(t, x0)
        measured = sum(sign * (path.alpha(t + sign * h) * x0 + path.sigma(t + sign * h) * eps) for sign in (1, -1))
        torch.testing.assert_close(target(kind, path, t, x0, eps), measured / (2 * h), rtol=1e-6, atol=1e-7)
    path = VP()
    x0, eps, t, _ = pair(path)
    angle = torch.atan2(path.sigma(t), path.alpha(t))
    turned = -expand(angle.sin(), x0) * x0 + expand(angle.cos(), x0) * eps
    torch.testing.assert_close(target("v", path, expand(t, x0), x0, eps), turned)


def test_hand_computed_values():
    trig = estimates("trig", TrigFlow(sigma_data=0.5), 0.3)
    assert (trig.x0_x, trig.x0_f) == (math.cos(0.3), -math.sin(0.3))
    assert (trig.eps_x, trig.eps_f) == (pytest.approx(math.sin(0.3) / 0.5), math.cos(0.3) / 0.5)
    flow = estimates("flow", RectifiedFlow(), 0.25)
    assert (flow.x0_x, flow.x0_f, flow.eps_x, flow.eps_f) == (1.0, -0.25, 1.0, 0.75)


@pytest.mark.parametrize("kind", ["v", "flow", "trig"])
def test_predictions_belong_to_their_paths(kind):
    for path in (VP(), EDM(), RectifiedFlow(), TrigFlow()):
        if (kind, path.kind) in {("v", "vp"), ("flow", "flow"), ("trig", "trig")}:
            check_prediction(kind, path)
        else:
            with pytest.raises(SpecError, match=repr(kind)):
                estimates(kind, path, 0.3)


def test_unknown_prediction_is_named():
    with pytest.raises(SpecError, match="'epsilon'"):
        target("epsilon", VP(), 3.0, 0.0, 0.0)
    assert {kind for kind, _ in VALID} == set(PREDICTIONS)
