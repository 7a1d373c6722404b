"""OpenVINO behind the engine seam, in float32 and, where the CPU has it, in bfloat16."""

import pytest
import torch

from fewstep.export.graphs import random_feeds
from fewstep.export.openvino import export_openvino
from fewstep.export.parity import relative_error
from fewstep.models.bundle import load_bundle
from fewstep.runtime.engines import openvino_engine
from fewstep.runtime.engines.manifest import engine_folder, read_manifest
from fewstep.runtime.engines.openvino_engine import OpenVINOEngine
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineFailed, EngineUnavailable
from fewstep.runtime.sampling.step import run_batch
from tiny import copy_bundle

openvino = pytest.importorskip("openvino")
ROLES = ("text", "denoiser", "denoiser+control", "controlnet", "decoder", "encoder")
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16")


@pytest.fixture(scope="module")
def bundle(exported_lcm, tmp_path_factory):
    bundle = load_bundle(copy_bundle(exported_lcm, tmp_path_factory.mktemp("openvino") / "lcm"))
    export_openvino(bundle)
    if HAS_BF16:
        export_openvino(bundle, precision="bf16")
    return bundle


@pytest.fixture(scope="module")
def engine(bundle):
    return OpenVINOEngine(bundle, threads=1)


@pytest.fixture(scope="module")
def reference(bundle):
    return TorchEngine(bundle)


def worst(engine, reference, bundle, role, batch):
    feeds = random_feeds(bundle, role, batch=batch, size=(32, 32), seed=batch)
    found, wanted = run_batch(engine, role, feeds), reference.run(role, feeds)
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


@needs_bf16
def test_export_shares_the_onnx_files(bundle):
    manifest = read_manifest(bundle, "openvino-bf16")
    assert (manifest.engine, manifest.precision, manifest.verified) == ("openvino-bf16", "bf16", False)
    assert manifest.roles["text"].file == "../onnx/text.onnx"
    assert manifest.roles["text"].sha256 == read_manifest(bundle, "onnx").roles["text"].sha256
    assert [p.name for p in engine_folder(bundle, "openvino").iterdir()] == ["manifest.json"]
    with pytest.raises(EngineUnavailable, match="precision is 'int4'; the engine 'openvino' has fp32, bf16"):
        export_openvino(bundle, precision="int4")


@pytest.mark.parametrize("role", ROLES)
def test_equals_torch_and_pads_batches(engine, reference, bundle, role):
    assert engine.capabilities.batch_sizes == (1, 2, 4, 8)
    for batch in (1, 3):
        assert worst(engine, reference, bundle, role, batch) < 1e-5


def test_batches_beyond_the_largest_are_split(engine, reference, bundle):
    assert worst(engine, reference, bundle, "decoder", 11) < 1e-5


@needs_bf16
@pytest.mark.parametrize("role", ROLES)
def test_bf16_stays_within_its_tolerance(bundle, reference, role):
    engine = open_engine(bundle, "openvino-bf16", threads=1)
    assert engine.name == "openvino-bf16"
    assert 1e-4 < worst(engine, reference, bundle, role, 3) < 2e-2


@needs_bf16
def test_a_role_that_rounding_spoils_stays_float32(bundle, monkeypatch):
    from fewstep.export import openvino as exporter

    onnx = read_manifest(bundle, "onnx")
    assert set(exporter.rounded_where_it_agrees(bundle, onnx).values()) == {"bf16"}
    monkeypatch.setitem(exporter.TOLERANCE, "bf16", 1e-6)
    assert set(exporter.rounded_where_it_agrees(bundle, onnx).values()) == {"fp32"}


@needs_bf16
def test_bf16_takes_sines_of_times_that_are_not_rounded(bundle, reference, monkeypatch):
    split = worst(OpenVINOEngine(bundle, threads=1, precision="bf16"), reference, bundle, "denoiser", 4)
    monkeypatch.setattr(openvino_engine, "split_head", lambda model: None)
    rounded = worst(OpenVINOEngine(bundle, threads=1, precision="bf16"), reference, bundle, "denoiser", 4)
    assert rounded > 2 * split


def test_bad_calls_fail_and_the_next_one_works(engine, bundle):
    feeds = random_feeds(bundle, "denoiser", batch=1, size=(32, 32), seed=1)
    with pytest.raises(EngineFailed, match=r"it was fed \['ctx', 't', 'x'\]; it takes \['x', 't', 'ctx', 'w'\]"):
        engine.run("denoiser", {name: value for name, value in feeds.items() if name != "w"})
    with pytest.raises(EngineFailed, match="broke in 'denoiser'"):
        engine.run("denoiser", {**feeds, "x": feeds["x"][:, :2]})
    with pytest.raises(EngineFailed, match=r"cannot run 'denoiser' for a batch of 3; it runs .*\(1, 2, 4, 8\)"):
        engine.run("denoiser", random_feeds(bundle, "denoiser", batch=3, size=(32, 32), seed=1))
    assert torch.isfinite(engine.run("denoiser", feeds)[0]).all()


def test_a_closed_engine_says_so(bundle):
    engine = OpenVINOEngine(bundle, threads=1)
    engine.close()
    with pytest.raises(EngineFailed, match="closed"):
        engine.run("decoder", random_feeds(bundle, "decoder", batch=1, size=(32, 32), seed=1))


def test_unknown_precisions_and_missing_exports_are_refused(bundle, exported_lcm):
    with pytest.raises(EngineUnavailable, match="precision is 'fp8'; use fp32, bf16, int8"):
        OpenVINOEngine(bundle, precision="fp8")
    with pytest.raises(EngineUnavailable, match="has no openvino engine; run `fewstep export"):
        OpenVINOEngine(exported_lcm)


def test_a_changed_onnx_file_is_refused(bundle, tmp_path):
    copy = load_bundle(copy_bundle(bundle, tmp_path / "copy"))
    (engine_folder(copy, "onnx") / "text.onnx").write_bytes(b"other")
    with pytest.raises(EngineUnavailable, match=r"text\.onnx changed since it was exported"):
        OpenVINOEngine(copy)
