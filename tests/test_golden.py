"""Golden cases: made once by torch, sealed into the bundle, and read back strictly."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.export.golden import TEACHER_STEPS, edge_picture, golden_steps, load_case, make_golden, run_case
from fewstep.models.bundle import load_bundle
from fewstep.models.errors import BundleError
from fewstep.models.spec import Spacing
from fewstep.runtime.engines.torch_engine import TorchEngine
from tiny import copy_bundle


@pytest.fixture(scope="module")
def golden(tiny_lcm, tmp_path_factory):
    return make_golden(load_bundle(copy_bundle(tiny_lcm, tmp_path_factory.mktemp("golden") / "lcm")))


def test_one_case_per_step_count_and_one_with_edges(golden, tiny_lcm):
    cases = load_bundle(golden.root).spec.golden  # sealed: the folder opens with its digests checked
    assert [(c.steps, c.control is None) for c in cases] == [(1, True), (2, True), (4, True), (8, True), (8, False)]
    assert all(case.guidance == golden.spec.guidance.default for case in cases)
    assert golden.weights_digest == tiny_lcm.weights_digest
    for case in cases:
        tensors = load_case(golden, case)
        assert tensors["latents"].shape == (case.steps, 4, 16, 16) and tensors["latents"].dtype == torch.float32
        assert torch.equal(tensors["latents"][-1], tensors["latent"])
        assert tensors["picture"].shape == (32, 32, 3) and tensors["picture"].dtype == torch.uint8
    names = {case.file for case in cases} | {"preview.safetensors"}
    assert {p.name for p in (golden.root / "golden").iterdir()} == names


def test_torch_repeats_its_cases(golden):
    case = golden.spec.golden[2]
    trace = run_case(TorchEngine(golden), golden, case)
    assert torch.allclose(torch.stack(trace.latents), load_case(golden, case)["latents"], atol=1e-6)
    assert np.array_equal(trace.picture, load_case(golden, case)["picture"].numpy())


def test_edges_steer_their_case(golden):
    plain, steered = (load_case(golden, case) for case in golden.spec.golden[-2:])
    assert not torch.allclose(plain["latent"], steered["latent"], atol=1e-3)
    assert np.array_equal(steered["edge"].numpy(), edge_picture(32, 32))


def test_making_them_again_replaces_them(golden, tmp_path):
    bundle = load_bundle(copy_bundle(golden, tmp_path / "again"))
    told = []
    again = make_golden(bundle, prompts=("a cat",), progress=told.append)
    assert {case.prompt for case in again.spec.golden} == {"a cat"}
    assert told == [case.file for case in again.spec.golden]
    assert not torch.equal(
        load_case(again, again.spec.golden[0])["latent"], load_case(golden, golden.spec.golden[0])["latent"]
    )


def test_an_interrupted_making_leaves_the_old_ones(golden, tmp_path, monkeypatch):
    bundle = load_bundle(copy_bundle(golden, tmp_path / "copy"))

    def killed(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        make_golden(bundle, prompts=("a blue ring",))
    assert load_bundle(bundle.root).spec.golden == golden.spec.golden
    assert not list(bundle.root.rglob("*.partial"))


def test_teachers_get_a_short_and_a_long_run(tiny_teacher, tiny_dmd2, tmp_path):
    assert golden_steps(tiny_teacher.spec) == TEACHER_STEPS
    assert golden_steps(tiny_dmd2.spec) == (1, 2, 4, 8)
    many = {n: tuple(float(n - k) for k in range(n)) for n in range(10, 19)}
    assert golden_steps(replace(tiny_dmd2.spec, grids=many)) == (10, 18), "neither of the usual runs"
    assert golden_steps(replace(tiny_teacher.spec, spacing=Spacing(kind="trailing", max_steps=3))) == (1, 2, 3)
    root = copy_bundle(tiny_teacher, tmp_path / "teacher")
    teacher = make_golden(load_bundle(root))
    long = load_case(teacher, teacher.spec.golden[1])
    assert long["latents"].shape[0] == 25 and torch.isfinite(long["latents"]).all()


def test_missing_files_and_tensors_are_named(golden, tmp_path):
    bundle = load_bundle(copy_bundle(golden, tmp_path / "broken"))
    case = bundle.spec.golden[-1]
    path = bundle.root / "golden" / case.file
    tensors = load_file(path)
    del tensors["edge"]
    save_file(tensors, path)
    with pytest.raises(BundleError, match=r"has no tensor 'edge'; make the golden cases anew"):
        load_case(bundle, case)
    shutil.rmtree(bundle.root / "golden")
    with pytest.raises(BundleError, match=r"steps-8-control\.safetensors cannot be read"):
        load_case(bundle, case)


def test_a_folder_that_cannot_be_written(tiny_dmd2, tmp_path):
    root = copy_bundle(tiny_dmd2, tmp_path / "full")
    (root / "golden").write_text("in the way")
    with pytest.raises(BundleError, match="golden cannot be written"):
        make_golden(load_bundle(root))
