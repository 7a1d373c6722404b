"""`fewstep bench report`: the page says what the files say, and nothing that no file says."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fewstep.runtime.bench.performance import NO_GPU, command, markdown, page
from fewstep.runtime.errors import InvalidRequest

ROOT = Path(__file__).parents[1]
MACHINE = {"cpu": "Some CPU", "cores": 2, "threads": 1, "torch": "2.13", "date": "2026-01-02", "pillow": "13"}
ROW = {"steps": 1, "batch": 1, "p95_ms": 12.0, "p99_ms": 13.0, "images_per_s": 100.0}
SHARE = {"text": 0.1, "denoiser": 0.5, "decode": 0.2, "encode": 0.1, "overhead": 0.1}
LATENCY = {
    "kind": "latency", "machine": MACHINE, "bundle": "some-lcm", "size": [64, 64], "guidance": 3.0, "measured": "so",
    "command": "fewstep bench latency some-lcm", "diffusers_pipeline": "SomePipeline",
    "rows": [{**ROW, "engine": "onnx", "p50_ms": 10.0, "vs_diffusers": 2.5, "share": SHARE,
              "vs": {"diffusers": 2.5, "openvino-genai": 1.25}}],
    "diffusers": [{**ROW, "engine": "diffusers", "p50_ms": 25.0, "vs_diffusers": 1.0}],
    "peers": [{**ROW, "engine": "openvino-genai", "p50_ms": 12.5, "vs_diffusers": 2.0}],
    "peer_notes": {"openvino-genai": ["timed with epsilon"]}, "peak_gflop_per_s": {"fp32": 90.0},
    "components": [{**ROW, "engine": "onnx", "role": "decoder", "p50_ms": 2.0, "gflop": 0.09, "gflop_per_s": 45.0,
                    "fraction_of_peak": 0.5}],
    "skipped": [{"peer": "diffusers-compile-bf16", "why": "no compiler"}],
}  # fmt: skip
PICTURES = {
    "kind": "pictures", "machine": MACHINE, "command": "fewstep bench pictures",
    "rows": [{"picture": "photo", "side": 64, "encoder": "png, level 1", "p50_ms": 0.07, "bytes": 10240}],
}  # fmt: skip
GPU = {
    "kind": "gpu", "machine": {**MACHINE, "gpu": "Some GPU"}, "command": "fewstep bench gpu",
    "peak": {"flop_per_s": {"bf16": 7.5e14}, "bytes_per_s": 4e12},
    "rows": [{"shape": "sd-turbo", "precision": "bf16", "mode": "graph", "batch": 1, "steps": 1, "p50_ms": 5.0,
              "floor_ms": 2.5, "over_floor": 2.0, "images_per_s": 200.0, "fraction_of_peak": 0.4}],
    "skipped": [{"what": "sdxl-turbo bf16 graph batch 32", "why": "the budget of 540 s"}],
}  # fmt: skip


def test_every_figure_has_its_command_date_and_machine():
    text, plots = page({"scenes": LATENCY, "pictures": PICTURES, "gpu": GPU})
    assert "| onnx | 1 | 1 | 10.0 | 12.0 | 13.0 | 100.0 | 2.50 | 1.25 |" in text
    assert "| decoder | onnx | 1 | 2.00 | 0.090 | 45.0 | 50% |" in text
    assert "| png, level 1 | 0.07 ms, 10 KiB |" in text
    assert "| sd-turbo | bf16 | 1 | 1 | graph | 5.00 | 2.50 | 2.00 | 200.0 | 40% |" in text
    for report in (LATENCY, PICTURES, GPU):
        assert f"`{report['command']}`; 2026-01-02; Some CPU, 2 cores, 1 threads, torch 2.13" in text
    for said in ("- openvino-genai: timed with epsilon", "- left out: peer diffusers-compile-bf16, no compiler",
                 "## GPU: Some GPU", "- left out: sdxl-turbo bf16 graph batch 32: the budget of 540 s"):  # fmt: skip
        assert said in text
    assert set(plots) == {"scenes-latency.svg", "scenes-ratio.svg", "scenes-stages.svg", "scenes-peak.svg",
                          "pictures-encoding.svg", "gpu-throughput.svg"}  # fmt: skip
    assert all(
        f"](performance/{name})" in text and ElementTree.fromstring(svg) is not None for name, svg in plots.items()
    )


def test_two_results_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "scenes.json").write_text(json.dumps(LATENCY))
    files = [str(tmp_path / folder / "scenes.json") for folder in ("a", "b")]
    with pytest.raises(InvalidRequest, match=r"a/scenes\.json and .*b/scenes\.json have one name; rename one"):
        command([*files, "--out", str(tmp_path / "page.md")])
    assert not (tmp_path / "page.md").exists()


def test_without_a_gpu_result_none_is_claimed():
    text, _ = page({"scenes": LATENCY})
    assert NO_GPU in text and "TFLOP" not in text


def test_the_command_writes_page_and_charts(tmp_path, capsys):
    source = tmp_path / "in.json"
    source.write_text(json.dumps(LATENCY))
    assert command([str(source), "--out", str(tmp_path / "speed.md")]) == 0
    assert "1 results, 4 charts" in capsys.readouterr().out
    text = (tmp_path / "speed.md").read_text()
    assert "](speed/in-latency.svg)" in text
    assert {p.name for p in (tmp_path / "speed").iterdir()} == {
        f"in-{n}.svg" for n in ("latency", "ratio", "stages", "peak")
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no report"),
        ('{"kind": "load"}', "is of kind 'load'; use latency, pictures, gpu"),
        ('{"kind": "latency"}', "cannot be shown"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, content, said):
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match=said) as caught:
        command([str(path), "--out", str(tmp_path / "p.md")])
    assert "odd.json" in str(caught.value) and not (tmp_path / "p.md").exists()


def test_the_published_page_is_what_the_command_writes():
    """docs/performance.md is generated: from the files beside it the same text comes again."""
    files = sorted((ROOT / "docs" / "performance").glob("*.json"))
    assert files
    text, plots = page({path.stem: json.loads(path.read_text()) for path in files})
    remedy = "run `fewstep bench report docs/performance/*.json --out docs/performance.md`"
    assert (ROOT / "docs" / "performance.md").read_text() == text, remedy
    for name, svg in plots.items():
        assert (ROOT / "docs" / "performance" / name).read_text() == svg + "\n", remedy


def test_markdown_has_as_many_marks_as_heads():
    assert markdown((["a", "b"], [["1", "2"]])) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
