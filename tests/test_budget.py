"""A stated budget refuses what passes it, and says the numbers of both sides."""

from dataclasses import replace

import pytest

from fewstep.models.spec import QualityRow
from fewstep.runtime.engines.budget import QUALITY, Budget, breaches, quality_parity, with_quality
from fewstep.runtime.engines.manifest import Manifest, Parity, read_manifest, write_manifest
from fewstep.runtime.errors import EngineUnavailable
from fewstep.trainers.pictures.engine_quality import changes, keep_quality
from tiny import copy_bundle

PASSED = Parity(component="decoder", max_relative_error=0.01, tolerance=0.05, ok=True)


def manifest(**settings):
    fixed = {"engine": "onnx-int8", "precision": "int8", "opset": 21, "roles": {}, "producers": {}}
    return Manifest(**{**fixed, "weights_digest": "0" * 64, "parity": (PASSED,), **settings})


def rows(compliance, frechet):
    fixed = {"guidance": 3.0, "diversity": 1.0, "pictures": 128}
    return [QualityRow(steps=n, nfe=n, compliance=compliance, frechet=frechet + n / 10, **fixed) for n in (1, 2)]


def quality(**differing):
    figures = {"compliance": 0.80, "frechet": 4.0, "compliance_change": -0.01, "frechet_change": 0.2}
    return {"pictures": 128, "seed": 0, "steps": {"1": figures, "4": {**figures, **differing}}}


def test_within_budget_is_verified():
    kept = with_quality(manifest(budget={"compliance": 0.02, "frechet": 0.5}), quality())
    assert kept.verified and breaches(kept) == [] and kept.quality["pictures"] == 128
    assert [p.component for p in kept.parity] == ["decoder", QUALITY]
    assert [p.component for p in with_quality(kept, quality()).parity] == ["decoder", QUALITY]


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        (
            {"compliance": 0.71, "compliance_change": -0.1},
            "compliance at 4 steps is 0.71, torch's 0.81: worse by 0.1, allowed 0.02",
        ),
        ({"frechet": 5.0, "frechet_change": 1.2}, "frechet at 4 steps is 5, torch's 3.8: worse by 1.2, allowed 0.5"),
    ],
)  # fmt: skip
def test_beyond_budget_is_refused_with_both_numbers(worse, said):
    refused = with_quality(manifest(budget={"compliance": 0.02, "frechet": 0.5}), quality(**worse))
    assert not refused.verified and breaches(refused) == [said]


def test_better_pictures_are_no_breach():
    assert breaches(with_quality(manifest(budget={"frechet": 0.5}), quality(frechet_change=-3.0))) == []


def test_pictures_that_were_not_measured_do_not_pass():
    unmeasured = manifest(budget={"compliance": 0.02})
    assert not quality_parity(unmeasured)[0].ok and "were not measured" in breaches(unmeasured)[0]
    assert quality_parity(manifest(budget={"error": 0.05})) == ()


def test_quality_alone_verifies_nothing():
    failed = replace(PASSED, ok=False)
    assert not with_quality(manifest(parity=(failed,)), quality()).verified
    assert not with_quality(manifest(parity=()), quality()).verified


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_a_number_above_zero(value):
    with pytest.raises(EngineUnavailable, match=r"budget frechet is .*; it must be a number above 0"):
        Budget(frechet=value)
    assert Budget(error=0.1).stated == {"error": 0.1}


def test_measured_quality_is_kept_beside_torchs(tiny_dmd2, tmp_path):
    from fewstep.models.bundle import load_bundle

    bundle = load_bundle(copy_bundle(tiny_dmd2, tmp_path / "dmd2"))
    write_manifest(bundle, manifest(budget={"compliance": 0.02}))
    assert keep_quality(bundle, "onnx-int8", rows(0.79, 4.0), rows(0.8, 3.9), seed=5) == []
    kept = read_manifest(bundle, "onnx-int8")
    assert kept.verified and kept.quality["seed"] == 5
    assert kept.quality["steps"]["2"] == {
        "compliance": 0.79, "frechet": 4.2, "compliance_change": -0.01, "frechet_change": 0.1,
    }  # fmt: skip
    (said, _) = keep_quality(bundle, "onnx-int8", rows(0.7, 4.0), rows(0.8, 3.9), seed=5)
    assert "compliance at 1 steps is 0.7, torch's 0.8" in said
    assert not read_manifest(bundle, "onnx-int8").verified
    with pytest.raises(ValueError, match="2 steps was held against one of 1"):
        changes(rows(0.7, 4.0)[1:], rows(0.7, 4.0)[:1])
