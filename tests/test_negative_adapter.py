"""SpeedUpNet's adapters: what a fresh one says, what each row hears, how they are kept and refused."""

import pytest
import torch

from fewstep.models.altered import load_altered
from fewstep.models.errors import BundleError
from fewstep.models.negative_adapter import FIELD, add_negative, avoids, is_negative_adapter
from fewstep.models.net_negative import Negative, NegativeDenoiser
from fewstep.models.networks import DenoiserNet
from fewstep.trainers.networks.avoided import with_negative

X, T = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([999.0, 500.0, 20.0])
CTX, AWAY = (torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
SUN = Negative(method="sun")


@pytest.fixture(scope="module")
def plain(tiny_teacher):
    return tiny_teacher.load("unet").eval()


@pytest.fixture(scope="module")
def adapted(tiny_teacher):
    return with_negative(tiny_teacher, tiny_teacher.load("unet")).eval()


def heard(unet, ctx=CTX, away=AWAY, scale=1.0, rows=slice(None)):
    with torch.no_grad():
        return NegativeDenoiser(unet, SUN)(X[rows], T[rows], ctx[rows], away[rows], torch.full((3,), scale)[rows])


def test_a_fresh_adapter_that_avoids_the_prompt_itself_changes_nothing(plain, adapted):
    with torch.no_grad():
        wanted = DenoiserNet(plain)(X, T, CTX)
    torch.testing.assert_close(heard(adapted, away=CTX), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(heard(adapted, scale=0.0), wanted, atol=1e-5, rtol=1e-5)
    assert (heard(adapted) - wanted).abs().max() > 1e-3


def test_no_other_prompt_means_the_empty_one(tiny_teacher, adapted):
    assert adapted.config[FIELD] == 24 == adapted.avoided.shape[0]
    with torch.no_grad():
        found = DenoiserNet(adapted)(X, T, CTX)
    torch.testing.assert_close(found, heard(adapted, away=adapted.avoided.expand(3, -1, -1)))
    assert (found - heard(adapted)).abs().max() > 1e-3


def test_a_row_does_not_hear_its_neighbours(adapted):
    alone = heard(adapted, rows=slice(1, 2))
    torch.testing.assert_close(alone, heard(adapted)[1:2], atol=1e-5, rtol=1e-5)
    louder = torch.cat([10.0 * AWAY[:1], AWAY[1:]])
    torch.testing.assert_close(heard(adapted, away=louder)[1:], heard(adapted)[1:], atol=1e-5, rtol=1e-5)


def test_what_it_reads_is_as_long_as_what_the_prompt_says(adapted):
    """Values ten times as large are brought back to the size of the plain attention."""
    with torch.no_grad():
        before = heard(adapted)
        kept = {n: p.clone() for n, p in adapted.named_parameters() if n.endswith(".v.weight")}
        for name in kept:
            adapted.get_parameter(name).mul_(10.0)
        found = heard(adapted)
        for name, weight in kept.items():
            adapted.get_parameter(name).copy_(weight)
    assert kept and all(is_negative_adapter(name) for name in kept)
    torch.testing.assert_close(found, before, atol=1e-4, rtol=1e-4)


def test_it_is_kept_whole(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    config = dict(adapted.config)
    again = load_altered(type(adapted), tmp_path, config)
    assert avoids(again)
    torch.testing.assert_close(heard(again), heard(adapted))


def test_what_does_not_fit_is_refused(tiny_teacher, plain, adapted):
    with pytest.raises(BundleError, match="must be the number of tokens"):
        add_negative(tiny_teacher.load("unet"), 0)
    with pytest.raises(BundleError, match="adapted already"):
        add_negative(with_negative(tiny_teacher, tiny_teacher.load("unet")), 24)
    with pytest.raises(BundleError, match="'sun', and this U-Net has no negative adapters"):
        NegativeDenoiser(plain, SUN)
    with pytest.raises(BundleError, match="'nag', and this U-Net has negative adapters"):
        NegativeDenoiser(adapted, Negative(method="nag"))
