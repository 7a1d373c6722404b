"""`fewstep bench latency`: the report's shape and arithmetic, the fairness of the comparison, table, plot and page."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from fewstep.models.bundle import load_bundle
from fewstep.runtime.bench import latency
from fewstep.runtime.bench.contestants import STAGES, bench_runtime, runtime_contestant
from fewstep.runtime.bench.latency import bench_latency, command, ready_engines
from fewstep.runtime.bench.latency_page import component_table, end_to_end_table
from fewstep.runtime.bench.latency_report import table
from fewstep.runtime.bench.peers import PEERS, Peer
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.errors import EngineUnavailable, InvalidRequest
from tiny import copy_bundle


@pytest.fixture(scope="module")
def report(exported_lcm, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("bench") / "latency.json"
    settings = ["--engines", "torch,onnx", "--steps", "1,2,25", "--repeats", "3", "--threads", "1", "--batch", "1,2"]
    files = ["--json", str(path), "--plot", str(path.with_suffix(".png")), "--html", str(path.with_suffix(".html"))]
    with pytest.MonkeyPatch.context() as patch:  # a peer that is unable, and one that is as quick as ours
        patch.setitem(PEERS, "unable", unable)
        patch.setitem(PEERS, "double", double)
        assert command([str(exported_lcm.root), *settings, *files, "--peers", "unable,double"]) == 0
    return {**json.loads(path.read_text()), "file": path}


def unable(bundle, threads, work):
    raise EngineUnavailable("it has no such class")


def double(bundle, threads, work):
    return Peer(PEERS["diffusers"](bundle, threads, work).run, notes=("it is diffusers again",))


def test_rows_of_every_engine_step_count_and_batch(report, exported_lcm):
    assert [(r["engine"], r["steps"], r["batch"]) for r in report["rows"]] == [
        (engine, steps, batch) for steps in (1, 2) for batch in (1, 2) for engine in ("torch", "onnx")
    ]
    assert report["skipped"] == [
        {"steps": 25, "why": "not allowed by the bundle"}, {"peer": "unable", "why": "it has no such class"},
    ]  # fmt: skip
    assert (report["bundle"], report["weights_digest"]) == (exported_lcm.name, exported_lcm.weights_digest)
    assert report["diffusers_pipeline"] == "LatentConsistencyModelPipeline"
    assert report["command"].startswith("fewstep bench latency tiny-lcm --engines torch,onnx --steps 1,2,25")


def test_figures_agree_with_each_other(report):
    peers = {(p["steps"], p["batch"]): p["p50_ms"] for p in report["diffusers"]}
    others = {(p["steps"], p["batch"]): p["p50_ms"] for p in report["peers"]}
    assert len(peers) == len(others) == 4
    for row in report["rows"]:
        case = row["steps"], row["batch"]
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"], rel=1e-2)
        assert row["vs_diffusers"] == row["vs"]["diffusers"] == pytest.approx(peers[case] / row["p50_ms"], rel=1e-2)
        assert row["vs"]["double"] == pytest.approx(others[case] / row["p50_ms"], rel=1e-2)
        assert tuple(row["share"]) == STAGES and sum(row["share"].values()) == pytest.approx(1, abs=1e-3)
        assert all(row["share"][stage] > 0 for stage in ("text", "denoiser", "decode", "encode"))


def test_both_make_the_same_picture(report):
    assert all(row["max_difference_from_diffusers"] <= 1 for row in report["rows"])


def test_every_network_alone_with_its_fraction_of_the_peak(report):
    peak = report["peak_gflop_per_s"]
    assert set(peak) == {"fp32"} and peak["fp32"] > 1
    alone = {(r["engine"], r["role"], r["batch"]): r for r in report["components"]}
    roles = {"text", "denoiser", "denoiser+control", "controlnet", "decoder"}
    assert set(alone) == {(e, role, b) for e in ("torch", "onnx") for role in roles for b in (1, 2)}
    for row in report["components"]:
        assert row["gflop_per_s"] == pytest.approx(row["gflop"] / row["p50_ms"] * 1e3, rel=0.05, abs=0.1)
        assert row["fraction_of_peak"] == pytest.approx(row["gflop_per_s"] / peak["fp32"], abs=2e-3)
    assert alone["torch", "decoder", 2]["gflop"] == pytest.approx(2 * alone["onnx", "decoder", 1]["gflop"], rel=1e-2)
    assert alone["torch", "denoiser+control", 1]["gflop"] == alone["torch", "denoiser", 1]["gflop"]


def test_the_plot_is_a_picture_of_some_size(report):
    with Image.open(report["file"].with_suffix(".png")) as picture:
        assert picture.size[0] >= 1000 and np.asarray(picture.convert("L")).std() > 5


def test_the_table_names_machine_peers_and_gaps(report):
    text = table(report)
    assert report["machine"]["cpu"] in text and "1 threads" in text
    assert "left out: 25 steps, not allowed by the bundle" in text
    assert "left out: peer unable, it has no such class" in text and "double: it is diffusers again" in text
    assert sum(" 1.00x" in line for line in text.splitlines()) >= 4
    assert f"{report['rows'][1]['vs_diffusers']:.2f}x" in text


def test_the_page_stands_alone_and_shows_every_figure(report):
    page = report["file"].with_suffix(".html").read_text()
    assert page.count("<svg") == 4 and "prefers-color-scheme:dark" in page
    assert not re.search(r"""(src|href)=["']""", page)
    for heads, rows in (end_to_end_table(report), component_table(report)):
        assert all(len(row) == len(heads) for row in rows)
        assert all(f"<td>{cell}</td>" in page for row in rows for cell in row)
    assert "it has no such class" in page and report["command"] in page


@pytest.mark.parametrize("kind", ["teacher", "lcm"])
def test_no_text_embedding_is_reused(kind, request):
    bundle = request.getfixturevalue(f"tiny_{kind}")
    with bench_runtime(bundle, open_engine(bundle, "torch"), None) as runtime:
        run = runtime_contestant(runtime)
        before = runtime.metrics().text_cache_hits
        samples = [run(f"a red circle {turn}", turn, 2, 2) for turn in range(3)]
        assert runtime.metrics().text_cache_hits == before
    assert all(s.stages_s["text"] > 0 and s.total_s >= sum(s.stages_s.values()) - 1e-6 for s in samples)


def test_a_batch_equals_diffusers_too(tiny_teacher):
    report = bench_latency(tiny_teacher, engines=("torch",), steps=(3,), repeats=1, batches=(2,), components=False)
    (row,) = report["rows"]
    assert row["batch"] == 2 and row["max_difference_from_diffusers"] <= 1
    assert report["diffusers_pipeline"] == "StableDiffusionPipeline" and "components" not in report
    assert row["images_per_s"] == pytest.approx(2e3 / row["p50_ms"], rel=1e-2)
    assert "GFLOP" not in table(report)


def test_default_engines_are_the_verified_ones(exported_lcm, tmp_path):
    bundle = load_bundle(copy_bundle(exported_lcm, tmp_path / "copy"))
    assert ready_engines(bundle) == ("torch",)
    manifest = bundle.root / "engines" / "onnx" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"verified": false', '"verified": true'))
    assert ready_engines(bundle) == ("torch", "onnx")


def test_wrong_use(tiny_lcm, tiny_dmd2, tmp_path, capsys):
    with pytest.raises(InvalidRequest, match=r"steps are \[3, 25\]; tiny-lcm allows \[1, 2, 4, 8\]"):
        bench_latency(tiny_lcm, engines=("torch",), steps=(3, 25))
    with pytest.raises(EngineUnavailable, match="has no onnx engine; run `fewstep export"):
        bench_latency(tiny_lcm, engines=("onnx",), steps=(1,))
    said = {"--engines": ("magic", "'magic' is no engine"), "--peers": ("comfy", "'comfy' is no peer")}
    said |= {"--steps": ("0", "'0' is not a whole"), "--batch": ("1,x", "'x' is not a whole")}
    for option, (value, message) in said.items():
        with pytest.raises(SystemExit) as caught:
            command([str(tiny_lcm.root), option, value])
        assert caught.value.code == 2 and message in capsys.readouterr().err
    root = copy_bundle(tiny_dmd2, tmp_path / "dmd2")
    bundle = load_bundle(root)
    (root / "model_index.json").unlink()
    with pytest.raises(EngineUnavailable, match=r"model_index\.json names no pipeline"):
        bench_latency(bundle, engines=("torch",), steps=(1,))


def test_what_cannot_be_written_is_said_before_anything_is_measured(tiny_lcm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "bench_latency", lambda *given, **settings: pytest.fail("it was measured"))
    for option in ("--json", "--plot", "--html"):
        with pytest.raises(SystemExit) as caught:
            command([str(tiny_lcm.root), option, str(tmp_path / "gone" / "file")])
        assert caught.value.code == 2 and "gone is no folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EngineUnavailable, match="--plot needs matplotlib"):
        command([str(tiny_lcm.root), "--plot", str(tmp_path / "plot.png")])


def test_the_default_settings_are_said_in_the_command():
    args = latency._parser().parse_args(["DIR", "--batch", "1,4"])
    assert latency._settings(args) == ["--steps", "1,2,4,8,25", "--batch", "1,4", "--repeats", "20"]
