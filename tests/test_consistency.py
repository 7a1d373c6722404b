"""The parts of consistency methods and of every ODE step: pairs, sources, guidance in one call, jumps, distances."""

import pytest
import torch

from fewstep.models.analytic import exact, mixture
from fewstep.models.denoiser import Denoiser
from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.models.spec import Boundary
from fewstep.trainers.parts.curricula import Fixed
from fewstep.trainers.parts.distances import PseudoHuber, SamplePseudoHuber, Squared, snr, snr_plus_one, truncated_snr
from fewstep.trainers.parts.jumps import DdimJump, LcmJump, ToClean
from fewstep.trainers.parts.laws import KarrasPairs
from fewstep.trainers.parts.objective import Batch, Turn
from fewstep.trainers.parts.times import GridPairs, UniformScale, UniformTimes, clean
from fewstep.trainers.parts.transitions import NoisedData, ddim_chain, guided, noised

PATHS = [(VP(), "v"), (EDM(), "x0"), (RectifiedFlow(), "flow"), (TrigFlow(), "trig")]
DATA = mixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), torch.tensor([0.3, 0.5]), torch.tensor([1.0, 2.0]))


def turn(step=0):
    return Turn.of(0, step, 100, "student")


def test_lcm_pairs_are_twenty_apart():
    t, s = GridPairs(50).draw(VP(), 4000, turn())
    assert set(t.tolist()) == {20.0 * (i + 1) - 1 for i in range(50)}
    assert torch.equal(s, (t - 20).clamp(min=0))
    assert (t == 19).sum() > 20 and (s[t == 19] == 0).all()


@pytest.mark.parametrize("path", [path for path, _ in PATHS], ids=lambda path: path.kind)
def test_pairs_that_land_on_clean_data_differ_in_the_lowest_alone(path):
    """There the aim is the step's own landing, not what the network says of the path's end."""
    for plain, landing in (
        (GridPairs(50, skip=3), GridPairs(50, skip=3, to_clean=True)),
        (KarrasPairs(Fixed(20)), KarrasPairs(Fixed(20), to_clean=True)),
    ):
        (t, s), (t_again, landed) = plain.draw(path, 2000, turn()), landing.draw(path, 2000, turn())
        lowest = s == s.min()
        assert torch.equal(t, t_again) and 0 < lowest.sum() < 2000 and torch.equal(s[~lowest], landed[~lowest])
        assert (landed[lowest] == clean(path)).all()


@pytest.mark.parametrize(("path", "prediction"), PATHS)
def test_guidance_in_one_call_equals_two(path, prediction):
    calls = []
    teacher = exact(DATA, path, prediction)

    def counted(x, t, cond):
        calls.append(len(x))
        return teacher.net(x, t, cond)

    x, t = torch.randn(5, 2, dtype=torch.float64), torch.full((5,), 0.4 * path.start, dtype=torch.float64)
    cond, uncond = {"ctx": torch.ones(5, 1), "extra": torch.ones(5, 3)}, {"ctx": torch.zeros(5, 1)}
    w = torch.linspace(1.0, 5.0, 5, dtype=torch.float64)
    once = guided(Denoiser(counted, path, prediction), uncond, w)
    assert torch.allclose(once.x0(x, t, cond), teacher.guided(uncond, w).x0(x, t, cond), atol=1e-12)
    assert calls == [10]
    assert torch.allclose(once.x0(x, t, cond)[0], teacher.x0(x, t, cond)[0])  # w = 1 is the condition alone


@pytest.mark.parametrize(("path", "prediction"), PATHS)
def test_clean_data_has_no_noise_left(path, prediction):
    end = torch.full((3,), clean(path), dtype=torch.float64)
    assert torch.equal(path.alpha(end), torch.ones(3, dtype=torch.float64))
    assert torch.equal(path.sigma(end), torch.zeros(3, dtype=torch.float64))
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.full((3,), path.start / 2, dtype=torch.float64)
    teacher = exact(DATA, path, prediction)
    cond = {"ctx": torch.zeros(3, 1)}
    assert torch.allclose(ddim_chain(teacher, x, (t, end), cond), teacher.x0(x, t, cond), atol=1e-12)


def test_samples_at_the_start_are_noise_alone():
    path = VP()
    batch = Batch(torch.full((4, 3), 10.0), {}, {})
    t = torch.tensor([999.0, 979.0, 999.0, 19.0], dtype=torch.float64)
    x = NoisedData(pure_at_start=True).draw(path, batch, t, turn())
    noise = turn().noise(batch.x0)
    assert torch.equal(x[[0, 2]], noise[[0, 2]])
    assert torch.allclose(x[[1, 3]], noised(path, batch.x0, t, noise)[[1, 3]])
    leaky = NoisedData(pure_at_start=False).draw(path, batch, t, turn())
    assert (leaky[0] - noise[0]).abs().mean() > 0.5  # alpha(999) = 0.068 of data worth 10


def test_boundary_of_jumps():
    path, x = VP(), torch.randn(3, 2, 4, 4)
    wild = Denoiser(lambda x, t, cond: torch.full_like(x, 7.0), path, "v")
    zero, late = torch.zeros(3, dtype=torch.float64), torch.full((3,), 499.0, dtype=torch.float64)
    assert torch.equal(LcmJump()(wild, x, zero, zero, {}), x)
    scaled = 10.0 * 499.0
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
    expected = skip * x + out * wild.x0(x, late, {})
    assert torch.allclose(LcmJump(Boundary())(wild, x, late, zero, {}), expected)
    assert torch.allclose(DdimJump()(wild, x, late, late, {}), x, atol=1e-5)
    assert torch.equal(ToClean()(wild, x, late, zero, {}), wild.x0(x, late, {}))


def test_distances_by_hand():
    a, b = torch.tensor([[[3.0], [4.0]]]), torch.zeros(1, 2, 1)
    assert Squared()(a, b).tolist() == [12.5]
    assert SamplePseudoHuber(c=12.0)(a, b).tolist() == [1.0]
    assert PseudoHuber(c=1e-6)(a, b).tolist() == pytest.approx([3.5], abs=1e-4)
    assert PseudoHuber(0.1)(a, a).tolist() == [0.0]


def test_weights_by_hand():
    path, t = RectifiedFlow(), torch.tensor([0.2, 0.75], dtype=torch.float64)
    assert snr(path, t).tolist() == pytest.approx([16.0, 1 / 9])
    assert snr_plus_one(path, t).tolist() == pytest.approx([17.0, 10 / 9])
    assert truncated_snr(path, t).tolist() == pytest.approx([16.0, 1.0])


def test_drawn_times_and_scales_keep_their_range():
    t = UniformTimes(0.02, 0.98).draw(VP(), 5000, turn())
    assert t.min() >= 20 and t.max() <= 979 and torch.equal(t, t.floor()) and t.max() > 960 and t.min() < 40
    flow = UniformTimes(0.1, 0.5).draw(RectifiedFlow(), 1000, turn())
    assert flow.min() >= 0.1 and flow.max() < 0.5
    w = UniformScale(1.5, 6.0).draw(1000, turn())
    assert 1.5 <= w.min() < 1.6 and 5.9 < w.max() < 6.0
    assert torch.equal(UniformScale(3.0, 3.0).draw(2, turn()), torch.tensor([3.0, 3.0], dtype=torch.float64))
