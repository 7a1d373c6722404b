"""ONNX Runtime behind the engine seam: equal to torch, indifferent to batches, loud when it cannot be had."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fewstep.export.graphs import random_feeds
from fewstep.export.parity import relative_error
from fewstep.models.bundle import load_bundle, seal_bundle
from fewstep.runtime.engines.manifest import engine_folder, read_manifest, write_manifest
from fewstep.runtime.engines.ort_engine import BoundCall, OrtEngine, provider_options, run_on_cpu, session_options
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineFailed, EngineUnavailable
from tiny import copy_bundle

ort = pytest.importorskip("onnxruntime")
ROLES = ("text", "denoiser", "denoiser+control", "controlnet", "decoder", "encoder")


@pytest.fixture(scope="module")
def engine(exported_lcm):
    engine = OrtEngine(exported_lcm, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(exported_lcm):
    return TorchEngine(exported_lcm)


def feeds_of(bundle, role, batch):
    return random_feeds(bundle, role, batch=batch, size=(32, 32), seed=batch)


def test_capabilities(engine):
    able = engine.capabilities
    assert (engine.name, able.device, able.takes_w, able.roles) == ("onnx", "cpu", True, frozenset(ROLES))
    assert able.batch_sizes == () and able.max_batch >= 8


@pytest.mark.parametrize("role", ROLES)
def test_equals_torch_at_any_batch(engine, reference, exported_lcm, role):
    for batch in (1, 3, engine.capabilities.max_batch):
        feeds = feeds_of(exported_lcm, role, batch)
        found, wanted = engine.run(role, feeds), reference.run(role, feeds)
        assert len(found) == len(wanted)
        assert all(out.dtype == torch.float32 for out in found)
        assert max(relative_error(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-5


def test_a_row_does_not_depend_on_its_neighbours(engine, exported_lcm):
    feeds = feeds_of(exported_lcm, "denoiser", 4)
    (together,) = engine.run("denoiser", feeds)
    for k in range(4):
        (alone,) = engine.run("denoiser", {name: value[k : k + 1] for name, value in feeds.items()})
        assert relative_error(alone, together[k : k + 1]) < 1e-5


def test_inputs_of_any_layout_and_none_is_changed(engine, reference, exported_lcm):
    feeds = feeds_of(exported_lcm, "denoiser", 2)
    strided = {**feeds, "x": feeds["x"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)}
    before = strided["x"].clone()
    (found,) = engine.run("denoiser", strided)
    assert relative_error(found, reference.run("denoiser", feeds)[0]) < 1e-5
    assert torch.equal(strided["x"], before)


def test_bound_memory_gives_the_same_bits_at_every_run(engine, exported_lcm):
    for role in ("text", "controlnet"):
        session, feeds = engine._session(role), feeds_of(exported_lcm, role, 2)
        bound = BoundCall(session, feeds)
        other = random_feeds(exported_lcm, role, batch=2, size=(32, 32), seed=99)
        for given in (feeds, other, feeds):
            wanted = [out.clone() for out in run_on_cpu(session, given)]
            assert all(torch.equal(a, b) for a, b in zip(bound.run(given), wanted, strict=True))


def test_buffers_are_bound_once_for_a_role_and_shapes(engine, exported_lcm, monkeypatch):
    made = []
    monkeypatch.setattr(
        "fewstep.runtime.engines.ort_engine.BoundCall", lambda *args: made.append(args) or BoundCall(*args)
    )
    for batch in (1, 2, 1):
        (found,) = engine._run_bound("decoder", feeds_of(exported_lcm, "decoder", batch))
        assert torch.equal(found, engine.run("decoder", feeds_of(exported_lcm, "decoder", batch))[0])
    assert len(made) == 2
    engine._bound.clear()


def test_tensorrt_keeps_its_engines_by_the_weights(exported_lcm):
    assert provider_options("CUDAExecutionProvider", exported_lcm) == {}
    kept = provider_options("TensorrtExecutionProvider", exported_lcm)
    assert kept["trt_engine_cache_path"] == kept["trt_timing_cache_path"]
    assert exported_lcm.weights_digest[:16] in kept["trt_engine_cache_path"]
    assert kept["trt_engine_cache_enable"] == kept["trt_timing_cache_enable"] == "True"


def test_a_bad_call_fails_and_the_next_one_works(engine, exported_lcm):
    feeds = feeds_of(exported_lcm, "denoiser", 1)
    with pytest.raises(EngineFailed, match=r"broke in 'denoiser': .*\bw\b"):
        engine.run("denoiser", {name: value for name, value in feeds.items() if name != "w"})
    with pytest.raises(EngineFailed, match="broke in 'denoiser'"):
        engine.run("denoiser", {**feeds, "x": feeds["x"][:, :2]})
    with pytest.raises(EngineFailed, match="cannot run 'upscaler'; it runs controlnet, decoder"):
        engine.run("upscaler", feeds)
    assert torch.isfinite(engine.run("denoiser", feeds)[0]).all()


def test_a_closed_engine_says_so(exported_lcm):
    engine = OrtEngine(exported_lcm, threads=1)
    engine.close()
    with pytest.raises(EngineFailed, match="closed"):
        engine.run("decoder", feeds_of(exported_lcm, "decoder", 1))


def test_threads_are_set_and_do_not_spin():
    options = session_options(ort, 3)
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert session_options(ort, None).intra_op_num_threads == torch.get_num_threads()


def test_an_absent_provider_is_named_with_the_remedy(exported_lcm):
    with pytest.raises(
        EngineUnavailable, match=r"no CUDAExecutionProvider; it has .*CPUExecutionProvider.*fewstep\[gpu\]"
    ):
        OrtEngine(exported_lcm, providers=("CUDAExecutionProvider",))


def test_a_silent_fall_back_to_the_cpu_is_an_error(exported_lcm, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *args, **settings: fallen)
    with pytest.raises(EngineUnavailable, match="'CUDAExecutionProvider' was asked for and 'CPUExecutionProvider'"):
        OrtEngine(exported_lcm, providers=("CUDAExecutionProvider",))


def test_damaged_files_and_changed_weights_are_refused(exported_lcm, tmp_path):
    bundle = load_bundle(copy_bundle(exported_lcm, tmp_path / "copy"))
    path = engine_folder(bundle, "onnx") / "decoder.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EngineUnavailable, match=r"decoder\.onnx changed since it was exported .*fewstep export"):
        OrtEngine(bundle)
    path.write_bytes(whole)
    config = bundle.root / "vae" / "config.json"
    config.write_text(config.read_text().replace("1.3", "1.4"))
    with pytest.raises(EngineUnavailable, match="made from other weights"):
        OrtEngine(seal_bundle(bundle.root, bundle.name, bundle.spec))


def test_open_engine_gives_it_threads(exported_lcm):
    engine = open_engine(exported_lcm, "onnx", threads=2)
    assert isinstance(engine, OrtEngine) and engine._options.intra_op_num_threads == 2
    engine.close()


@pytest.mark.parametrize(("kind", "first"), [("onnx-cuda", "CUDA"), ("onnx-tensorrt", "Tensorrt")])
def test_kinds_ask_for_their_provider_first(exported_lcm, tmp_path, monkeypatch, kind, first):
    from fewstep.export.variants import export_provider

    bundle = load_bundle(copy_bundle(exported_lcm, tmp_path / "copy"))
    source = replace(read_manifest(bundle, "onnx"), quality={"steps": {}}, budget={"error": 0.1}, costs={"roles": {}})
    write_manifest(bundle, source)
    manifest = export_provider(bundle, engine=kind)
    assert manifest.engine == kind and manifest.roles["decoder"].file == "../onnx/decoder.onnx"
    assert (
        not manifest.verified and manifest.parity == () and not (manifest.quality or manifest.budget or manifest.costs)
    )
    asked = []

    def session(file, options, providers, **settings):
        asked.append(providers)
        return SimpleNamespace(get_providers=lambda: [name for name, _ in providers])

    known = [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")]
    monkeypatch.setattr(ort, "get_available_providers", lambda: known)
    monkeypatch.setattr(ort, "InferenceSession", session)
    engine = open_engine(bundle, kind)
    assert engine.name == kind and engine.capabilities.device == "cuda"
    assert asked[0][0][0] == f"{first}ExecutionProvider" and asked[0][-1][0] == "CPUExecutionProvider"
