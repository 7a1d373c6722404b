"""Curricula of the papers at their golden points."""

import pytest

from fewstep.trainers.parts.curricula import Doubling, Fixed, Geometric, Listed, SquareRoot
from fewstep.trainers.parts.objective import Turn


def at(progress):
    return Turn.of(0, round(progress * 1000), 1000, "student")


def test_square_root_grows_from_s0_to_s1():
    """Song et al. 2023, appendix C: N(0) = s0 and N(K) = s1 + 1 grid points, by the root in between."""
    counts = SquareRoot(2, 150)
    assert counts(at(0.0)) == 2 and counts(at(1.0)) == 151
    assert counts(at(0.25)) == 76  # ceil(sqrt((151^2 - 4) / 4 + 4) - 1) + 1


def test_doubling_holds_eight_equal_stages():
    counts = Doubling(10, 1280)
    assert [counts(at((k + 0.5) / 8)) for k in range(8)] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert counts(at(1.0)) == 1281


def test_geometric_is_a_multiple_throughout():
    counts = Geometric(64, 1000, of=4)
    assert counts(at(0.0)) == 64 and counts(at(1.0)) == 1000
    assert all(counts(at(k / 20)) % 4 == 0 for k in range(21))
    assert counts(at(0.5)) == pytest.approx((64 * 1000) ** 0.5, abs=2)


def test_listed_and_fixed():
    assert [Listed((8, 4, 2, 1))(at(p)) for p in (0.0, 0.3, 0.6, 0.99, 1.0)] == [8, 4, 2, 1, 1]
    assert Fixed(7)(at(0.4)) == 7
