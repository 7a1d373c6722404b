import pytest
import torch

from fewstep.models.errors import BundleError
from fewstep.runtime.engine import CONTROLNET, DECODER, DENOISER, DENOISER_CONTROL, ENCODER, TEXT
from fewstep.runtime.engines import registry
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineFailed, EngineUnavailable


@pytest.fixture(scope="module")
def engine(tiny_teacher):
    return TorchEngine(tiny_teacher)


def feeds(batch=2):
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, 4, 16, 16, generator=g),
        "t": torch.tensor([999.0, 259.0][:batch]),
        "ctx": torch.randn(batch, 24, 32, generator=g),
    }


def test_roles_and_shapes(engine, tiny_teacher):
    assert engine.capabilities.roles == {TEXT, DENOISER, DENOISER_CONTROL, CONTROLNET, DECODER, ENCODER}
    assert not engine.capabilities.takes_w
    (ctx,) = engine.run(TEXT, {"ids": torch.zeros(2, 24, dtype=torch.int64)})
    assert ctx.shape == (2, 24, 32)
    (f,) = engine.run(DENOISER, feeds())
    assert f.shape == (2, 4, 16, 16)
    edge = {"edge": torch.rand(2, 3, 32, 32), "scale": torch.ones(2)}
    residuals = engine.run(CONTROLNET, {**feeds(), **edge})
    more = {f"residual_{k}": r for k, r in enumerate(residuals)}
    (steered,) = engine.run(DENOISER_CONTROL, {**feeds(), **more})
    assert not torch.allclose(steered, f, atol=1e-3)
    zero = {name: torch.zeros_like(r) for name, r in more.items()}
    assert torch.equal(engine.run(DENOISER_CONTROL, {**feeds(), **zero})[0], f), "zero residuals are no residuals"
    (picture,) = engine.run(DECODER, {"latent": torch.zeros(1, 4, 16, 16)})
    assert picture.shape == (1, 3, 32, 32)
    (latent,) = engine.run(ENCODER, {"picture": picture})
    assert latent.shape == (1, 4, 16, 16)


def test_it_is_the_networks_themselves(engine, tiny_teacher):
    with torch.inference_mode():
        expected = tiny_teacher.denoiser_net()(*feeds().values())
    assert torch.equal(engine.run(DENOISER, feeds())[0], expected)


def test_a_student_takes_w(tiny_lcm):
    engine = TorchEngine(tiny_lcm)
    assert engine.capabilities.takes_w
    one, three = (engine.run(DENOISER, {**feeds(1), "w": torch.tensor([w])})[0] for w in (1.0, 3.0))
    assert not torch.equal(one, three)
    with pytest.raises(ValueError, match="pass w"):
        engine.run(DENOISER, feeds(1))


def test_errors_are_typed_and_leave_it_usable(engine):
    with pytest.raises(EngineFailed, match="broke in 'denoiser'"):
        engine.run(DENOISER, {**feeds(), "x": torch.zeros(2, 3, 16, 16)})
    with pytest.raises(EngineFailed, match="cannot run 'scorer'"):
        engine.run("scorer", {"x": torch.zeros(1)})
    assert torch.isfinite(engine.run(DENOISER, feeds())[0]).all()


def test_a_closed_engine_runs_nothing(tiny_dmd2):
    engine = TorchEngine(tiny_dmd2)
    engine.close()
    for role in (DENOISER, ENCODER):
        with pytest.raises(EngineFailed, match="cannot run"):
            engine.run(role, feeds())


def test_a_missing_device_is_named(tiny_teacher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match="cuda"):
        TorchEngine(tiny_teacher, device="cuda")


def test_open_engine_chooses(tiny_teacher, monkeypatch):
    assert open_engine(tiny_teacher).name == "torch", "auto without an export"
    assert open_engine(tiny_teacher, "torch").name == "torch"
    with pytest.raises(EngineUnavailable, match=r"'cuda-graphs' is unknown; use one of auto, torch, .*onnx.*openvino"):
        open_engine(tiny_teacher, "cuda-graphs")
    monkeypatch.setattr(registry, "installed", lambda package: False)
    with pytest.raises(EngineUnavailable, match="needs the package onnxruntime"):
        open_engine(tiny_teacher, "onnx")


def test_only_a_verified_export_of_the_same_weights_is_usable(tiny_dmd2, tmp_path):
    from dataclasses import replace

    from fewstep.models.bundle import load_bundle
    from fewstep.runtime.engines.manifest import Manifest, write_manifest
    from tiny import copy_bundle

    bundle = load_bundle(copy_bundle(tiny_dmd2, tmp_path / "copy"))
    digest = bundle.weights_digest
    manifest = Manifest(engine="onnx", precision="fp32", opset=21, roles={}, weights_digest=digest, producers={})
    assert not registry.usable_export(bundle, "onnx")
    stale = {"verified": True, "weights_digest": "0"}
    for changes, usable in (({"verified": True}, True), ({}, False), (stale, False)):
        path = write_manifest(bundle, replace(manifest, **changes))
        assert registry.usable_export(bundle, "onnx") is usable
    path.write_text("{")
    assert not registry.usable_export(bundle, "onnx")


def test_a_bundle_without_a_controlnet_has_no_control(tmp_path):
    from tiny import make_tiny_bundle

    bundle = make_tiny_bundle(tmp_path / "bare", kind="dmd2", control=False)
    engine = TorchEngine(bundle)
    assert {CONTROLNET, DENOISER_CONTROL} & engine.capabilities.roles == set()
    with pytest.raises(BundleError, match="controlnet"):
        bundle.controlnet()
