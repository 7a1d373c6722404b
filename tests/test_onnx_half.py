"""Graphs in half precision: float32 at the border, times unrounded inside, proven before use, and kept while fresh."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fewstep.export import onnx_half
from fewstep.export.graphs import RoleGraph
from fewstep.export.onnx_half import TOLERANCE, InHalf, export_half, half_graphs, widen_bfloat16
from fewstep.export.tensorrt import export_tensorrt
from fewstep.models.bundle import load_bundle
from fewstep.runtime.engines.manifest import engine_folder, exported_kinds, read_manifest
from fewstep.runtime.errors import EngineUnavailable
from tiny import copy_bundle

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Wave(nn.Module):
    """A stand-in for a denoiser: a layer on x, a sine of t, and a mask of integers."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = scale

    def forward(self, x, t, size_ids, mask):
        wave = torch.sin(t.float()[:, None] + size_ids.float().sum(1, keepdim=True))
        return self.layer(x) * mask[:, :, None] * self.scale + wave.to(x.dtype)[:, None]


def wave_graph(scale=1.0):
    torch.manual_seed(0)
    feeds = {
        "x": torch.randn(2, 3, 4),
        "t": torch.tensor([999.0, 757.25]),
        "size_ids": torch.tensor([[1023.0, 5.0], [771.0, 3.0]]),
        "mask": torch.ones(2, 3, dtype=torch.int64),
    }
    batch = torch.export.Dim("batch", min=1, max=8)
    return RoleGraph("denoiser", Positional(Wave(scale)).eval(), feeds, ("f",), {name: {0: batch} for name in feeds})


class Positional(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *feeds):
        return self.network(*feeds)


def test_times_and_sizes_stay_float32_and_the_rest_is_rounded():
    seen = {}

    class Spy(nn.Module):
        def forward(self, *feeds):
            seen.update(zip(("x", "t", "size_ids", "mask"), (f.dtype for f in feeds), strict=True))
            return feeds[0]

    feeds = wave_graph().feeds
    (out,) = InHalf(Spy(), torch.bfloat16, tuple(feeds))(*feeds.values())
    kept = {"t": torch.float32, "size_ids": torch.float32, "mask": torch.int64}
    assert seen == {"x": torch.bfloat16, **kept}
    assert out.dtype == torch.float32 and torch.equal(out, feeds["x"].bfloat16().float())


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)]
)
def test_a_graph_is_half_inside_and_float32_at_its_border(tmp_path, precision, kind):
    graph, parity = export_half(wave_graph(), tmp_path, precision)
    proto = onnx.load(tmp_path / graph.file)
    assert {p.dtype for p in (*graph.inputs, *graph.outputs)} == {"float32", "int64"}
    weights = [w.data_type for w in proto.graph.initializer if w.name.endswith(("weight", "bias"))]
    assert weights and set(weights) == {kind}
    names = ["denoiser"] if precision == "fp16" else ["denoiser", "denoiser in torch"]
    assert [row.component for row in parity] == names
    assert all(row.ok and 0 < row.max_relative_error < TOLERANCE / 2 for row in parity)


def test_a_graph_that_is_too_far_off_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_half, "TOLERANCE", 1e-7)
    with pytest.raises(EngineUnavailable, match=r"in bf16 is off by .* relative, .*use --precision fp32"):
        export_half(wave_graph(), tmp_path, "bf16")


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    with pytest.raises(EngineUnavailable, match=r"denoiser in fp16 is off by inf .*use --precision bf16"):
        export_half(wave_graph(scale=1e6), tmp_path, "fp16")


def test_widening_keeps_rounded_weights_and_leaves_other_types():
    values = torch.tensor([1.001, 2.003]).bfloat16()
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [2], values.float().tolist())
    ids = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [7])
    cast = onnx.helper.make_node("Cast", ["w"], ["y"], to=onnx.TensorProto.BFLOAT16)
    constant = onnx.helper.make_node("Constant", [], ["c"], value=weight)
    graph = onnx.helper.make_graph([cast, constant], "g", [], [], [weight, ids])
    proto = onnx.helper.make_model(graph)
    widen_bfloat16(proto)
    assert [w.data_type for w in proto.graph.initializer] == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64]
    assert onnx.numpy_helper.to_array(proto.graph.initializer[0]).tolist() == values.float().tolist()
    assert cast.attribute[0].i == onnx.TensorProto.BFLOAT16  # the graph holds a copy of the node
    assert proto.graph.node[0].attribute[0].i == onnx.TensorProto.FLOAT
    assert proto.graph.node[1].attribute[0].t.data_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_real_roles_are_built_from_proven_half_graphs(exported_lcm, tmp_path, precision):
    pytest.importorskip("tensorrt_rtx")
    bundle = load_bundle(copy_bundle(exported_lcm, tmp_path / "copy"))
    told = []
    options = {"precision": precision, "roles": ("decoder",), "level": 0, "progress": told.append}
    manifest = export_tensorrt(bundle, **options)
    kind = f"tensorrt-{precision}"
    assert (manifest.engine, manifest.precision, manifest.executed_on) == (kind, precision, None)
    assert told == [f"decoder: graph in {precision}", "decoder: built"]
    assert all(error < TOLERANCE for error in manifest.build["graphs"].values())
    assert manifest.build["roles"]["decoder"]["key"]["precision"] == precision
    assert kind in exported_kinds(bundle) and f"{kind}/graphs" not in exported_kinds(bundle)
    told.clear()
    assert export_tensorrt(bundle, **options) == manifest
    assert told == ["decoder: kept"]


def test_stale_and_damaged_graphs_are_made_anew(exported_lcm, tmp_path, monkeypatch):
    bundle = load_bundle(copy_bundle(exported_lcm, tmp_path / "copy"))
    made = []

    def cheap(graph, folder, precision):
        made.append(graph.role)
        return export_half(replace(wave_graph(), role=graph.role), folder, precision)

    monkeypatch.setattr(onnx_half, "export_half", cheap)

    def remake():
        made.clear()
        half_graphs(bundle, "fp16", ("decoder",), lambda part: None)
        return list(made)

    assert remake() == ["decoder"]
    assert remake() == []
    kind = "tensorrt-fp16/graphs"
    path = engine_folder(bundle, kind) / read_manifest(bundle, kind).roles["decoder"].file
    path.write_bytes(path.read_bytes()[:-1])
    assert remake() == ["decoder"]
    monkeypatch.setattr(onnx_half, "version", lambda name: "9.9")
    assert remake() == ["decoder"]
