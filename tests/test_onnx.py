"""The ONNX export: names and free axes as the engine table has them, reproducible bytes, nothing of this machine."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep.export.graphs import random_feeds, role_graph
from fewstep.export.onnx import export_onnx, export_role
from fewstep.models.bundle import Bundle, load_bundle
from fewstep.models.files import sha256_of
from fewstep.runtime.engines.manifest import engine_folder, read_manifest
from fewstep.runtime.errors import EngineUnavailable
from tiny import copy_bundle

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

RESIDUALS = [f"residual_{k}" for k in range(5)]
TABLE = {
    "text": (["ids"], ["ctx"]),
    "denoiser": (["x", "t", "ctx", "w"], ["f"]),
    "denoiser+control": (["x", "t", "ctx", "w", *RESIDUALS], ["f"]),
    "controlnet": (["x", "t", "ctx", "edge", "scale"], RESIDUALS),
    "decoder": (["latent"], ["picture"]),
    "encoder": (["picture"], ["latent"]),
}


def test_every_role_with_the_names_of_the_engine_table(exported_lcm):
    roles = read_manifest(exported_lcm, "onnx").roles
    assert {r: ([p.name for p in g.inputs], [p.name for p in g.outputs]) for r, g in roles.items()} == TABLE
    assert all(port.shape[0] == "batch" for graph in roles.values() for port in (*graph.inputs, *graph.outputs))
    assert {p.name: p.shape for p in roles["denoiser"].inputs}["t"] == ("batch",)
    assert roles["denoiser+control"].file == "denoiser_control.onnx"


def test_manifest_binds_files_weights_and_producers(exported_lcm):
    manifest = read_manifest(exported_lcm, "onnx")
    folder = engine_folder(exported_lcm, "onnx")
    assert (manifest.opset, manifest.precision, manifest.weights_digest) == (21, "fp32", exported_lcm.weights_digest)
    assert manifest.producers["torch"] == torch.__version__
    assert all(graph.sha256 == sha256_of(folder / graph.file) for graph in manifest.roles.values())


def test_nothing_of_this_machine_is_shipped(exported_lcm):
    import onnx

    for path in engine_folder(exported_lcm, "onnx").glob("*.onnx"):
        data = path.read_bytes()
        for trace in (b"site-packages", b".py", str(exported_lcm.root).encode()):
            assert trace not in data, path.name
        proto = onnx.load(path)
        assert not proto.graph.value_info and not any(node.metadata_props for node in proto.graph.node)
        assert [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")] == [21]
        onnx.checker.check_model(proto)


def test_the_same_weights_give_the_same_bytes(exported_lcm, tmp_path):
    again = export_role(role_graph(exported_lcm, "decoder"), tmp_path)
    assert again == read_manifest(exported_lcm, "onnx").roles["decoder"]


def test_a_denoiser_without_guidance_input(tiny_teacher, tmp_path):
    graph = export_role(role_graph(tiny_teacher, "denoiser"), tmp_path)
    assert [port.name for port in graph.inputs] == ["x", "t", "ctx"]
    feeds = random_feeds(tiny_teacher, "denoiser", batch=3, size=(32, 32), seed=1)
    session = ort.InferenceSession(tmp_path / "denoiser.onnx")
    (out,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    np.testing.assert_allclose(out, tiny_teacher.denoiser_net()(*feeds.values()).numpy(), atol=1e-5)


def test_what_torch_cannot_export_is_said_in_one_line(exported_lcm, tmp_path):
    class Fickle(torch.nn.Module):
        def forward(self, latent):
            return latent if latent.sum() > 0 else -latent

    graph = replace(role_graph(exported_lcm, "decoder"), module=Fickle())
    with pytest.raises(EngineUnavailable, match=r"cannot export 'decoder' \(.+\); use --engine torch$") as caught:
        export_role(graph, tmp_path)
    assert "\n" not in str(caught.value)


def test_large_weights_go_beside_the_graph(exported_lcm, tmp_path):
    graph = export_role(role_graph(exported_lcm, "decoder"), tmp_path, external_over_bytes=0)
    assert graph.data_sha256 == sha256_of(tmp_path / "decoder.onnx.data")
    feeds = random_feeds(exported_lcm, "decoder", batch=2, size=(32, 32), seed=1)
    (out,) = ort.InferenceSession(tmp_path / "decoder.onnx").run(None, {"latent": feeds["latent"].numpy()})
    np.testing.assert_allclose(out, exported_lcm.decoder()(feeds["latent"]).numpy(), atol=1e-5)


def test_several_sizes_free_height_and_width(exported_lcm, tmp_path):
    sizes = ((32, 32), (48, 40))
    wide = Bundle(exported_lcm.root, "wide", replace(exported_lcm.spec, sizes=sizes))
    graph = export_role(role_graph(wide, "decoder"), tmp_path)
    assert isinstance(graph.inputs[0].shape[2], str) and isinstance(graph.inputs[0].shape[3], str)
    session = ort.InferenceSession(tmp_path / "decoder.onnx")
    for size in sizes:
        feeds = random_feeds(wide, "decoder", batch=3, size=size, seed=1)
        (out,) = session.run(None, {"latent": feeds["latent"].numpy()})
        assert out.shape == (3, 3, size[1], size[0])
        np.testing.assert_allclose(out, wide.decoder()(feeds["latent"]).numpy(), atol=1e-5)


def test_a_bundle_without_controlnet_has_fewer_roles(exported_lcm, tmp_path):
    import shutil

    root = copy_bundle(exported_lcm, tmp_path / "plain")
    shutil.rmtree(root / "controlnet")
    plain = Bundle(root, "plain", exported_lcm.spec)
    assert plain.roles == ("text", "denoiser", "decoder", "encoder")
    with pytest.raises(EngineUnavailable, match=r"'controlnet'; .* has the roles text, denoiser, decoder, encoder"):
        export_onnx(plain, roles=("controlnet",))


def test_an_unwritable_bundle_says_what_to_do(tiny_lcm, tmp_path):
    root = copy_bundle(tiny_lcm, tmp_path / "full")
    (root / "engines").write_text("in the way")
    with pytest.raises(EngineUnavailable, match=r"cannot be written .* export a copy of the bundle that you own"):
        export_onnx(load_bundle(root), roles=("decoder",))


def test_random_feeds_mix_times_and_repeat_for_a_seed(exported_lcm):
    one = random_feeds(exported_lcm, "denoiser+control", batch=3, size=(32, 32), seed=5)
    two = random_feeds(exported_lcm, "denoiser+control", batch=3, size=(32, 32), seed=5)
    assert list(one) == TABLE["denoiser+control"][0]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["t"][0] == 999.0 and len(set(one["t"].tolist())) == 3 and len(set(one["w"].tolist())) == 3
    assert all(float(one[name].abs().max()) > 0 for name in RESIDUALS)
