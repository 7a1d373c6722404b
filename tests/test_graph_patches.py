"""Mends of exported graphs: each on a graph that is refused without it, and blind to graphs that need none."""

import numpy as np
import pytest
import torch

from fewstep.export.graph_patches import concat_of_mixed_floats_promotes, mend, squeeze_of_longer_axis_is_identity

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def squeeze_graph(shape, axes, *, constant_node=False):
    """y = squeeze(2 x): what the exporter writes for torch's `squeeze` of these axes."""
    stored = numpy_helper.from_array(np.array(axes, np.int64), "axes")
    nodes = [helper.make_node("Add", ["x", "x"], ["twice"]), helper.make_node("Squeeze", ["twice", "axes"], ["y"])]
    if constant_node:
        nodes.insert(0, helper.make_node("Constant", [], ["axes"], value=stored))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [] if constant_node else [stored],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def open_graph(proto):
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("constant_node", [False, True])
def test_a_squeeze_of_a_longer_axis_is_refused_until_mended(constant_node):
    proto = squeeze_graph(["batch", 5, 3], [1], constant_node=constant_node)
    with pytest.raises(Exception, match="Dimension of input 1 must be 1 instead of 5"):
        open_graph(proto)
    assert mend(proto) == ["squeeze_of_longer_axis_is_identity"]
    x = torch.randn(2, 5, 3)
    (found,) = open_graph(proto).run(None, {"x": x.numpy()})
    assert np.array_equal(found, (2 * x).squeeze(1).numpy())
    assert mend(proto) == []


@pytest.mark.parametrize("shape", [["batch", 1, 3], ["batch", "rows", 3]])
def test_a_squeeze_that_is_right_or_not_known_to_be_wrong_stays(shape):
    proto = squeeze_graph(shape, [1])
    before = proto.SerializeToString(deterministic=True)
    assert squeeze_of_longer_axis_is_identity(proto) == 0
    assert proto.SerializeToString(deterministic=True) == before


def test_axes_that_nobody_can_read_stay():
    proto = squeeze_graph(["batch", 5, 3], [1])
    proto.graph.input.append(helper.make_tensor_value_info("axes", TensorProto.INT64, [1]))
    del proto.graph.initializer[:]
    assert mend(proto) == []


def concat_graph(kinds, *, noted):
    """y = cat(2 x, 2 z, 2 x) of tensors of these types."""
    names = ["x", "z"]
    doubled = [helper.make_node("Add", [name, name], [f"twice_{name}"]) for name in names]
    inputs = [helper.make_tensor_value_info(n, kind, ["batch", 3]) for n, kind in zip(names, kinds, strict=True)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    joined = helper.make_node("Concat", ["twice_x", "twice_z", "twice_x"], ["y"], axis=1)
    graph = helper.make_graph([*doubled, joined], "g", inputs, [output])
    if noted:
        graph.value_info.extend(
            helper.make_tensor_value_info(f"twice_{i.name}", k, None) for i, k in zip(inputs, kinds, strict=True)
        )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize(("kinds", "casts"), [(("FLOAT16", "FLOAT"), 2), (("FLOAT", "FLOAT16"), 1)])
def test_a_concat_of_half_and_float32_is_refused_until_mended(kinds, casts, noted):
    proto = concat_graph([getattr(TensorProto, kind) for kind in kinds], noted=noted)
    with pytest.raises(Exception, match="Concat"):
        open_graph(proto)
    assert concat_of_mixed_floats_promotes(proto) == casts
    dtypes = [torch.float16 if kind == "FLOAT16" else torch.float32 for kind in kinds]
    x, z = (torch.randn(2, 3).to(dtype) for dtype in dtypes)
    (found,) = open_graph(proto).run(None, {"x": x.numpy(), "z": z.numpy()})
    assert np.array_equal(found, torch.cat([2 * x, 2 * z, 2 * x], dim=1).numpy())
    assert mend(proto) == []


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "INT64"])
def test_a_concat_of_one_type_stays(kind):
    assert mend(concat_graph([getattr(TensorProto, kind)] * 2, noted=True)) == []
