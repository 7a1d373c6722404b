"""Diversity is 1 for the data itself, 0 for one picture, and between for less than the data's spread."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep.trainers.pictures import scenes
from fewstep.trainers.pictures.diversity import diversity, spread
from fewstep.trainers.pictures.features import extract, load_features


def test_spread_is_the_mean_distance_of_pairs():
    features = torch.tensor([[[0.0, 0], [3, 4], [0, 0]], [[1.0, 1], [1, 1], [1, 1]]])
    assert spread(features) == pytest.approx((5 + 5 + 0) / 3 / 2)


@pytest.mark.parametrize("shape", [(4, 1, 8), (4, 8)])
def test_one_seed_has_no_spread(shape):
    with pytest.raises(ValueError, match="at least two seeds"):
        spread(torch.zeros(shape))


@pytest.fixture(scope="module")
def captions():
    rng = random.Random(7)
    return [scenes.sample(rng).caption for _ in range(40)]


def drawn(captions, rng: random.Random, nudge: float | None = None) -> torch.Tensor:
    """Features [prompts, 4, 64] of four scenes per caption, or of one whose objects are moved by `nudge` pixels."""
    pictures = []
    for caption in captions:
        scene = scenes.sample_like(caption, rng)
        for _ in range(4):
            if nudge is None:
                scene = scenes.sample_like(caption, rng)
                moved = scene
            else:
                objects = tuple(replace(o, x=o.x + rng.uniform(-nudge, nudge)) for o in scene.objects)
                moved = replace(scene, objects=objects)
            pictures.append(np.asarray(scenes.render(moved)))
    return extract(load_features(), np.stack(pictures)).reshape(len(captions), 4, -1)


def test_real_scenes_against_real_scenes(captions):
    real = drawn(captions, random.Random(1))
    assert diversity(drawn(captions, random.Random(2)), real) == pytest.approx(1, abs=0.1)
    assert diversity(real[:, :1].expand(-1, 4, -1), real) == pytest.approx(0, abs=1e-6)


def test_a_model_that_only_nudges_is_less_diverse(captions):
    real = drawn(captions, random.Random(1))
    nudged = [diversity(drawn(captions, random.Random(3), nudge), real) for nudge in (0.3, 1.5, 4.0)]
    assert 0 < nudged[0] < nudged[1] < nudged[2] < 0.9
