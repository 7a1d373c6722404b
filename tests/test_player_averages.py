"""Decays of running averages that change over a run, and a fake score that merges with its student."""

import math

import pytest
import torch
from torch import nn

from fewstep.trainers.errors import RecipeError
from fewstep.trainers.loop.player import Player, PlayerSettings, PowerDecay, TiedDecay, decay_at
from fewstep.trainers.parts.curricula import SquareRoot


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


def test_a_player_merges_with_the_one_it_follows_and_with_nobody_else():
    student, fake = Player("student", nn.Linear(2, 2), PlayerSettings()), nn.Module()
    fake.unet, fake.head = nn.Linear(2, 2), nn.Linear(2, 1)
    follower = Player("fake", fake, PlayerSettings(merge={"student": 0.75}), fake.unet)
    before, head = fake.unet.weight.detach().clone(), fake.head.weight.detach().clone()
    student.follow(follower)
    follower.follow(student)
    assert torch.allclose(fake.unet.weight, 0.75 * before + 0.25 * student.module.weight)
    assert torch.equal(fake.head.weight, head) and not torch.equal(student.module.weight, fake.unet.weight)


def test_players_of_two_shapes_do_not_merge():
    follower = Player("fake", nn.Linear(2, 3), PlayerSettings(merge={"student": 0.9}))
    with pytest.raises(RecipeError, match=r"'fake' merges with 'student'.*leave merge out"):
        follower.follow(Player("student", nn.Linear(2, 2), PlayerSettings()))
