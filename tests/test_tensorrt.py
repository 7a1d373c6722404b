"""TensorRT engines, really parsed and built: every role, what goes in, the caches, and everything that is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fewstep.export import commands
from fewstep.export import tensorrt as exporter
from fewstep.export import verify as verifier
from fewstep.export.graphs import axis_lengths, random_feeds
from fewstep.export.parity import relative_error
from fewstep.export.tensorrt import export_tensorrt, key_of, parses_and_builds
from fewstep.export.tensorrt_build import Settings, build_engine, profiles_of
from fewstep.models.bundle import load_bundle
from fewstep.models.files import sha256_of, write_whole
from fewstep.runtime.engines.manifest import (
    checked_files,
    engine_folder,
    read_manifest,
    write_manifest,
)  # fmt: skip
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.engines.tensorrt_flavour import FLAVOURS, TensorRT, load_tensorrt
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineUnavailable
from tiny import copy_bundle

trt = pytest.importorskip("tensorrt_rtx")
SMALL = ("decoder", "encoder")
QUICK = {"roles": SMALL, "level": 0, "batches": ((1, 1, 1), (2, 2, 4))}


@pytest.fixture
def proven(exported_lcm, tmp_path):
    """A private copy whose ONNX graphs count as verified."""
    bundle = load_bundle(copy_bundle(exported_lcm, tmp_path / "proven"))
    write_manifest(bundle, replace(read_manifest(bundle, "onnx"), verified=True))
    return bundle


def export(bundle, **changes):
    told = []
    manifest = export_tensorrt(bundle, progress=told.append, **{**QUICK, **changes})
    return manifest, told


def module_with(**changes):
    return TensorRT(FLAVOURS["tensorrt-rtx"], SimpleNamespace(**{**vars(trt), **changes}))


def plans(bundle):
    return sorted(path.name for path in engine_folder(bundle, "tensorrt").iterdir())


def test_every_role_parses_and_builds(exported_lcm):
    assert parses_and_builds(exported_lcm) == dict.fromkeys(exported_lcm.roles)


def test_what_cannot_be_built_is_told_by_role(proven):
    onnx = pytest.importorskip("onnx")
    manifest = read_manifest(proven, "onnx")
    path = engine_folder(proven, "onnx") / manifest.roles["decoder"].file
    proto = onnx.load(path)
    proto.graph.node[0].op_type = "Hardswoosh"
    path.write_bytes(proto.SerializeToString())
    graph = replace(manifest.roles["decoder"], sha256=sha256_of(path))
    write_manifest(proven, replace(manifest, roles={**manifest.roles, "decoder": graph}))
    found = parses_and_builds(proven, SMALL)
    assert found["encoder"] is None
    assert "cannot parse the graph of 'decoder': Hardswoosh node" in found["decoder"]


def test_the_manifest_says_what_was_built_and_that_nothing_ran_it(proven):
    manifest, told = export(proven)
    source = read_manifest(proven, "onnx")
    assert read_manifest(proven, "tensorrt") == read_manifest(proven, manifest.engine)
    assert told == ["decoder: built", "encoder: built"]
    assert (manifest.executed_on, manifest.verified, manifest.parity) == (None, False, ())
    for role in SMALL:
        graph = manifest.roles[role]
        assert (graph.inputs, graph.outputs) == (source.roles[role].inputs, source.roles[role].outputs)
        assert checked_files(proven, manifest)[role].stat().st_size > 10_000
    build = manifest.build
    assert (build["flavour"], build["version"], build["device"]) == ("tensorrt-rtx", trt.__version__, None)
    assert build["batches"] == [[1, 1, 1], [2, 2, 4]]
    key = build["roles"]["decoder"]["key"]
    assert key["profiles"] == [
        {"latent": [[1, 4, 16, 16], [1, 4, 16, 16], [1, 4, 16, 16]]},
        {"latent": [[2, 4, 16, 16], [2, 4, 16, 16], [4, 4, 16, 16]]},
    ]
    assert key["graph"] == source.roles["decoder"].sha256


def test_the_real_builder_gets_the_profiles_and_settings(proven):
    made = []

    class Watched(trt.Builder):
        def create_network(self, flags):
            made.append(super().create_network(flags))
            return made[-1]

        def create_builder_config(self):
            made.append(super().create_builder_config())
            return made[-1]

    export_tensorrt(proven, roles=("decoder",), level=1, tensorrt=module_with(Builder=Watched))
    network, config = made
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert config.num_optimization_profiles == 3
    assert config.builder_optimization_level == 1
    assert not config.get_flag(trt.BuilderFlag.TF32) and not config.get_flag(trt.BuilderFlag.REFIT)
    assert [network.get_input(k).name for k in range(network.num_inputs)] == ["latent"]


def test_graphs_without_proof_are_refused_with_the_command(exported_lcm, tmp_path):
    bundle = load_bundle(copy_bundle(exported_lcm, tmp_path / "copy"))
    write_manifest(bundle, replace(read_manifest(bundle, "onnx"), verified=False))
    with pytest.raises(EngineUnavailable, match=r"has not passed parity .*run `fewstep export .* --engine onnx`"):
        export(bundle)
    manifest = read_manifest(bundle, "onnx")
    write_manifest(bundle, replace(manifest, verified=True, roles={"text": manifest.roles["text"]}))
    with pytest.raises(EngineUnavailable, match="lacks 'decoder'"):
        export(bundle)
    write_manifest(bundle, replace(manifest, verified=True, weights_digest="0" * 64))
    with pytest.raises(EngineUnavailable, match=r"made from other weights; run `fewstep export .* --engine onnx`"):
        export(bundle)
    (engine_folder(bundle, "onnx") / "manifest.json").unlink()
    with pytest.raises(EngineUnavailable, match="has no onnx engine; run"):
        export(bundle)
    assert not engine_folder(bundle, "tensorrt").exists()


def test_a_second_start_builds_nothing_and_keeps_what_was_proven(proven):
    first, _ = export(proven)
    said = {"budget": {"error": 0.1}, "quality": {"steps": {}}, "costs": {"device": "cuda:0"}}
    ran = replace(read_manifest(proven, "tensorrt"), executed_on={"device": "Fake 100"}, verified=True, **said)
    write_manifest(proven, ran)
    again, told = export(proven)
    assert told == ["decoder: kept", "encoder: kept"]
    assert again == ran and again.roles == first.roles


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"batches": ((1, 2, 4),)}, "profiles"), ({"level": 1}, "settings")],
)
def test_a_changed_setting_builds_anew_and_says_which(proven, changes, named):
    export(proven)
    before = plans(proven)
    manifest, told = export(proven, **changes)
    assert told == [f"{role}: built, {named} changed" for role in SMALL]
    assert (manifest.executed_on, manifest.verified) == (None, False)
    assert len(plans(proven)) == len(before) and plans(proven) != before  # the old ones are gone


def test_a_changed_version_builds_anew_and_says_so(proven):
    export(proven)
    manifest, told = export(proven, tensorrt=module_with(__version__="9.9"))
    assert told == [f"{role}: built, version changed" for role in SMALL]
    assert manifest.producers["tensorrt-rtx"] == manifest.build["version"] == "9.9"


def test_the_key_is_made_of_everything_that_matters(proven):
    graph = read_manifest(proven, "onnx").roles["decoder"]
    arguments = {
        "bundle": proven, "graph": graph, "tensorrt": load_tensorrt("tensorrt-rtx"), "device": None,
        "precision": "fp32", "settings": Settings(), "profiles": [{"x": ((1,), (1,), (1,))}],
    }  # fmt: skip
    key = key_of(**arguments)
    other = SimpleNamespace(weights_digest="0")
    enterprise = TensorRT(FLAVOURS["tensorrt"], trt)
    changes = [
        ({"bundle": other}, {"weights"}),
        ({"graph": replace(graph, sha256="0")}, {"graph"}),
        ({"graph": replace(graph, data_sha256="0")}, {"weights"}),
        ({"tensorrt": enterprise}, {"flavour"}),
        ({"tensorrt": module_with(__version__="0")}, {"version"}),
        ({"device": {"device": "Fake 100", "capability": "9.0"}}, {"device"}),
        ({"precision": "fp16"}, {"precision"}),
        ({"settings": Settings(refit=True)}, {"settings"}),
        ({"profiles": [{"x": ((1,), (2,), (2,))}]}, {"profiles"}),
    ]
    for change, named in changes:
        found = key_of(**{**arguments, **change})
        assert {name for name in key if key[name] != found[name]} == named
    assert set().union(*(named for _, named in changes)) == set(key)


def test_a_damaged_engine_is_built_anew(proven):
    manifest, _ = export(proven)
    path = checked_files(proven, manifest)["decoder"]
    path.write_bytes(path.read_bytes()[:-1])
    again, told = export(proven)
    assert told == ["decoder: built, its file changed", "encoder: kept"]
    assert checked_files(proven, again)


def test_a_killed_build_leaves_the_old_engine_and_loses_no_finished_role(proven, monkeypatch):
    old, _ = export(proven, batches=((1, 1, 1),))
    real = exporter.build_engine

    def killed(tensorrt, role, *rest, **options):
        if role == "encoder":
            raise KeyboardInterrupt
        return real(tensorrt, role, *rest, **options)

    monkeypatch.setattr(exporter, "build_engine", killed)
    with pytest.raises(KeyboardInterrupt):
        export(proven)
    assert checked_files(proven, read_manifest(proven, "tensorrt")) == checked_files(proven, old)
    monkeypatch.undo()
    stray = engine_folder(proven, "tensorrt") / "encoder.0123.plan.partial"
    stray.write_bytes(b"half")  # as a kill in the middle of writing leaves it
    manifest, told = export(proven)
    assert told == ["decoder: kept", "encoder: built, profiles changed"]
    assert plans(proven) == sorted(["manifest.json", *(graph.file for graph in manifest.roles.values())])


def test_a_file_in_the_making_is_never_taken_for_a_whole_one(tmp_path):
    path = tmp_path / "engine.plan"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "text where bytes belong")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_failed_build_leaves_the_old_engine(proven):
    old, _ = export(proven)
    with pytest.raises(EngineUnavailable):
        export(proven, batches=((1, 1, 1), (4, 2, 8)))
    assert checked_files(proven, read_manifest(proven, "tensorrt")) == checked_files(proven, old)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batches": ()}, r"cannot build 'decoder' with 0 profiles .*no optimization profile has been defined"),
        ({"batches": ((4, 2, 8),)}, r"refuses profile 0 of 'decoder', .*MIN<=OPT<=MAX.*give --batches as"),
        ({"batches": ((1, 1, 33),)}, r"batches has \(1, 1, 33\); graphs are exported for batches of 1 to 32"),
        ({"batches": ((0, 1, 1),)}, r"batches has \(0, 1, 1\)"),
        ({"roles": ("upscaler",)}, r"role is 'upscaler'; .* has the roles text, denoiser"),
        ({"precision": "fp4"}, r"precision is 'fp4'; the engine 'tensorrt' has fp32, fp16, bf16"),
        ({"flavour": "lean"}, r"flavour is 'lean'; use one of auto, tensorrt, tensorrt-rtx"),
    ],
)
def test_wrong_wishes_are_refused(proven, changes, said):
    with pytest.raises(EngineUnavailable, match=said):
        export(proven, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_to_be_built_says_so(proven):
    with pytest.raises(EngineUnavailable, match=r"on the GPU that it is for, and torch .* sees no CUDA device"):
        export(proven, refit=True)
    with pytest.raises(EngineUnavailable, match="the flavour tensorrt-rtx builds without one"):
        export(proven, tensorrt=TensorRT(FLAVOURS["tensorrt"], trt))


def test_a_folder_that_cannot_be_written_is_said(proven, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "write_whole", full)
    with pytest.raises(EngineUnavailable, match=r"cannot be written .*No space left"):
        export(proven)


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_measured_kernels_are_kept_for_the_next_build_by_the_flavour_that_measures(proven, tmp_path):
    graph = read_manifest(proven, "onnx").roles["decoder"]
    path = engine_folder(proven, "onnx") / graph.file
    profiles = profiles_of(graph, [(1, 1, 1)], axis_lengths(proven))
    timings = tmp_path / "timings.cache"
    for flavour, written in (("tensorrt-rtx", False), ("tensorrt", True), ("tensorrt", True)):
        engine = build_engine(
            TensorRT(FLAVOURS[flavour], trt), "decoder", path, graph, profiles, Settings(level=0), timings=timings
        )
        assert engine.nbytes > 10_000
        assert timings.is_file() == written


def test_the_command_builds_and_says_that_nothing_ran(proven, capsys, monkeypatch):
    monkeypatch.setattr(verifier, "device_here", lambda: None)
    command = [str(proven.root), "--engine", "tensorrt", "--roles", "decoder", "--level", "0", "--batches", "1-2-4"]
    assert commands.export(command) == 0
    assert "tensorrt was built and never run: no GPU here; `fewstep verify" in capsys.readouterr().out
    manifest = read_manifest(proven, "tensorrt")
    assert (manifest.build["batches"], manifest.executed_on, manifest.verified) == ([[1, 2, 4]], None, False)
    with pytest.raises(EngineUnavailable, match="never run on a GPU"):
        open_engine(proven, "tensorrt")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--batches", "1-4", "'1-4' is no range"), ("--level", "9", "'9' is no level"), ("--refit", "1", "neither yes")],
)
def test_the_command_refuses_wrong_values(proven, capsys, option, value, said):
    with pytest.raises(SystemExit):
        commands.export([str(proven.root), "--engine", "tensorrt", option, value])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("right", [True, False])
def test_a_device_is_written_down_only_by_an_engine_that_ran_there_and_agreed(proven, monkeypatch, right):
    export(proven, roles=("decoder",))
    opened = []

    class Stand(TorchEngine):
        def run(self, role, feeds):
            return tuple(out if right else -out for out in super().run(role, feeds))

    def open_as_torch(bundle, kind, **options):
        opened.append((kind, options))
        return Stand(bundle)

    monkeypatch.setattr(verifier, "open_engine", open_as_torch)
    monkeypatch.setattr(verifier, "measure_costs", lambda engine, bundle: {})
    monkeypatch.setattr(verifier, "device_here", lambda: {"device": "Fake 100", "capability": "9.0"})
    report = verifier.verify(proven, kinds=("tensorrt",))
    assert opened == [("tensorrt", {"allow_unproven": True})] and report.ok is right
    manifest = read_manifest(proven, "tensorrt")
    assert manifest.verified is right
    assert manifest.executed_on == ({"device": "Fake 100", "capability": "9.0"} if right else None)


def test_keys_are_plain_json(proven):
    manifest, _ = export(proven)
    assert json.loads(json.dumps(manifest.build)) == manifest.build


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_runs_it_as_torch_does_and_then_it_opens(proven, precision):
    command = [str(proven.root), "--engine", "tensorrt", "--precision", precision]
    assert commands.export(command) == 0
    kind = "tensorrt" if precision == "fp32" else f"tensorrt-{precision}"
    manifest = read_manifest(proven, kind)
    assert manifest.verified and manifest.executed_on["device"] == torch.cuda.get_device_name(0)
    for graphs in (True, False):
        engine = open_engine(proven, kind, cuda_graphs=graphs)
        feeds = random_feeds(proven, "decoder", batch=4, size=proven.spec.sizes[0], seed=1)
        on_device = {name: value.to(engine.capabilities.device) for name, value in feeds.items()}
        first, second = (engine.run("decoder", on_device)[0].clone() for _ in range(2))
        assert torch.equal(first, second) and engine.memory_bytes()["scratch"] > 0
        engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_refits_weights_to_what_a_build_with_them_gives(proven):
    export_tensorrt(proven, roles=("decoder",), refit=True)
    engine = open_engine(proven, "tensorrt", allow_unproven=True)
    feeds = random_feeds(proven, "decoder", batch=1, size=proven.spec.sizes[0], seed=1)
    on_device = {name: value.to(engine.capabilities.device) for name, value in feeds.items()}
    network = proven.network("decoder")
    name, bias = next((n, p) for n, p in reversed(list(network.named_parameters())) if n.endswith("bias"))
    engine.refit("decoder", {f"network.{name}": bias.detach() + 1})
    with torch.no_grad():
        bias += 1
        wanted = network(feeds["latent"])
    assert relative_error(engine.run("decoder", on_device)[0].cpu(), wanted) < 1e-4
    engine.close()
