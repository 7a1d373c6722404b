"""The denoiser contract on networks whose answer is known."""

import pytest
import torch

from fewstep.models.denoiser import Denoiser, expand, guide, renoise, times
from fewstep.models.errors import SpecError
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.models.predictions import target

CASES = [("eps", VP()), ("v", VP()), ("x0", EDM()), ("flow", RectifiedFlow()), ("trig", TrigFlow(sigma_data=0.5))]
IDS = [f"{kind}-{path.kind}" for kind, path in CASES]


def known(kind, path, shape=(4, 2, 3, 3)):
    """A denoiser that answers one fixed pair (x0, eps), a time per sample, and the noisy sample."""
    x0, eps = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.linspace(0.2, 0.8, shape[0], dtype=torch.float64) * path.start
    net = Denoiser(lambda x, t, cond: target(kind, path, expand(t, x), x0, eps), path, kind)
    return net, x0, eps, t, net.mix(x0, eps, t)


@pytest.mark.parametrize(("kind", "path"), CASES, ids=IDS)
@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (3, 1), (2, 2, 2, 2, 2)])
def test_estimates(kind, path, shape):
    net, x0, eps, t, x = known(kind, path, shape)
    torch.testing.assert_close(net.x0(x, t, {}), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.eps(x, t, {}), eps, rtol=1e-9, atol=1e-9)
    velocity = expand(path.dalpha(t), x) * x0 + expand(path.dsigma(t), x) * eps
    torch.testing.assert_close(net.velocity(x, t, {}), velocity, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "path"), CASES, ids=IDS)
def test_jump_moves_along_the_pair(kind, path):
    net, x0, eps, t, x = known(kind, path)
    s = 0.5 * t
    torch.testing.assert_close(net.jump(x, t, s, {}), net.mix(x0, eps, s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.jump(x, t, t, {}), x, rtol=1e-9, atol=1e-9)


def test_jump_is_euler_on_flow_and_edm():
    for kind, path in (("flow", RectifiedFlow()), ("x0", EDM())):
        net, _, _, t, x = known(kind, path)
        s = 0.7 * t
        euler = x + expand(s - t, x) * net.velocity(x, t, {})
        torch.testing.assert_close(net.jump(x, t, s, {}), euler, rtol=1e-9, atol=1e-9)


def test_guidance_convention():
    uncond, cond = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]])
    assert guide(uncond, cond, 1.0).tolist() == [[3.0], [3.0]], "w = 1 is no guidance"
    assert guide(uncond, cond, 0.0).tolist() == [[1.0], [1.0]], "w = 0 is unconditional"
    assert guide(uncond, cond, torch.tensor([1.0, 2.5])).tolist() == [[3.0], [6.0]]
    omega = 4.0  # the LCM paper's convention: c + omega (c - u)
    assert torch.equal(guide(uncond, cond, 1.0 + omega), cond + omega * (cond - uncond))


def test_guided_evaluates_each_condition_once():
    seen = []

    def net(x, t, cond):
        seen.append(cond["ctx"].item())
        return torch.full_like(x, cond["ctx"].item())

    guided = Denoiser(net, VP(), "eps").guided({"ctx": torch.tensor(1.0)}, torch.tensor([2.0, 3.0]))
    raw = guided.raw(torch.zeros(2, 1), times(10.0, torch.zeros(2, 1)), {"ctx": torch.tensor(5.0)})
    assert raw.flatten().tolist() == [9.0, 13.0]
    assert seen == [1.0, 5.0]


def test_guiding_any_prediction_is_the_same_guidance():
    """Guidance is linear, so guiding F equals guiding x0."""
    path = VP()
    t, x = torch.tensor([400.0, 20.0], dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    low, high = torch.tensor([0.2, 0.7], dtype=torch.float64)
    wanted = guide(low * x, high * x, 3.0)
    for kind in ("eps", "v", "x0"):

        def net(x, t, cond, kind=kind):
            x0 = cond["ctx"] * x
            a, s = expand(path.alpha(t), x), expand(path.sigma(t), x)
            return target(kind, path, expand(t, x), x0, (x - a * x0) / s)

        guided = Denoiser(net, path, kind).guided({"ctx": low}, 3.0)
        torch.testing.assert_close(guided.x0(x, t, {"ctx": high}), wanted, rtol=1e-9, atol=1e-9)


def test_dtype_of_the_sample_is_kept():
    net, _, _, t, x = known("v", VP())
    half = Denoiser(lambda x, t, cond: x, VP(), "v")
    assert half.x0(x.float(), t, {}).dtype == torch.float32
    assert half.jump(x.bfloat16(), t, 0.5 * t, {}).dtype == torch.bfloat16
    assert net.x0(x, t, {}).dtype == torch.float64
    assert times(3.0, x).dtype == torch.float64 and times(3.0, x).shape == (4,)


def test_renoise_without_distance_is_identity():
    x, t = torch.randn(2, 3), torch.tensor([100.0, 900.0])
    torch.testing.assert_close(renoise(VP(), x, t, t, torch.ones_like(x)), x)


def test_prediction_must_fit_the_path():
    with pytest.raises(SpecError, match="'flow'"):
        Denoiser(lambda x, t, cond: x, VP(), "flow")
