"""`fewstep bench gpu`: the same code on a CPU at tiny size; budget, broken cases, floors, the page it lands on."""

import json
from dataclasses import replace

import pytest
import torch

from fewstep.runtime.bench import gpu_bench
from fewstep.runtime.bench.gpu_bench import STEPS, bench_gpu, command
from fewstep.runtime.bench.gpu_plan import PLAN, SHAPES, TINY_PLAN, Case
from fewstep.runtime.errors import EngineUnavailable


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gpu_bench, "matrix_peak", lambda dtype, device: 1e11)
    monkeypatch.setattr(gpu_bench, "copy_bandwidth", lambda device, size_bytes: 1e10)


def test_every_case_has_a_row_per_step_count_and_the_file_holds_it(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert command(["--device", "cpu", "--shape", "tiny", "--repeats", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [(r["mode"], r["batch"], r["steps"]) for r in report["rows"]] == [
        (case.mode, case.batch, steps) for case in TINY_PLAN for steps in STEPS
    ]
    assert report["command"] == f"fewstep bench gpu --device cpu --shape tiny --repeats 2 --json {path}"
    assert list(tmp_path.iterdir()) == [path]
    shown = capsys.readouterr().out
    assert "measured peak: fp32 0.1 TFLOP/s" in shown and shown.count("tiny fp32 graph batch 2") == len(STEPS)


def test_the_floor_is_the_slower_of_operations_and_weights_for_every_network():
    report = bench_gpu(TINY_PLAN[:2], device="cpu", repeats=1, save=lambda report: None)
    made = gpu_bench._networks("tiny", "fp32", device="cpu")
    for row in report["rows"]:
        parts = zip((row["steps"], 1), made.operations, made.weight_bytes, strict=True)
        floor_s = sum(n * max(ops * row["batch"] / 1e11, size / 1e10) for n, ops, size in parts)
        assert row["floor_ms"] == pytest.approx(floor_s * 1e3)
        assert row["over_floor"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
        assert row["fraction_of_peak"] == pytest.approx(row["gflop"] * 1e9 / (row["denoiser_ms"] / 1e3) / 1e11)
    sizes = [sum(p.numel() for p in part.parameters()) * 4 for part in (made.denoiser, made.decoder)]
    assert list(made.weight_bytes) == sizes


def test_no_case_begins_that_would_pass_the_budget_and_all_before_are_saved():
    now = iter(float(k) for k in range(0, 1000, 10))  # every look at the clock is ten seconds after the last
    saved = []
    report = bench_gpu(
        TINY_PLAN, device="cpu", budget_s=45.0, repeats=1, clock=lambda: next(now),
        save=lambda report: saved.append((len(report["rows"]), len(report["skipped"]))),
    )  # fmt: skip
    assert saved == [(3, 0), (6, 0), (6, 1), (6, 2)]
    assert report["skipped"][-1] == {"what": "tiny fp32 eager batch 2", "why": "the budget of 45 s"}


def test_a_case_that_breaks_is_named_and_the_next_one_follows(monkeypatch):
    measure = gpu_bench._measure

    def breaking(case, *rest):
        if case.batch == 1:
            raise torch.OutOfMemoryError("no room for it")
        return measure(case, *rest)

    monkeypatch.setattr(gpu_bench, "_measure", breaking)
    report = bench_gpu(TINY_PLAN[:2], device="cpu", repeats=1, save=lambda report: None)
    assert report["skipped"] == [{"what": "tiny fp32 graph batch 1", "why": "OutOfMemoryError: no room for it"}]
    assert {row["batch"] for row in report["rows"]} == {2}


def test_the_call_is_the_network_the_update_and_the_decoder():
    """A denoiser of zeros leaves 0.3 x + 0.5 z; the host then holds the decoder's pixels of that."""
    made = gpu_bench._networks("tiny", "fp32", device="cpu")
    torch.manual_seed(0)
    b = gpu_bench._buffers(made.shape, torch.float32, 2, "cpu")
    assert b.x.shape == (2, 4, 8, 8) and b.host_picture.shape == (2, 16, 16, 3) and torch.equal(b.x, b.host_noise)
    with torch.inference_mode():
        for part in made.denoiser.parameters():
            part.zero_()
    torch.manual_seed(0)
    seen = []
    decoder = torch.nn.Module()
    decoder.forward = lambda x: seen.append(x.clone()) or torch.zeros(2, 3, 16, 16)
    networks = replace(made, decoder=decoder)
    rows = gpu_bench._measure(Case("tiny", "fp32", "eager", 2), networks, "cpu", 1e11, 1e10, 1)
    assert len(rows) == len(STEPS)
    one_step = seen[0]
    assert torch.allclose(one_step, 0.3 * b.host_noise + 0.5 * b.noise, atol=1e-6)


def test_wrong_use(capsys):
    if not torch.cuda.is_available():
        with pytest.raises(EngineUnavailable, match="torch sees no CUDA device; try --device cpu --shape tiny"):
            bench_gpu(PLAN, save=lambda report: None)
    with pytest.raises(SystemExit):
        command(["--shape", "sd9"])
    assert "sd9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--device", "cpu", "--shape", "tiny", "--repeats", "0"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--device", "cpu", "--shape", "tiny", "--mode", "compiled"])
    assert "no case is of shape tiny and mode compiled" in capsys.readouterr().err
    with pytest.raises(EngineUnavailable, match="device is 'tpu'; use cuda, cuda:N or cpu"):
        bench_gpu(TINY_PLAN, device="tpu", save=lambda report: None)


def test_the_device_that_is_measured_is_the_one_that_was_named(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(gpu_bench, "machine_facts", dict)
    bench_gpu([], device="cuda:1", save=lambda report: None)
    bench_gpu([], device="cuda", save=lambda report: None)
    assert current == [1], "streams, graphs and the machine's name are those of the current device"

    def refuse(device):
        raise RuntimeError("invalid device ordinal")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(EngineUnavailable, match="device is 'cuda:9': invalid device ordinal"):
        bench_gpu([], device="cuda:9", save=lambda report: None)


def test_the_plan_begins_with_the_target_and_names_real_shapes():
    assert PLAN[0] == Case("sd-turbo", "bf16", "compiled", 1)
    assert len(set(PLAN)) == len(PLAN) and {case.shape for case in PLAN} == set(SHAPES) - {"tiny"}
    assert {case.batch for case in PLAN if case.shape == "sd-turbo"} == {1, 2, 4, 8, 16, 32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_replay_on_a_gpu():
    report = bench_gpu(TINY_PLAN, device="cuda", repeats=3, save=lambda report: None)
    assert not report["skipped"] and len(report["rows"]) == len(TINY_PLAN) * len(STEPS)
