"""Decays of running averages that change over a run."""

import math

import pytest

from fewstep.trainers.curricula import SquareRoot
from fewstep.trainers.player import PowerDecay, TiedDecay, decay_at


def test_the_target_of_consistency_training_is_tied_to_its_grid():
    """mu(k) = exp(s0 ln mu0 / N(k) - 1): 0.9^2 at two points, near 1 at 151."""
    rule = TiedDecay(0.9, SquareRoot(2, 150))
    assert decay_at(rule, 1, 0.0) == pytest.approx(0.9**2)
    assert decay_at(rule, 1, 1.0) == pytest.approx(math.exp(2 * math.log(0.9) / 150))


def test_a_power_average_forgets_its_start():
    assert decay_at(PowerDecay(6.94), 1, 0.0) == 0.0
    assert decay_at(PowerDecay(6.94), 1000, 0.5) == pytest.approx((1 - 1e-3) ** 7.94)


def test_a_number_warms_up():
    assert decay_at(0.99, 1, 0.0) == pytest.approx(2 / 11) and decay_at(0.99, 10_000, 1.0) == 0.99
