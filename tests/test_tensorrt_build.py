"""Small graphs, really parsed and built: what TensorRT refuses is named, and sizes are profiles of their own."""

from dataclasses import replace

import pytest

from fewstep.export.graph_patches import mend
from fewstep.export.tensorrt_build import Settings, build_engine, profiles_of, shape_of
from fewstep.runtime.engines.manifest import (
    Graph,
    Port,
)  # fmt: skip
from fewstep.runtime.engines.tensorrt_flavour import load_tensorrt
from fewstep.runtime.errors import EngineUnavailable

pytest.importorskip("tensorrt_rtx")


def test_sizes_are_profiles_of_their_own():
    port = Port(name="x", dtype="float32", shape=("batch", 4, "8*rows", "8*columns"))
    fixed = Port(name="ids", dtype="int64", shape=("batch", 7))
    graph = Graph(file="f", sha256="0", inputs=(port, fixed), outputs=())
    lengths = [{"rows": 2, "columns": 3}, {"rows": 4, "columns": 1}]
    found = profiles_of(graph, [(1, 1, 1), (2, 4, 8)], lengths)
    assert [p["x"][1] for p in found] == [(1, 4, 16, 24), (4, 4, 16, 24), (1, 4, 32, 8), (4, 4, 32, 8)]
    assert found[1]["ids"] == ((2, 7), (4, 7), (8, 7))
    assert len(profiles_of(replace(graph, inputs=(fixed,)), [(1, 1, 1)], lengths)) == 1
    with pytest.raises(EngineUnavailable, match="axis 'tokens' follows from none of rows, columns, batch"):
        shape_of(("batch", "tokens"), {"rows": 1, "columns": 1, "batch": 1})


def handmade(folder, nodes, inputs, outputs, *, opset=21, constants=()):
    onnx = pytest.importorskip("onnx")
    values = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in ports]
        for ports in (inputs, outputs)
    ]
    graph = onnx.helper.make_graph(nodes, "g", *values, list(constants))
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    path = folder / "handmade.onnx"
    path.write_bytes(proto.SerializeToString())
    ports = [tuple(Port(name=n, dtype="float32", shape=tuple(s or ())) for n, s in p) for p in (inputs, outputs)]
    return path, Graph(file=path.name, sha256="0", inputs=ports[0], outputs=ports[1]), proto


def build_handmade(path, graph):
    profiles = profiles_of(graph, [(1, 2, 4)], [{}])
    return build_engine(load_tensorrt("tensorrt-rtx"), "denoiser", path, graph, profiles, Settings(level=0))


def test_an_operator_that_it_refuses_is_named_and_the_patch_mends_it(tmp_path):
    onnx = pytest.importorskip("onnx")
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [1])
    node = onnx.helper.make_node("Squeeze", ["x", "axes"], ["y"], name="tokens")
    path, graph, proto = handmade(tmp_path, [node], [("x", ["batch", 5])], [("y", None)], constants=[axes])
    with pytest.raises(EngineUnavailable, match=r"cannot (parse|build) .*'denoiser'.*tokens"):
        build_handmade(path, graph)
    assert mend(proto)
    path.write_bytes(proto.SerializeToString())
    assert build_handmade(path, graph).nbytes > 1000


def test_a_graph_that_is_not_as_exported_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    path, graph, _ = handmade(tmp_path, [node], [("x", ["batch", 5])], [("y", ["batch", 5])])
    assert build_handmade(path, graph).nbytes > 1000
    wrong = replace(graph, inputs=(Port(name="x", dtype="float16", shape=("batch", 5)),))
    with pytest.raises(EngineUnavailable, match=r"it was exported as .*float16"):
        build_handmade(path, wrong)
    with pytest.raises(EngineUnavailable, match=r"to \['f'\]: export it again"):
        build_handmade(path, replace(graph, outputs=(Port(name="f", dtype="float32", shape=()),)))


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    graph = Graph(file=path.name, sha256="0", inputs=(), outputs=())
    with pytest.raises(EngineUnavailable, match="cannot parse the graph of 'denoiser': "):
        build_handmade(path, graph)
