"""Manifests of exported engines: they round-trip, and every way in which one can be wrong is refused with a remedy."""

import json
from dataclasses import replace

import pytest

from fewstep.models.bundle import load_bundle
from fewstep.models.files import sha256_of
from fewstep.runtime.engines.manifest import (
    Graph,
    Manifest,
    Parity,
    Port,
    checked_files,
    engine_folder,
    export_command,
    exported_kinds,
    read_manifest,
    write_manifest,
)
from fewstep.runtime.errors import EngineUnavailable
from tiny import copy_bundle


@pytest.fixture
def bundle(tiny_dmd2, tmp_path):
    return load_bundle(copy_bundle(tiny_dmd2, tmp_path / "bundle"))


@pytest.fixture
def manifest(bundle):
    folder = engine_folder(bundle, "onnx")
    folder.mkdir(parents=True)
    (folder / "text.onnx").write_bytes(b"graph")
    (folder / "text.onnx.data").write_bytes(b"weights")
    graph = Graph(
        file="text.onnx",
        sha256=sha256_of(folder / "text.onnx"),
        data_sha256=sha256_of(folder / "text.onnx.data"),
        inputs=(Port(name="ids", dtype="int64", shape=("batch", 24)),),
        outputs=(Port(name="ctx", dtype="float32", shape=("batch", 24, 32)),),
    )
    manifest = Manifest(
        engine="onnx",
        precision="fp32",
        opset=21,
        roles={"text": graph},
        weights_digest=bundle.weights_digest,
        producers={"torch": "2"},
        parity=(Parity(component="text", max_relative_error=1e-7, tolerance=1e-4, ok=True),),
    )
    write_manifest(bundle, manifest)
    return manifest


def edit(bundle, **changes):
    path = engine_folder(bundle, "onnx") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(bundle, manifest):
    assert read_manifest(bundle, "onnx") == manifest
    assert exported_kinds(bundle) == ("onnx",)
    assert checked_files(bundle, manifest) == {"text": engine_folder(bundle, "onnx") / "text.onnx"}


def test_older_manifests_without_the_optional_fields_are_read(bundle, manifest):
    path = engine_folder(bundle, "onnx") / "manifest.json"
    data = json.loads(path.read_text())
    for name in ("build", "executed_on", "costs"):
        del data[name]
    path.write_text(json.dumps(data))
    assert read_manifest(bundle, "onnx") == manifest


def test_what_was_built_and_measured_round_trips(bundle, manifest):
    told = replace(
        manifest, build={"version": "1.7", "roles": {"text": [1, 4]}}, executed_on={"device": "a"}, costs={"text": 0.1}
    )
    path = write_manifest(bundle, told)
    assert read_manifest(bundle, "onnx") == told
    assert sorted(path.parent.glob("manifest*")) == [path]


def test_the_command_that_makes_a_kind(bundle):
    assert export_command(bundle, "torch-compile") == f"fewstep export {bundle.root} --engine torch-compile"
    assert export_command(bundle, "tensorrt-fp16").endswith("--engine tensorrt --precision fp16")


def test_no_engine_says_how_to_make_one(bundle):
    assert exported_kinds(bundle) == ()
    with pytest.raises(EngineUnavailable, match=r"has no openvino engine; run `fewstep export .* --engine openvino`"):
        read_manifest(bundle, "openvino")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "not of version 1"),
        ({"mystery": 1}, "unknown field 'mystery'"),
        ({"roles": {"text": {"file": "text.onnx"}}}, "malformed"),
        ({"roles": [1]}, "malformed"),
        ({"parity": [{"component": "text"}]}, "malformed"),
        ({"build": "yesterday"}, "build is 'yesterday'"),
        ({"executed_on": ["H200"]}, "executed_on is"),
        ({"costs": None}, "costs is None"),
        ({"engine": "openvino"}, "describes the engine 'openvino', not 'onnx'"),
    ],
)
def test_malformed_manifests_are_refused(bundle, manifest, changes, said):
    edit(bundle, **changes)
    with pytest.raises(EngineUnavailable, match=said) as caught:
        read_manifest(bundle, "onnx")
    assert "fewstep export" in str(caught.value)


def test_a_manifest_that_is_not_json(bundle, manifest):
    (engine_folder(bundle, "onnx") / "manifest.json").write_text("{")
    with pytest.raises(EngineUnavailable, match="not JSON"):
        read_manifest(bundle, "onnx")


def test_other_weights_are_refused(bundle, manifest):
    with pytest.raises(EngineUnavailable, match="made from other weights; run `fewstep export"):
        checked_files(bundle, replace(manifest, weights_digest="0" * 64))


@pytest.mark.parametrize("name", ["text.onnx", "text.onnx.data"])
def test_changed_and_missing_files_are_refused(bundle, manifest, name):
    path = engine_folder(bundle, "onnx") / name
    path.write_bytes(b"tampered")
    with pytest.raises(EngineUnavailable, match=rf"{name} changed since it was exported"):
        checked_files(bundle, manifest)
    path.unlink()
    with pytest.raises(EngineUnavailable, match=rf"{name} is missing; run `fewstep export"):
        checked_files(bundle, manifest)


def test_files_outside_the_bundle_are_refused(bundle, manifest):
    outside = replace(manifest.roles["text"], file="../../unet/config.json")
    with pytest.raises(EngineUnavailable, match="lies outside"):
        checked_files(bundle, replace(manifest, roles={"text": outside}))


def test_golden_cases_do_not_change_what_engines_were_made_from(bundle, tiny_dmd2):
    from fewstep.models.bundle import seal_bundle

    (bundle.root / "golden").mkdir()
    (bundle.root / "golden" / "config.json").write_text("{}")
    assert seal_bundle(bundle.root, bundle.name, bundle.spec).weights_digest == tiny_dmd2.weights_digest
    config = bundle.root / "vae" / "config.json"
    config.write_text(config.read_text().replace("1.3", "1.4"))
    assert seal_bundle(bundle.root, bundle.name, bundle.spec).weights_digest != tiny_dmd2.weights_digest
