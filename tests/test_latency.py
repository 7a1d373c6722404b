"""`fewstep bench latency`: the report's shape and arithmetic, the fairness of the comparison, table and plot."""

import json

import numpy as np
import pytest
from PIL import Image

from fewstep.models.bundle import load_bundle
from fewstep.runtime import latency
from fewstep.runtime.engines import KINDS
from fewstep.runtime.errors import EngineUnavailable, InvalidRequest
from fewstep.runtime.latency import STAGES, bench_latency, command, machine_facts, ready_engines
from fewstep.runtime.latency_report import table
from tiny import copy_bundle


@pytest.fixture(scope="module")
def report(exported_lcm, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("bench") / "latency.json"
    settings = ["--engines", "torch,onnx", "--steps", "1,2,25", "--repeats", "3", "--threads", "1"]
    assert (
        command([str(exported_lcm.root), *settings, "--json", str(path), "--plot", str(path.with_suffix(".png"))]) == 0
    )
    return {**json.loads(path.read_text()), "plot": path.with_suffix(".png")}


def test_rows_of_every_engine_and_step_count(report, exported_lcm):
    assert [(r["engine"], r["steps"], r["batch"]) for r in report["rows"]] == [
        ("torch", 1, 1), ("onnx", 1, 1), ("torch", 2, 1), ("onnx", 2, 1),
    ]  # fmt: skip
    assert report["skipped"] == [{"steps": 25, "why": "not allowed by the bundle"}]
    assert (report["bundle"], report["weights_digest"]) == (exported_lcm.name, exported_lcm.weights_digest)
    assert report["diffusers_pipeline"] == "LatentConsistencyModelPipeline"


def test_figures_agree_with_each_other(report):
    peers = {p["steps"]: p["p50_ms"] for p in report["diffusers"]}
    for row in report["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 / row["p50_ms"], rel=1e-2)
        assert row["vs_diffusers"] == pytest.approx(peers[row["steps"]] / row["p50_ms"], rel=1e-2)
        assert tuple(row["share"]) == STAGES and sum(row["share"].values()) == pytest.approx(1, abs=1e-3)
        assert all(row["share"][stage] > 0 for stage in ("text", "denoiser", "decode", "encode"))


def test_both_make_the_same_picture(report):
    assert all(row["max_difference_from_diffusers"] <= 1 for row in report["rows"])


def test_the_plot_is_a_picture_of_some_size(report):
    with Image.open(report["plot"]) as picture:
        assert picture.size[0] >= 1000 and np.asarray(picture.convert("L")).std() > 5


def test_the_table_names_machine_peers_and_gaps(report):
    text = table(report)
    assert report["machine"]["cpu"] in text and "1 threads" in text
    assert "25 steps, not allowed by the bundle" in text
    assert sum("1.00x" in line for line in text.splitlines()) >= 2
    assert f"{report['rows'][1]['vs_diffusers']:.2f}x" in text


@pytest.mark.parametrize("kind", ["teacher", "lcm"])
def test_no_text_embedding_is_reused(kind, request):
    bundle = request.getfixturevalue(f"tiny_{kind}")
    with latency._open(bundle, "torch", None) as runtime:
        run = latency._runtime(runtime)
        before = runtime.metrics().text_cache_hits
        samples = [run(f"a red circle {turn}", turn, 2, 2) for turn in range(3)]
        assert runtime.metrics().text_cache_hits == before
    assert all(s.stages_s["text"] > 0 and s.total_s >= sum(s.stages_s.values()) - 1e-6 for s in samples)


def test_a_batch_equals_diffusers_too(tiny_teacher):
    report = bench_latency(tiny_teacher, engines=("torch",), steps=(3,), repeats=1, batch=2)
    (row,) = report["rows"]
    assert row["batch"] == 2 and row["max_difference_from_diffusers"] <= 1
    assert report["diffusers_pipeline"] == "StableDiffusionPipeline"
    assert row["images_per_s"] == pytest.approx(2e3 / row["p50_ms"], rel=1e-2)


def test_percentiles_by_nearest_rank():
    found = latency._percentiles([k / 1000 for k in range(1, 101)], batch=4)
    assert (found["p50_ms"], found["p95_ms"], found["p99_ms"]) == (50.5, 95.0, 99.0)
    assert found["images_per_s"] == pytest.approx(4 / 0.0505, abs=0.01)


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
    for settings, said in ((["--engines", "magic"], "'magic' is no engine"), (["--steps", "0"], "'0' is not a whole")):
        with pytest.raises(SystemExit) as caught:
            command([str(tiny_lcm.root), *settings])
        assert caught.value.code == 2 and said in capsys.readouterr().err
    root = copy_bundle(tiny_dmd2, tmp_path / "dmd2")
    bundle = load_bundle(root)
    (root / "model_index.json").unlink()
    with pytest.raises(EngineUnavailable, match=r"model_index\.json names no pipeline"):
        bench_latency(bundle, engines=("torch",), steps=(1,))


def test_machine_facts():
    facts = machine_facts()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["threads"] >= 1 and facts["torch"]
    assert "torch" in KINDS
