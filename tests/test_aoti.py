"""AOTInductor packages: compiled once, equal to torch at any batch, and never loaded where they do not belong."""

import json

import pytest
import torch

from fewstep.export.aoti import export_aoti
from fewstep.export.graphs import random_feeds
from fewstep.export.parity import relative_error
from fewstep.models.bundle import load_bundle
from fewstep.models.files import sha256_of
from fewstep.runtime.engines import aoti_engine
from fewstep.runtime.engines.compiled_engine import cpp_compiler
from fewstep.runtime.engines.manifest import Graph, Manifest, Port, engine_folder, read_manifest, write_manifest
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineFailed, EngineUnavailable
from tiny import copy_bundle


@pytest.fixture
def planted(tiny_lcm, tmp_path):
    """A bundle whose package is some bytes: enough for every check that comes before loading."""
    bundle = load_bundle(copy_bundle(tiny_lcm, tmp_path / "planted"))
    path = engine_folder(bundle, "aoti") / "decoder.pt2"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a package")
    port = Port(name="latent", dtype="float32", shape=("batch", 4, 16, 16))
    graph = Graph(file=path.name, sha256=sha256_of(path), inputs=(port,), outputs=(port,))
    manifest = Manifest(
        engine="aoti", precision="fp32", opset=0, roles={"decoder": graph}, producers={},
        weights_digest=bundle.weights_digest, build=aoti_engine.build_facts("cpu"),
    )  # fmt: skip
    write_manifest(bundle, manifest)
    return bundle


def rebuild(bundle, **facts):
    path = engine_folder(bundle, "aoti") / "manifest.json"
    data = json.loads(path.read_text())
    data["build"].update(facts)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"torch": "2.0.0"}, f"torch '2.0.0', and here it is '{torch.__version__}'; run `fewstep export .*aoti` here"),
        ({"cpu_features": ["avx9000"]}, "a CPU with avx9000, which this one lacks"),
        ({"device": "cuda"}, "built for cuda and torch sees no CUDA device"),
        ({"device": "tpu"}, "does not say what device"),
    ],
)
def test_a_package_of_elsewhere_is_refused_before_it_is_loaded(planted, monkeypatch, facts, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: pytest.fail("loaded"))
    rebuild(planted, **facts)
    with pytest.raises(EngineUnavailable, match=said.replace("+", r"\+")):
        open_engine(planted, "aoti")


def test_a_changed_package_is_not_loaded(planted, monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: pytest.fail("loaded"))
    (engine_folder(planted, "aoti") / "decoder.pt2").write_bytes(b"other code")
    with pytest.raises(EngineUnavailable, match=r"decoder\.pt2 changed since it was exported"):
        open_engine(planted, "aoti")


def test_what_is_no_package_is_named(planted):
    with pytest.raises(EngineUnavailable, match=r"decoder\.pt2 cannot be loaded .*; run `fewstep export"):
        open_engine(planted, "aoti")


def test_export_names_what_is_missing(tiny_lcm, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match="device is 'cuda' and torch sees no CUDA"):
        export_aoti(tiny_lcm, device="cuda")
    with pytest.raises(EngineUnavailable, match="precision is 'int8'; the engine 'aoti' has fp32, bf16"):
        export_aoti(tiny_lcm, precision="int8")
    monkeypatch.setattr("fewstep.export.aoti.cpp_compiler", lambda: None)
    with pytest.raises(EngineUnavailable, match="needs a C\\+\\+ compiler"):
        export_aoti(tiny_lcm)


@pytest.mark.skipif(cpp_compiler() is None, reason="torch compiles with a C++ compiler, and none is here")
def test_a_package_equals_torch_at_any_batch(tiny_lcm, tmp_path):
    bundle = load_bundle(copy_bundle(tiny_lcm, tmp_path / "lcm"))
    told = []
    export_aoti(bundle, roles=("decoder",), progress=told.append)
    assert told == ["decoder"]
    manifest = read_manifest(bundle, "aoti")
    assert not manifest.verified and manifest.roles["decoder"].inputs[0].shape == ("batch", 4, 16, 16)
    assert [path.name for path in engine_folder(bundle, "aoti").iterdir()].count("decoder.pt2") == 1
    assert sorted(path.name for path in engine_folder(bundle, "aoti").iterdir()) == ["decoder.pt2", "manifest.json"]
    engine, reference = open_engine(bundle, "aoti"), TorchEngine(bundle)
    assert engine.capabilities.roles == {"decoder"} and engine.capabilities.device == "cpu"
    for batch in (1, 3, 8):
        feeds = random_feeds(bundle, "decoder", batch=batch, size=(32, 32), seed=batch)
        assert relative_error(engine.run("decoder", feeds)[0], reference.run("decoder", feeds)[0]) < 1e-5
    with pytest.raises(EngineFailed, match="it was not given 'latent'"):
        engine.run("decoder", {})
    with pytest.raises(EngineFailed, match="cannot run 'text'; it runs decoder"):
        engine.run("text", {})
    assert torch.isfinite(engine.run("decoder", feeds)[0]).all()
    engine.close()
    with pytest.raises(EngineFailed, match="closed"):
        engine.run("decoder", feeds)
