"""The TensorRT engine's control flow on a recording fake, whose every name exists in the real module."""

import inspect
import json
from types import SimpleNamespace

import fake_tensorrt
import pytest
import torch

from fewstep.models.bundle import load_bundle
from fewstep.models.files import sha256_of
from fewstep.runtime.engines.manifest import Graph, Manifest, Port, engine_folder, read_manifest, write_manifest
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.engines.tensorrt_engine import TensorRTEngine
from fewstep.runtime.engines.tensorrt_flavour import FLAVOURS, TensorRT, load_tensorrt, said
from fewstep.runtime.engines.tensorrt_profiles import served_batches
from fewstep.runtime.errors import EngineFailed, EngineUnavailable
from tiny import copy_bundle

RTX = TensorRT(FLAVOURS["tensorrt-rtx"], fake_tensorrt)
ENTERPRISE = TensorRT(FLAVOURS["tensorrt"], fake_tensorrt)
DEVICE = {"device": "Fake 100", "capability": "9.0"}
PROFILES = [{"latent": [[low, 3], [usual, 3], [high, 3]]} for low, usual, high in ((1, 1, 1), (2, 4, 4), (5, 8, 8))]
PLAN = {
    "profiles": PROFILES,
    "inputs": ["latent"],
    "outputs": {"picture": [3]},
    "scratch": 512,
    "weights": {"conv.weight": 4, "conv.bias": 2},
}


@pytest.fixture
def bundle(tiny_dmd2, tmp_path):
    return load_bundle(copy_bundle(tiny_dmd2, tmp_path / "bundle"))


def install(bundle, tensorrt=RTX, *, kind="tensorrt", plans=None, device=None, executed_on=DEVICE, **build):
    """Engines as the exporter leaves them."""
    folder = engine_folder(bundle, kind)
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {}
    for role, plan in (plans or {"decoder": PLAN}).items():
        path = folder / f"{role}.plan"
        path.write_bytes(plan if isinstance(plan, bytes) else json.dumps(plan).encode())
        graphs[role] = Graph(
            file=path.name,
            sha256=sha256_of(path),
            inputs=(Port(name="latent", dtype="float32", shape=("batch", 3)),),
            outputs=(Port(name="picture", dtype="float32", shape=("batch", 3)),),
        )
    said_of_it = {"flavour": tensorrt.flavour.name, "version": tensorrt.version, "device": device}
    manifest = Manifest(
        engine=kind,
        precision="fp32",
        opset=21,
        roles=graphs,
        weights_digest=bundle.weights_digest,
        producers={},
        build={**said_of_it, "batches": [[1, 1, 1], [2, 4, 4], [5, 8, 8]], **build},
        executed_on=executed_on,
    )
    write_manifest(bundle, manifest)
    return manifest


def open_it(bundle, tensorrt=RTX, **options):
    return TensorRTEngine(bundle, tensorrt=tensorrt, **{"device": fake_tensorrt.RecordingDevice(), **options})


def latents(batch):
    return {"latent": torch.arange(batch * 3, dtype=torch.float32).reshape(batch, 3)}


def test_every_name_that_the_engine_uses_exists_in_the_real_module():
    real = pytest.importorskip("tensorrt_rtx")
    classes = {n: c for n, c in vars(fake_tensorrt).items() if inspect.isclass(c) and c.__module__ == "fake_tensorrt"}
    assert {"Runtime", "ICudaEngine", "IExecutionContext", "Refitter", "Weights"} < set(classes)
    del classes["RecordingDevice"]
    for name, fake in classes.items():
        used = {n for n in vars(fake) if not n.startswith("_")} | properties(fake)
        assert [n for n in used if not hasattr(getattr(real, name), n)] == [], name
    assert real.__version__ == load_tensorrt("tensorrt-rtx").version


def properties(fake):
    """Attributes that a fake sets on itself in __init__."""
    source = inspect.getsource(fake)
    return {
        w.split(".")[1].split(":")[0].split(" ")[0]
        for w in map(str.strip, source.splitlines())
        if w.startswith("self.") and not w.startswith("self._") and " = " in w
    }


def test_it_computes_what_the_engine_computes_at_any_batch(bundle):
    install(bundle)
    engine = open_it(bundle)
    for batch in (1, 4, 8, 1):
        feeds = latents(batch)
        (out,) = engine.run("decoder", feeds)
        assert torch.equal(out, 2 * feeds["latent"])
    contexts = engine._engines["decoder"]._contexts
    assert [c._profile for c in contexts] == [0, 1, 2]  # the second call at batch 1 prepared nothing
    assert contexts[0]._runs == [7, 7]
    assert {c._scratch for c in contexts} == {(engine._scratch.data_ptr(), 512)}
    engine.close()


def test_capabilities(bundle):
    install(bundle)
    able = open_it(bundle).capabilities
    assert (able.roles, able.max_batch, able.batch_sizes) == (frozenset({"decoder"}), 8, (1, 4, 8))
    assert open_it(bundle, cuda_graphs=False).capabilities.batch_sizes == ()


def test_batches_between_profiles_are_padded_to():
    assert served_batches([[1, 1, 1], [4, 4, 8]], tuned_only=False) == (1, 4, 5, 6, 7, 8)
    assert served_batches([[5, 8, 8], [1, 2, 4]], tuned_only=False) == ()
    assert served_batches([[5, 8, 8], [1, 2, 4]], tuned_only=True) == (2, 8)


def test_enterprise_is_captured_once_per_shape_and_replayed(bundle):
    install(bundle, ENTERPRISE, device=DEVICE)
    device = fake_tensorrt.RecordingDevice()
    engine = open_it(bundle, ENTERPRISE, device=device)
    for batch in (4, 4, 1):
        (out,) = engine.run("decoder", latents(batch))
        assert torch.equal(out, 2 * latents(batch)["latent"])
    assert (device.captured, device.replayed) == (2, 3)
    contexts = engine._engines["decoder"]._contexts
    assert [c._strategy for c in contexts] == ["user managed"] * 2
    assert len(contexts[0]._runs) == 4  # once before the capture, in it, and two replays


def test_no_call_reads_memory_that_nobody_wrote(bundle, monkeypatch):
    """Before a call can be captured it runs once, and what was left in memory are no token ids."""
    install(bundle, ENTERPRISE)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *given, **settings: empty(*given, **settings).fill_(99))
    engine = open_it(bundle, ENTERPRISE)
    engine.run("decoder", latents(1))
    (context,) = engine._engines["decoder"]._contexts
    assert len(context._fed) >= 1 and not any((fed == 99).any() for fed in context._fed)


def test_enterprise_does_without_what_only_rtx_has(bundle):
    rtx_only = ("CudaGraphStrategy", "IRuntimeConfig", "IRuntimeCache")
    module = SimpleNamespace(**{n: v for n, v in vars(fake_tensorrt).items() if n not in rtx_only})
    tensorrt = TensorRT(FLAVOURS["tensorrt"], module)
    install(bundle, tensorrt, device=DEVICE)
    engine = open_it(bundle, tensorrt)
    (out,) = engine.run("decoder", latents(4))
    assert torch.equal(out, 2 * latents(4)["latent"])
    engine.close()
    assert list(engine_folder(bundle, "tensorrt").glob("*.runtime_cache")) == []


def test_rtx_captures_by_itself_and_only_where_wanted(bundle):
    install(bundle)
    for wanted, strategy in ((True, "whole graph"), (False, "disabled")):
        device = fake_tensorrt.RecordingDevice()
        engine = open_it(bundle, device=device, cuda_graphs=wanted)
        engine.run("decoder", latents(1))
        config = engine._configs["decoder"]
        assert (device.captured, config.cuda_graph_strategy, config._strategy) == (0, strategy, "user managed")


def test_rtx_keeps_finished_kernels_for_the_next_start(bundle):
    install(bundle)
    file = engine_folder(bundle, "tensorrt") / "decoder.runtime_cache"
    for expected in (b"kernel;", b"kernel;kernel;"):
        engine = open_it(bundle)
        engine.run("decoder", latents(1))
        engine.close()
        assert file.read_bytes() == expected


def test_a_role_with_more_scratch_moves_it_and_all_stay_right(bundle):
    install(bundle, plans={"decoder": PLAN, "encoder": {**PLAN, "scratch": 2048}})
    engine = open_it(bundle)
    engine.run("decoder", latents(1))
    assert engine.memory_bytes()["scratch"] == 512
    engine.run("encoder", latents(1))
    (out,) = engine.run("decoder", latents(1))
    assert torch.equal(out, 2 * latents(1)["latent"])
    last = engine._engines["decoder"]._contexts[-1]
    assert last._scratch == (engine._scratch.data_ptr(), 2048)
    files = engine_folder(bundle, "tensorrt")
    assert engine.memory_bytes() == {
        "engine:decoder": (files / "decoder.plan").stat().st_size,
        "engine:encoder": (files / "encoder.plan").stat().st_size,
        "scratch": 2048,
        "buffers": 2 * 2 * 3 * 4,
    }


def test_calls_that_cannot_be_run(bundle):
    install(bundle)
    engine = open_it(bundle)
    with pytest.raises(EngineFailed, match=r"no profile of 'decoder' for latent \(9, 3\); .*\(5, 3\) to \(8, 3\)"):
        engine.run("decoder", latents(9))
    with pytest.raises(EngineFailed, match=r"fed \['x'\] for 'decoder'; it takes \['latent'\]"):
        engine.run("decoder", {"x": torch.zeros(1, 3)})
    with pytest.raises(EngineFailed, match="cannot run 'upscaler'; it runs decoder"):
        engine.run("upscaler", latents(1))
    engine.run("decoder", latents(1))
    engine._engines["decoder"]._contexts[0]._broken = True
    with pytest.raises(EngineFailed, match="broke in 'decoder': out of luck"):
        engine.run("decoder", latents(1))
    engine._engines["decoder"]._contexts[0]._broken = False
    engine.run("decoder", latents(1))
    engine.close()
    with pytest.raises(EngineFailed, match="it is closed"):
        engine.run("decoder", latents(1))


def test_an_engine_that_never_ran_is_refused_unless_told(bundle):
    install(bundle, executed_on=None)
    with pytest.raises(EngineUnavailable, match=r"has never run on a GPU; run `fewstep verify .*--allow-unproven"):
        open_it(bundle)
    (out,) = open_it(bundle, allow_unproven=True).run("decoder", latents(1))
    assert torch.equal(out, 2 * latents(1)["latent"])


def test_another_version_or_flavour_is_refused_with_both(bundle, monkeypatch):
    install(bundle, version="1.6.0")
    remedy = r"run `fewstep export .* --engine tensorrt`"
    with pytest.raises(EngineUnavailable, match=rf"built by tensorrt-rtx 1.6.0 and tensorrt-rtx 1.7.0 .*{remedy}"):
        open_it(bundle)
    install(bundle)
    with pytest.raises(EngineUnavailable, match=r"built by tensorrt-rtx 1.7.0 and tensorrt 1.7.0 is installed"):
        open_it(bundle, ENTERPRISE)


def test_another_device_is_refused_with_both_unless_engines_are_bound_to_none(bundle):
    other = fake_tensorrt.RecordingDevice("Fake 200", "10.0")
    install(bundle, ENTERPRISE, device=DEVICE)
    with pytest.raises(
        EngineUnavailable,
        match=r"for Fake 100 \(compute capability 9.0\) and this is Fake 200 \(compute capability 10.0\); run `fewstep",
    ):
        open_it(bundle, ENTERPRISE, device=other)
    install(bundle, device=None)
    open_it(bundle, device=other).close()


def test_other_precisions_have_engines_and_remedies_of_their_own(bundle):
    for kind in ("tensorrt-fp16", "tensorrt-bf16"):
        with pytest.raises(EngineUnavailable, match=f"has no {kind} engine; run .*--precision {kind[-4:]}"):
            open_engine(bundle, kind)
        install(bundle, kind=kind)
        engine = open_engine(bundle, kind, tensorrt=RTX, device=fake_tensorrt.RecordingDevice(), threads=3)
        assert (engine.name, engine._runtime.max_threads) == (kind, 3)


def test_a_manifest_without_its_build_is_refused(bundle):
    manifest = install(bundle)
    path = engine_folder(bundle, "tensorrt") / "manifest.json"
    data = json.loads(path.read_text())
    del data["build"]["version"]
    path.write_text(json.dumps(data))
    with pytest.raises(EngineUnavailable, match="does not say its version; run `fewstep export"):
        open_it(bundle)
    assert read_manifest(bundle, "tensorrt").roles == manifest.roles


def test_damaged_files_and_unreadable_engines_are_refused(bundle):
    install(bundle, plans={"decoder": b"garbage"})
    with pytest.raises(EngineUnavailable, match=r"cannot open .*decoder.plan: magic tag does not match$"):
        open_it(bundle)
    install(bundle)
    (engine_folder(bundle, "tensorrt") / "decoder.plan").write_bytes(b"{}")
    with pytest.raises(EngineUnavailable, match="changed since it was exported"):
        open_it(bundle)


def test_refit_gives_new_weights_and_prepares_again(bundle):
    install(bundle)
    engine = open_it(bundle)
    engine.run("decoder", latents(1))
    fake_tensorrt.Refitter._refitted.clear()
    engine.refit("decoder", {"conv.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t().half()})
    (given,) = fake_tensorrt.Refitter._refitted
    assert given["conv.weight"].tolist() == [1.0, 3.0, 2.0, 4.0]
    engine.run("decoder", latents(1))
    assert len(engine._engines["decoder"]._contexts) == 2


def test_refits_that_cannot_be(bundle):
    install(bundle, plans={"decoder": {**PLAN, "fused": [["conv.weight", "conv.bias"]]}})
    engine = open_it(bundle)
    with pytest.raises(EngineFailed, match=r"cannot refit 'lora' of 'decoder': it can change 2 weights; .*--refit"):
        engine.refit("decoder", {"lora": torch.zeros(1)})
    with pytest.raises(EngineFailed, match=r"refused 'conv\.weight' of 'decoder': conv\.weight has 4 values"):
        engine.refit("decoder", {"conv.weight": torch.zeros(3)})
    with pytest.raises(EngineFailed, match=r"needs \['conv.bias'\] of 'decoder' refitted with the others"):
        engine.refit("decoder", {"conv.weight": torch.zeros(4)})


def test_no_gpu_is_said(bundle):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    install(bundle)
    with pytest.raises(EngineUnavailable, match="sees no CUDA device, which TensorRT needs; use --engine onnx here"):
        TensorRTEngine(bundle, tensorrt=RTX)


def test_missing_packages_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(EngineUnavailable, match=r"pip install tensorrt \(.* or pip install tensorrt-rtx \("):
        load_tensorrt()
    with pytest.raises(EngineUnavailable, match=r"^tensorrt-rtx cannot be imported; pip install tensorrt-rtx"):
        load_tensorrt("tensorrt-rtx")
    with pytest.raises(EngineUnavailable, match="flavour is 'lean'; use one of auto, tensorrt, tensorrt-rtx"):
        load_tensorrt("lean")


def test_messages_lose_source_positions_and_the_missing_driver():
    driver = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In x at /_src/a.cpp:2 (cudaError 35))"
    real = "Error Code 4: API Usage Error (no profile. In validate at /_src/optimizer/api/network.cpp:4023)"
    assert said([real, driver, real]) == "Error Code 4: API Usage Error (no profile.)"
    assert "cudaError 35" in said([driver])
    assert said([]) == "it gave no reason"
