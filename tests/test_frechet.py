"""The Frechet distance is the closed form on Gaussians, and grows as pictures get worse."""

import random

import numpy as np
import pytest
import torch
from PIL import ImageFilter

from fewstep.trainers.pictures import scenes
from fewstep.trainers.pictures.features import extract, load_features
from fewstep.trainers.pictures.frechet import frechet_distance


def test_closed_form_on_gaussians():
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    a = torch.randn(40_000, 6, dtype=torch.float64)
    made = 1.5 + a @ root
    # the sets' own moments, so that no sampling error is left: N(m, S) against N(m', root' S root)
    mean_a, mean_b, cov_a, cov_b = a.mean(0), made.mean(0), torch.cov(a.T), torch.cov(made.T)
    values = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    exact = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * values
    assert frechet_distance(a, made) == pytest.approx(float(exact), rel=1e-6)
    # one dimension is plain arithmetic: (m - m')^2 + (s - s')^2
    line = torch.tensor([[-1.0], [1.0]])
    assert frechet_distance(line, 3 * line + 2) == pytest.approx(4 + (2**0.5 * 2) ** 2, rel=1e-6)


def test_no_distance_to_itself_and_symmetric():
    torch.manual_seed(1)
    a, b = torch.randn(300, 16), torch.randn(200, 16) * 2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


@pytest.fixture(scope="module")
def renders():
    rng = random.Random(31)
    return [scenes.render(scenes.sample(rng).scene) for _ in range(600)]


def test_worse_pictures_are_farther_from_real_ones(renders):
    net, wear = load_features(), np.random.default_rng(0)
    real = extract(net, np.stack([np.asarray(r) for r in renders[:300]]))

    def distance(change) -> float:
        return frechet_distance(real, extract(net, np.stack([change(r) for r in renders[300:]])))

    def noisy(std: float):
        return lambda r: (np.asarray(r) + wear.normal(0, std, (64, 64, 3))).round().clip(0, 255).astype(np.uint8)

    clean = distance(np.asarray)
    blurred = [distance(lambda r, b=blur: np.asarray(r.filter(ImageFilter.GaussianBlur(b)))) for blur in (0.7, 1.5, 3)]
    noise = [distance(noisy(std)) for std in (8, 20, 60)]
    assert clean < blurred[0] < blurred[1] < blurred[2]
    assert clean < noise[0] < noise[1] < noise[2]
    assert blurred[1] > 2 * clean
    assert noise[2] > 2 * clean
    assert distance(lambda r: np.asarray(renders[300])) > 4 * clean  # one picture for everything
    assert distance(lambda r: np.asarray(r.convert("L").convert("RGB"))) > 4 * clean  # no colours


@pytest.mark.parametrize(("a", "b"), [((1, 4), (9, 4)), ((9, 4), (9, 5)), ((9, 4, 1), (9, 4))])
def test_sets_that_have_no_distance_are_refused(a, b):
    with pytest.raises(ValueError, match=r"distance needs two|one width"):
        frechet_distance(torch.zeros(a), torch.zeros(b))
