"""Norms that keep a graph's layout; what keeps bfloat16 near float32: sums and sines of times that are not rounded."""

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")

import torch  # noqa: E402
from openvino import opset12, opset13  # noqa: E402

from fewstep.runtime.engines.openvino_graph import WAVE, keep_sums, norms_by_channel, split_head  # noqa: E402

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


def normed(shape, groups=4, convolutions=False):
    """A group norm with uneven scales and shifts, between convolutions where asked; the scales and shifts beside."""
    draw = np.random.default_rng(2)
    channels = shape[1]
    scale, shift = (draw.standard_normal(channels).astype(np.float32) for _ in range(2))
    weights = opset13.constant((draw.standard_normal((channels, channels, 3, 3)) / 12).astype(np.float32))

    def conv(x):
        return opset13.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1]) if convolutions else x

    entry = opset13.parameter(shape, openvino.Type.f32, name="x")
    x = conv(opset12.group_normalization(conv(entry), opset13.constant(scale), opset13.constant(shift), groups, 1e-5))
    return openvino.Model([x], [entry], "normed"), scale, shift


@pytest.mark.parametrize("shape", [(2, 16, 32, 32), (-1, 16, -1, -1)], ids=["known", "free"])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_a_norm_by_channel_is_the_group_norm(shape, mean):
    model, scale, shift = normed(shape)
    assert norms_by_channel(model, 32 * 32) == 1
    assert "GroupNormalization" not in {op.get_type_name() for op in model.get_ordered_ops()}
    draw = np.random.default_rng(3)
    x = draw.standard_normal((2, 16, 32, 32)) * np.arange(1, 17)[:, None, None] + mean + np.arange(16)[:, None, None]
    x = x.astype(np.float32)
    exact = torch.nn.functional.group_norm(*(torch.tensor(v).double() for v in (x,)), 4, *map(torch.tensor, (
        scale.astype(np.float64), shift.astype(np.float64))), 1e-5).numpy()  # fmt: skip
    found = compiled(model, "f32")(x)[0]
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < (1e-6 if mean == 0.0 else 1e-4)


def test_small_pictures_and_sequences_keep_their_own_norm():
    model, _, _ = normed((1, 16, 16, 16))
    assert norms_by_channel(model, 32 * 32) == 0
    sequence = openvino.Model(
        [opset12.group_normalization(entry := opset13.parameter((1, 16, 4096), openvino.Type.f32),
         *(opset13.constant(np.ones(16, dtype=np.float32)) for _ in range(2)), 4, 1e-5)], [entry], "sequence",
    )  # fmt: skip
    assert norms_by_channel(sequence, 1) == 0


def test_a_norm_by_channel_does_not_turn_the_picture_round():
    """Around OpenVINO's own norm the picture changes its layout twice."""

    def turns(model):
        """Changes of layout of a whole picture."""
        ops = compiled(model, "f32").get_runtime_model().get_ops()
        reorders = [op for op in ops if op.get_rt_info()["layerType"].astype(str) == "Reorder"]
        return sum(tuple(op.get_output_partial_shape(0).to_shape()) == (1, 64, 64, 64) for op in reorders)

    own, (mine, _, _) = normed((1, 64, 64, 64), convolutions=True)[0], normed((1, 64, 64, 64), convolutions=True)
    assert norms_by_channel(mine, 1) == 1
    assert turns(mine) == turns(own) - 2
