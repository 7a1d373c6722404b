"""`fewstep verify`: sound engines pass and are marked, tampered ones fail with exit code 1."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from fewstep.export import commands
from fewstep.export.parity import LOST, SAME, apart, peak_error, relative_error
from fewstep.export.verify import verify
from fewstep.models.bundle import load_bundle
from fewstep.models.files import sha256_of
from fewstep.runtime.engines.manifest import engine_folder, read_manifest, write_manifest
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.errors import EngineUnavailable
from tiny import copy_bundle

pytest.importorskip("onnxruntime")
ROLES = ["text", "denoiser", "denoiser+control", "controlnet", "decoder", "encoder"]
CASES = [f"golden:steps-{name}" for name in ("1", "2", "4", "8", "8-control")]


@pytest.fixture
def bundle(exported_lcm, tmp_path):
    return load_bundle(copy_bundle(exported_lcm, tmp_path / "lcm"))


def tamper(bundle, role="denoiser", *, adopt):
    """Move one weight of a graph by a tenth of its size; `adopt` makes the manifest's digest follow."""
    import onnx

    manifest = read_manifest(bundle, "onnx")
    path = engine_folder(bundle, "onnx") / manifest.roles[role].file
    proto = onnx.load(path)
    weights = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(weights).copy()
    values.flat[values.size // 2 :] *= 1.1
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    path.write_bytes(proto.SerializeToString())
    if adopt:
        graph = replace(manifest.roles[role], sha256=sha256_of(path))
        write_manifest(bundle, replace(manifest, roles={**manifest.roles, role: graph}, verified=True))


def test_a_sound_engine_passes_and_is_marked(bundle, capsys):
    assert not read_manifest(bundle, "onnx").verified
    assert open_engine(bundle).name == "torch"
    assert commands.verify([str(bundle.root), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    rows = {(row["engine"], row["component"]): row for row in report["engines"]}
    assert [c for e, c in rows if e == "onnx"] == ROLES + CASES
    assert [c for e, c in rows if e == "torch"] == CASES
    for row in rows.values():
        assert row["ok"] and 0 <= row["max_relative_error"] <= row["tolerance"] <= 1e-4
    assert len(rows["onnx", "golden:steps-8"]["drift"]) == 8
    assert rows["onnx", "golden:steps-8"]["picture_max_difference"] <= 1
    manifest = read_manifest(bundle, "onnx")
    assert manifest.verified and [p.component for p in manifest.parity] == ROLES + CASES
    assert open_engine(bundle).name == "onnx"


def test_tampered_weights_fail_though_the_digest_agrees(bundle, capsys):
    tamper(bundle, adopt=True)
    assert commands.verify([str(bundle.root)]) == 1
    out = capsys.readouterr().out
    failed = [line.split()[1] for line in out.splitlines() if line.startswith("onnx") and " FAIL" in line]
    assert failed == ["denoiser", *CASES[:-1]] and "tiny-lcm: NOT equal" in out
    assert not read_manifest(bundle, "onnx").verified
    assert open_engine(bundle).name == "torch"


def test_a_changed_file_is_not_even_run(bundle):
    tamper(bundle, "text", adopt=False)
    report = verify(bundle, kinds=("onnx",))
    (row,) = [row for row in report.engines if row.engine == "onnx"]
    assert not report.ok and row.component == "open" and row.max_relative_error is None
    assert "text.onnx changed since it was exported" in row.note and "fewstep export" in row.note
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["ok"] is False


def test_torch_itself_is_held_to_the_golden_cases(bundle):
    wrong = replace(bundle.spec.golden[0], seed=99)
    bundle.spec = replace(bundle.spec, golden=(wrong,))
    report = verify(bundle, kinds=())
    assert not report.ok and report.engines[0].engine == "torch" and report.engines[0].max_relative_error > 1e-2


def test_nothing_to_verify(tiny_dmd2, tmp_path):
    with pytest.raises(EngineUnavailable, match="neither engines nor golden cases; run `fewstep export"):
        verify(load_bundle(copy_bundle(tiny_dmd2, tmp_path / "plain")))


def test_export_command_makes_golden_cases_and_checks_torch(tiny_dmd2, tmp_path, capsys):
    root = copy_bundle(tiny_dmd2, tmp_path / "dmd2")
    assert commands.export([str(root), "--engine", "torch", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["engine"] for row in report["engines"]} == {"torch"} and report["notes"] == []
    assert [case.steps for case in load_bundle(root).spec.golden] == [1, 2, 4, 8, 8]


def test_export_command_reuses_the_onnx_files_for_openvino(bundle, capsys):
    pytest.importorskip("openvino")
    before = {p.name: p.stat().st_mtime_ns for p in engine_folder(bundle, "onnx").glob("*.onnx")}
    assert commands.export([str(bundle.root), "--engine", "openvino"]) == 0
    out = capsys.readouterr().out
    assert "all engines agree with torch" in out and "onnx " not in out
    assert {p.name: p.stat().st_mtime_ns for p in engine_folder(bundle, "onnx").glob("*.onnx")} == before
    assert read_manifest(bundle, "openvino").verified and not read_manifest(bundle, "onnx").verified


def test_export_command_refuses_what_it_cannot_do(bundle, capsys):
    with pytest.raises(EngineUnavailable, match="--precision is 'bf16'; the engine 'onnx' has fp32"):
        commands.export([str(bundle.root), "--precision", "bf16"])
    with pytest.raises(SystemExit) as caught:
        commands.export([str(bundle.root), "--engine", "coreml"])
    assert caught.value.code == 2 and "choose from" in capsys.readouterr().err


def test_missing_package_is_named(bundle, monkeypatch):
    from fewstep.export.onnx import export_onnx

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(EngineUnavailable, match=r"onnxscript is not installed; pip install 'fewstep\[export\]'"):
        export_onnx(bundle)
    assert read_manifest(bundle, "onnx").engine == "onnx"


def test_the_peak_sees_corners_that_the_norm_averages_away():
    wanted = torch.ones(3, 4, 50, 50)
    assert apart([wanted], [wanted]) == SAME
    assert relative_error(wanted * 1.01, wanted) == pytest.approx(0.01)
    corner = wanted.clone()
    corner[1, 0, 0, 0] += 0.5
    assert peak_error(corner, wanted) == pytest.approx(0.5)
    assert relative_error(corner, wanted) == pytest.approx(0.005)
    corner[1, 0, 0, 0] = float("nan")
    assert apart([wanted], [corner]) == apart([wanted], [wanted / 0]) == LOST, (
        "a reference that is no number agrees with none"
    )
    assert apart([wanted, corner], [wanted, wanted]) == apart([wanted[:, :1]], [wanted]) == apart([], [wanted]) == LOST
