"""Turns, percentiles, counted operations, measured peaks."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.runtime.bench import peak
from fewstep.runtime.bench.components import Peaks, component_rows, precision_of
from fewstep.runtime.bench.operations import count_operations
from fewstep.runtime.bench.peak import copy_bandwidth, matrix_peak
from fewstep.runtime.engine import Capabilities
from fewstep.runtime.engines import measurement
from fewstep.runtime.engines.measurement import call_seconds, device_wait, machine_facts, percentiles, take_turns, timed


def test_contestants_take_turns_and_the_first_turns_do_not_count():
    order = []
    found = take_turns({"a": lambda k: ("a", k), "b": lambda k: ("b", k)}, 3, order.append, warm_up=1)
    assert order == ["a", "b"] * 4
    assert found == {"a": [("a", 1), ("a", 2), ("a", 3)], "b": [("b", 1), ("b", 2), ("b", 3)]}


def test_percentiles_by_nearest_rank():
    found = percentiles([k / 1000 for k in range(1, 101)], batch=4)
    assert (found["p50_ms"], found["p95_ms"], found["p99_ms"]) == (50.5, 95.0, 99.0)
    assert found["images_per_s"] == pytest.approx(4 / 0.0505, abs=0.01)


def test_a_measured_call_begins_and_ends_with_the_device_at_rest(monkeypatch):
    order = []
    monkeypatch.setattr(measurement, "device_wait", lambda device: lambda: order.append(device))
    taken = call_seconds(lambda: order.append("call"), "cuda:1", repeats=2, warm_up=3)
    assert order == ["call"] * 3 + ["cuda:1", "call", "cuda:1"] * 2
    assert len(taken) == 2 and min(taken) > 0 and timed(lambda: order.append("timed"))(7) > 0 and order[-1] == "timed"


def test_the_device_that_is_waited_for_is_the_one_that_was_named(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device_wait("cuda:1")()
    device_wait("cpu")()
    assert waited == ["cuda:1"]


def test_machine_facts():
    facts = machine_facts()
    assert (
        facts["cpu"] and facts["cores"] >= 1 and facts["threads"] >= 1 and facts["torch"] and len(facts["date"]) == 10
    )


@torch.inference_mode()
def test_operations_of_layers_whose_count_is_known():
    convolution, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(4, 5)
    assert count_operations(lambda: convolution(torch.zeros(2, 3, 16, 16))) == 2 * 2 * 16 * 16 * 8 * 3 * 9
    assert count_operations(lambda: linear(torch.zeros(7, 4))) == 2 * 7 * 4 * 5
    q, k, v = torch.zeros(2, 4, 8, 16), torch.zeros(2, 4, 12, 16), torch.zeros(2, 4, 12, 16)
    products = 2 * 2 * 4 * 8 * 12 * (16 + 16)
    assert count_operations(lambda: nn.functional.scaled_dot_product_attention(q, k, v)) == products


def test_peak_and_bandwidth_are_what_a_processor_does():
    assert 1e8 < matrix_peak(torch.float32, side=256, repeats=2) < 1e14
    assert 1e7 < copy_bandwidth(size_bytes=1 << 22, repeats=2) < 1e13


def test_the_peak_is_that_of_the_faster_product(monkeypatch):
    waits = []
    monkeypatch.setattr(peak, "_openvino_product", lambda weights, dtype: lambda: time.sleep(waits[-1]))
    waits.append(0.05)
    torch_only = matrix_peak(torch.float32, side=256, repeats=2)
    assert torch_only > 2 * 256**3 / 0.05, "a slower product takes nothing away"
    waits.append(0.0)
    assert matrix_peak(torch.float32, side=1024, repeats=2) > 1024**3 / 1e-3, "a faster one counts"


def test_openvinos_product_is_a_product():
    pytest.importorskip("openvino")
    call = peak._openvino_product(torch.eye(64), torch.float32)
    assert call is not None and np.allclose(call()[0], np.eye(64))
    assert peak._openvino_product(torch.eye(64), torch.float16) is None


def test_a_network_alone_is_timed_until_its_device_is_done(monkeypatch):
    events = []
    monkeypatch.setattr("fewstep.runtime.bench.components.device_wait", lambda device: lambda: events.append(device))
    monkeypatch.setattr("fewstep.runtime.bench.components.matrix_peak", lambda dtype, device, repeats: 1e9)
    able = Capabilities(roles=frozenset({"decoder"}), max_batch=4)

    def run(role, feeds):
        events.append(len(feeds["latent"]))
        return (feeds["latent"],)

    engine = SimpleNamespace(name="late", capabilities=able, run=run)
    (row,) = component_rows(
        {"late": engine}, {"decoder": {"latent": torch.zeros(1, 4)}}, {"decoder": 10**6}, Peaks({"late": "cpu"}),
        batches=(2,), repeats=3, tell=lambda part: None,
    )  # fmt: skip
    assert events == [2, "cpu"] * (measurement.WARM_UP + 3)
    assert row["batch"] == 2 and row["fraction_of_peak"] == pytest.approx(row["gflop_per_s"], rel=0.1, abs=1e-3)


def test_peaks_are_taken_for_the_precisions_that_the_engines_compute_in(monkeypatch):
    speeds, asked = iter([3e9, 5e9, 900e9, 2e9, 7e9, 800e9]), []
    monkeypatch.setattr(
        "fewstep.runtime.bench.components.matrix_peak",
        lambda dtype, device, repeats: asked.append((dtype, device)) or next(speeds),
    )
    peaks = Peaks({"torch": "cpu", "openvino-bf16": "cpu", "openvino-int8": "cpu", "tensorrt-fp16": "cuda:0"})
    peaks.sample()
    peaks.sample()
    assert peaks.best == {"fp32": 3.0, "bf16": 7.0, "fp16 on cuda:0": 900.0}
    assert asked[:3] == [(torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float16, "cuda:0")]
    assert peaks.of("openvino-bf16", "cpu") == 7.0 and peaks.of("tensorrt-fp16", "cuda:0") == 900.0
    assert peaks.of("openvino-int8", "cpu") is None
    kinds = ("torch", "torch-compile", "openvino-bf16", "onnx-int8")
    assert [precision_of(kind) for kind in kinds] == ["fp32", "fp32", "bf16", "int8"]
