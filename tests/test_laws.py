"""Time laws of consistency training: golden values of the papers, on every path."""

import math

import pytest
import torch

from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.trainers.parts.curricula import Fixed
from fewstep.trainers.parts.laws import (
    AnyTwo,
    BetaTimes,
    KarrasPairs,
    LogitNormal,
    LogNormal,
    MappedPairs,
    Neighbours,
    SortedPairs,
    WholeWay,
    at_levels,
    levels,
)  # fmt: skip
from fewstep.trainers.parts.objective import Turn

PATHS = (VP(), EDM(), RectifiedFlow(), TrigFlow())


def turn(step=0):
    return Turn.of(0, step, 100, "student")


def test_karras_levels_of_edm():
    """Karras et al. 2022: sigma_i of N = 40 from 0.002 to 80; consistency models' two-step time is index 22 of it."""
    table = levels(EDM(), 40)
    assert table[0] == pytest.approx(0.002) and table[-1] == pytest.approx(80.0)
    wanted = (80 ** (1 / 7) + 22 / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert float(table.flip(0)[22]) == pytest.approx(wanted)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
def test_every_law_stays_on_the_path_and_repeats(path):
    laws = (LogNormal(), LogitNormal(0.2, 1.0), BetaTimes(0.8, 1.0))
    for law in laws:
        t = law.draw(path, 2000, turn())
        assert t.dtype == torch.float64 and bool(((t >= path.end) & (t <= path.start)).all())
        assert torch.equal(t, law.draw(path, 2000, turn()))
    pairs = (
        KarrasPairs(Fixed(20), std=2.0), MappedPairs(LogNormal(), Fixed(3)), SortedPairs(LogNormal()),
        Neighbours(Fixed(20)), WholeWay(), AnyTwo(18),
    )  # fmt: skip
    for pair in pairs:
        t, s = pair.draw(path, 2000, turn())
        assert bool((s <= t).all()) and bool((t <= path.start).all()) and float((t > s).double().mean()) > 0.95


def test_log_normal_has_its_moments_within_the_path():
    drawn = EDM().level(LogNormal(-0.5, 0.7).draw(EDM(), 20000, turn())).log()
    assert float(drawn.mean()) == pytest.approx(-0.5, abs=0.02) and float(drawn.std()) == pytest.approx(0.7, abs=0.02)


def test_logit_normal_is_that_of_flow_times():
    drawn = LogitNormal(0.3, 0.8).draw(RectifiedFlow(), 20000, turn())
    assert float(torch.logit(drawn).mean()) == pytest.approx(0.3, abs=0.03)


def test_beta_has_its_mean():
    drawn = BetaTimes(2.0, 1.0).draw(RectifiedFlow(), 20000, turn())
    assert float(drawn.mean()) == pytest.approx(2 / 3, abs=0.01)


def test_masses_of_cells_are_those_of_the_log_normal():
    """iCT, eq. 10, between levels; the end cells take what lies beyond."""
    law = KarrasPairs(Fixed(12), mean=-1.1, std=2.0)
    table = levels(EDM(), 12)
    masses = law.masses(table)
    drawn = (-1.1 + 2.0 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))).exp().double()
    counted = torch.histogram(drawn.clamp(float(table[0]), float(table[-1]) - 1e-6), table).hist / 200_000
    assert (masses - counted).abs().max() < 0.005 and float(masses.sum()) == pytest.approx(1.0)


def test_ect_map_at_the_points_of_its_code():
    """At stage 0 t = 0.1 falls to 0; at stage 7 t = 10 gives 9.961 (b = 1, k = 8, data of deviation 0.5)."""
    law = MappedPairs(LogNormal(), Fixed(0), scale=1.0)
    assert float(law.below(torch.tensor([0.1]), 0)) == 0.0
    assert float(law.below(torch.tensor([10.0]), 7)) == pytest.approx(9.961, abs=1e-3)


def test_level_0_is_clean_and_beyond_the_start_is_the_start():
    t = at_levels(VP(), torch.tensor([0.0, 1.0, 1e6], dtype=torch.float64))
    assert t[0] == -math.inf and VP().level(t[1]) == pytest.approx(1.0) and t[2] == 999.0


def test_share_of_equal_pairs():
    t, s = SortedPairs(LogNormal(), equal=0.75).draw(VP(), 8000, turn())
    assert float((t == s).double().mean()) == pytest.approx(0.75, abs=0.03)
