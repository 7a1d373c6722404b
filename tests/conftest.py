"""Guard against testing another checkout, and the tiny bundles most tests share."""

import pathlib
import sys

import pytest

import fewstep.runtime

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for `import tiny`; the repository root itself must stay off the path


def pytest_configure(config: pytest.Config) -> None:
    found = pathlib.Path(fewstep.runtime.__file__).resolve()
    if not found.is_relative_to(ROOT):
        raise pytest.UsageError(f"tests of {ROOT} would import {found}; reinstall with pip install -e .")


@pytest.fixture(scope="session", autouse=True)
def quick_costs():
    """`fewstep verify` measures every engine's calls: for tests that do not look at the figures, twice is enough."""
    from fewstep.runtime.engines import choice

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "REPEATS", 2)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory):
    """What tests build is not remembered as built on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", name="start")
def plane_start():
    """The plane's network that students of tests begin from, with random weights; it does not train."""
    import torch

    from fewstep.models.paths import VP
    from fewstep.trainers.plane.net import PlaneNet

    torch.manual_seed(0)
    return PlaneNet(VP()).requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    from tiny import make_tiny_bundle

    return make_tiny_bundle(tmp_path_factory.mktemp("tiny") / "teacher", kind="teacher")


@pytest.fixture(scope="session")
def tiny_lcm(tmp_path_factory):
    from tiny import make_tiny_bundle

    return make_tiny_bundle(tmp_path_factory.mktemp("tiny") / "lcm", kind="lcm")


@pytest.fixture(scope="session")
def tiny_dmd2(tmp_path_factory):
    from tiny import make_tiny_bundle

    return make_tiny_bundle(tmp_path_factory.mktemp("tiny") / "dmd2", kind="dmd2")


@pytest.fixture(scope="session")
def exported_lcm(tiny_lcm, tmp_path_factory):
    """A copy of `tiny_lcm` with golden cases and an ONNX export of every role. Tests that change it take a copy."""
    pytest.importorskip("onnxscript")
    from fewstep.export.golden import make_golden
    from fewstep.export.onnx import export_onnx
    from fewstep.models.bundle import load_bundle
    from tiny import copy_bundle

    bundle = make_golden(load_bundle(copy_bundle(tiny_lcm, tmp_path_factory.mktemp("exported") / "lcm")))
    export_onnx(bundle)
    return bundle


@pytest.fixture
def short_prompts(monkeypatch):
    """Captions that fit the tiny bundles' 24 tokens."""
    import random

    from fewstep.trainers.pictures import quality, scenes

    rng = random.Random(1)
    claims = [scenes.ObjectClaim(rng.choice(scenes.SHAPES), rng.choice(("red", "blue"))) for _ in range(8)]
    captions = tuple(scenes.Caption(f"{c.colour} {c.shape}", (c,)) for c in claims)
    real = quality.draw_prompts(8).real
    monkeypatch.setattr(quality, "draw_prompts", lambda prompts, seed=0: quality.PromptSet(captions, real, seed))
