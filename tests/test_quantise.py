"""Int8 engines: per role the fastest treatment inside the budget; what passes the budget is refused."""

import json
from dataclasses import replace

import pytest

from fewstep.export import commands, quantise
from fewstep.export.onnx import usable_onnx
from fewstep.export.parity import Apart
from fewstep.export.quantise import Trial, choose
from fewstep.export.verify import verify
from fewstep.models.bundle import load_bundle
from fewstep.runtime.engines.budget import Budget
from fewstep.runtime.engines.manifest import engine_folder, read_manifest, write_manifest
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.errors import EngineUnavailable
from tiny import copy_bundle

pytest.importorskip("onnxruntime")
ROLES = ("text", "denoiser", "denoiser+control", "controlnet", "decoder", "encoder")
EXACT = {role: "fp32" for role in ROLES if role != "decoder"}


@pytest.fixture(scope="module")
def bundle(exported_lcm, tmp_path_factory):
    return load_bundle(copy_bundle(exported_lcm, tmp_path_factory.mktemp("int8") / "lcm"))


def trial(treatment, error, speed, peak=0.0):
    graph = None
    return Trial(treatment=treatment, graph=graph, relative_error=error, peak_error=peak, speed=speed, size_bytes=1)


@pytest.mark.parametrize(
    ("trials", "wanted"),
    [
        ([trial("fp32", 0, 1), trial("bf16", 1e-2, 2), trial("int8", 4e-2, 4)], "int8"),
        ([trial("fp32", 0, 1), trial("bf16", 1e-2, 2), trial("int8", 6e-2, 4)], "bf16"),
        ([trial("fp32", 0, 1), trial("bf16", 1e-2, 2), trial("int8", 4e-2, 4, peak=0.2)], "bf16"),
        ([trial("fp32", 0, 1), trial("bf16", 1e-2, 1.02), trial("int8", 4e-2, 0.8)], "fp32"),
        ([trial("fp32", 0, 1), trial("bf16", 1e-2, 2), trial("int8", 4e-2, 2.03)], "bf16"),
        ([trial("int8", 0.5, 4)], "int8"),
    ],
)
def test_the_fastest_within_the_bounds_is_kept(trials, wanted):
    assert choose(trials, Apart(5e-2, 0.125)).treatment == wanted


def test_openvino_decoder_in_eight_bits(bundle):
    pytest.importorskip("nncf")
    from fewstep.export.quantise_openvino import kit

    manifest = quantise.quantise(
        bundle, kit(), treatments={**EXACT, "decoder": "int8"}, budget=Budget(error=0.1), prompts=("a star", "ring") * 4
    )
    assert manifest.treatments == {**EXACT, "decoder": "int8"} and manifest.budget == {"error": 0.1}
    assert manifest.roles["text"].file == "../onnx/text.onnx"
    folder = engine_folder(bundle, "openvino-int8")
    names = {"decoder.int8.xml", "decoder.int8.xml.data", "manifest.json"}
    assert {p.name for p in folder.iterdir()} == names
    exact, eight = manifest.build["trials"]["decoder"]
    assert (exact["treatment"], eight["treatment"]) == ("fp32", "int8")
    assert (folder / "decoder.int8.xml.data").stat().st_size < exact["size_bytes"] / 2
    assert 1e-4 < eight["relative_error"] < 0.1
    grid_times = {t for grid in bundle.spec.grids.values() for t in grid}
    assert set(manifest.build["calibration"]["times"]) <= grid_times
    assert verify(bundle, kinds=("openvino-int8",)).ok
    kept = read_manifest(bundle, "openvino-int8")
    assert kept.verified and kept.costs["roles"]["decoder"]
    rows = {p.component: p for p in kept.parity}
    assert rows["decoder"].tolerance == 0.1 and rows["decoder"].peak_tolerance == 0.25
    assert len(rows["golden:steps-4"].drift) == 4
    engine = open_engine(bundle, "openvino-int8", threads=1)
    assert engine.name == "openvino-int8"
    engine.close()


def test_an_engine_beyond_its_budget_is_refused(bundle, capsys):
    pytest.importorskip("nncf")
    assert commands.verify([str(bundle.root), "--budget-error", "1e-5", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (row,) = [r for r in report["engines"] if (r["engine"], r["component"]) == ("openvino-int8", "decoder")]
    assert not row["ok"] and row["max_relative_error"] > row["tolerance"] == 1e-5
    kept = read_manifest(bundle, "openvino-int8")
    assert not kept.verified and kept.budget == {"error": 1e-5}
    report = verify(bundle, kinds=("openvino-int8",), budget=Budget(error=0.1, compliance=0.02))
    (row,) = [r for r in report.engines if not r.ok]
    assert row.component == "quality" and "engine's pictures were not measured" in row.note
    assert "fewstep bench quality" in row.note


def test_onnx_dynamic_and_static(bundle):
    from fewstep.export.quantise_onnx import kit

    forced = {**EXACT, "text": "int8-dynamic", "decoder": "int8"}
    said = {"budget": {"compliance": 0.1}, "quality": {"steps": {"1": {}}}, "executed_on": {"device": "here"}}
    write_manifest(bundle, replace(read_manifest(bundle, "onnx"), **said))
    manifest = quantise.quantise(bundle, kit(), treatments=forced, prompts=("a star", "ring") * 4)
    assert manifest.treatments == forced
    assert not (manifest.quality or manifest.budget or manifest.executed_on), "what was measured of the fp32 engine"
    engine = open_engine(bundle, "onnx-int8", threads=1)
    text = manifest.build["trials"]["text"][1]
    assert engine.name == "onnx-int8" and 1e-5 < text["relative_error"] < 5e-2
    engine.close()


def test_a_build_that_breaks_leaves_no_half_engine(bundle):
    from fewstep.export.quantise_onnx import kit

    before = (engine_folder(bundle, "onnx-int8") / "manifest.json").read_bytes()

    def broken(source, treatment, folder):
        (folder / "half.onnx").write_bytes(b"half")
        raise RuntimeError("the power went out")

    with pytest.raises(RuntimeError, match="power"):
        quantise.quantise(bundle, replace(kit(), make=broken), mode="static", prompts=("a star",) * 4)
    assert (engine_folder(bundle, "onnx-int8") / "manifest.json").read_bytes() == before
    assert not list((bundle.root / "engines").glob(".*"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--mode", "static"], "--mode was given; it is an option of --precision int8"),
        (["--precision", "int8", "--mode", "four"], "--mode is 'four'; onnx-int8 has auto, weight-only, dynamic"),
        (["--precision", "int8", "--treatments", "nose=int8"], "--treatments names 'nose'; .* has the roles text"),
        (["--precision", "int8", "--treatments", "decoder=int3"], "gives decoder 'int3'; onnx-int8 has fp32, int8-wei"),
        (["--precision", "int8", "--budget-error", "0"], "budget error is 0.0; it must be a number above 0"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(bundle, argv, said):
    assert usable_onnx(bundle) is not None
    with pytest.raises(EngineUnavailable, match=said):
        commands.export([str(bundle.root), "--engine", "onnx", *argv])


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--treatments", "decoder", "'decoder' is no list of treatments such as text=int8-dynamic,decoder=int8"),
        ("--prompts", "gone.txt", "gone.txt cannot be read"),
        ("--prompts", "empty.txt", "empty.txt holds no prompts; name a file with one a line"),
    ],
)
def test_options_that_cannot_be_read_are_refused(bundle, tmp_path, monkeypatch, capsys, option, value, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(SystemExit):
        commands.export([str(bundle.root), "--engine", "onnx", "--precision", "int8", option, value])
    assert said in " ".join(capsys.readouterr().err.split())
