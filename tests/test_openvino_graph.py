"""What keeps bfloat16 near float32: sums that are not rounded, and sines of times that are not."""

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")

from openvino import opset13  # noqa: E402

from fewstep.runtime.openvino_graph import WAVE, keep_sums, split_head  # noqa: E402

CORE = openvino.Core()
needs_bf16 = pytest.mark.skipif(
    "BF16" not in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="this CPU has no bfloat16"
)
SHAPE = (1, 16, 8, 8)


def residual_chain(blocks=16):
    """Blocks as a tiny decoder's: x <- relu(x + conv(relu(conv(x))))."""
    draw = np.random.default_rng(0)

    def conv(x):
        weights = (draw.standard_normal((16, 16, 3, 3)) / 24).astype(np.float32)
        bias = (0.1 * draw.standard_normal((1, 16, 1, 1))).astype(np.float32)
        return opset13.add(opset13.convolution(x, opset13.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1]), bias)

    entry = opset13.parameter(SHAPE, openvino.Type.f32, name="x")
    x = opset13.relu(conv(entry))
    for _ in range(blocks):
        x = opset13.relu(opset13.add(x, conv(opset13.relu(conv(x)))))
    return openvino.Model([conv(x)], [entry], "chain")


def waves():
    """sin(t / 2) + cos(t / 2) + x."""
    t, x = (opset13.parameter((2,), openvino.Type.f32, name=name) for name in ("t", "x"))
    for entry in (t, x):
        entry.output(0).set_names({entry.get_friendly_name()})
    angle = opset13.multiply(t, opset13.constant(np.float32(0.5)))
    return openvino.Model([opset13.add(opset13.add(opset13.sin(angle), opset13.cos(angle)), x)], [t, x], "net")


def compiled(model, precision="bf16"):
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    return CORE.compile_model(model, "CPU", settings)


def error(model, precision, feed, wanted):
    found = compiled(model, precision)(feed)[0]
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@needs_bf16
def test_sums_that_stay_in_float32_cut_the_error_of_a_residual_chain():
    feed = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    wanted = compiled(residual_chain(), "f32")(feed)[0]
    rounded = error(residual_chain(), "bf16", feed, wanted)
    kept = error(keep_sums(CORE, residual_chain()), "bf16", feed, wanted)
    assert 1e-4 < kept < 0.75 * rounded


@needs_bf16
def test_convolutions_still_compute_in_bfloat16():
    layers = compiled(keep_sums(CORE, residual_chain())).get_runtime_model().get_ops()
    found = {
        op.get_rt_info()["layerType"].astype(str): op.get_rt_info()["runtimePrecision"].astype(str) for op in layers
    }
    assert found["Convolution"] == "bf16"


def test_marked_graphs_compute_the_same_in_float32():
    feed = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    plain = compiled(residual_chain(), "f32")(feed)[0]
    assert np.array_equal(compiled(keep_sums(CORE, residual_chain()), "f32")(feed)[0], plain)


def test_the_head_holds_all_that_sines_are_taken_of():
    feeds = {"t": np.array([999.0, 1.0], np.float32), "x": np.ones(2, np.float32)}
    wanted = compiled(waves(), "f32")(feeds)[0]
    model = waves()
    head = split_head(model)
    assert [p.get_friendly_name() for p in head.get_parameters()] == ["t"]
    assert [p.get_friendly_name() for p in model.get_parameters()] == ["x", WAVE.format(0), WAVE.format(1)]
    found = compiled(head, "f32")({"t": feeds["t"]})
    again = compiled(model, "f32")({"x": feeds["x"], WAVE.format(0): found[0], WAVE.format(1): found[1]})[0]
    assert np.allclose(again, wanted, atol=1e-6)
    assert split_head(model) is None
