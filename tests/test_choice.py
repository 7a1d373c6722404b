"""The engine of least measured cost is taken, and only among those that may be taken at all."""

import json
import logging
import time
from dataclasses import replace

import pytest

from fewstep.models.bundle import load_bundle
from fewstep.runtime.engines import choice, manifest, registry
from fewstep.runtime.engines.built import NATIVE, built_here, remember
from fewstep.runtime.engines.choice import (
    command,
    explain,
    fastest_s,
    fingerprint,
    measure_costs,
    picture_cost_s,
    record_costs,
)
from fewstep.runtime.engines.fake_engine import FakeEngine
from fewstep.runtime.engines.manifest import Graph, Manifest, read_manifest, write_manifest
from fewstep.runtime.engines.registry import KINDS, open_engine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineUnavailable
from tiny import copy_bundle

HERE = {"cpu": "a processor", "cores": 2, "threads": 1}


@pytest.fixture
def bundle(tiny_lcm, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "fingerprint", lambda threads=None: HERE if threads is None else {"threads": threads})
    monkeypatch.setattr(choice, "installed", lambda package: package != "openvino")
    return load_bundle(copy_bundle(tiny_lcm, tmp_path / "lcm"))


def costs(step_s, *, machine=HERE):
    return {"machine": machine, "roles": {"text": {"1": 0.001}, "denoiser": {"1": step_s}, "decoder": {"1": 0.003}}}


def plant(bundle, kind, **changes):
    given = {"precision": "fp32", "verified": True, "weights_digest": bundle.weights_digest, "roles": {}, **changes}
    write_manifest(bundle, Manifest(engine=kind, opset=0, producers={}, **given))


def order(bundle, **settings):
    return [candidate.kind for candidate in explain(bundle, **settings) if candidate.usable]


def test_kinds_of_manifests_are_kinds_of_engines():
    assert set(manifest.KINDS) == set(KINDS) - {"torch"}


def test_without_any_export_torch_it_is(bundle):
    (torch_alone,) = explain(bundle)
    assert torch_alone.kind == "torch" and torch_alone.usable and "not measured on this machine" in torch_alone.why


def test_unmeasured_exports_come_before_torch_and_lower_precisions_after(bundle):
    for kind, precision in (("torch-bf16", "bf16"), ("onnx-int8", "int8"), ("onnx", "fp32")):
        plant(bundle, kind, precision=precision)
    assert order(bundle) == ["onnx", "torch", "onnx-int8", "torch-bf16"]


def test_the_least_measured_cost_wins_whatever_the_precision(bundle):
    plant(bundle, "onnx", costs=costs(0.004))
    plant(bundle, "torch-bf16", precision="bf16", costs=costs(0.002))
    plant(bundle, "onnx-int8", precision="int8")
    record_costs(bundle, "torch", costs(0.003))
    assert order(bundle) == ["torch-bf16", "torch", "onnx", "onnx-int8"]
    best = explain(bundle)[0]
    assert best.cost_s == pytest.approx(0.001 + 4 * 0.002 + 0.003)
    assert best.costs_s == pytest.approx({n: 0.004 + n * 0.002 for n in (1, 2, 4, 8)})
    assert "12.0 ms for a picture of 4 steps" in best.why
    assert order(bundle, threads=7) == ["onnx", "torch", "onnx-int8", "torch-bf16"], "other threads, other machine"


def test_costs_of_another_machine_or_of_other_weights_are_none(bundle):
    plant(bundle, "onnx", costs=costs(0.001, machine={**HERE, "cpu": "another"}))
    record_costs(bundle, "torch", costs(0.009))
    write_manifest(bundle, replace(read_manifest(bundle, "torch"), weights_digest="0"))
    found = {candidate.kind: candidate for candidate in explain(bundle)}
    assert found["onnx"].cost_s is None and found["torch"].cost_s is None and found["torch"].usable


def test_what_may_not_be_taken_says_why(bundle, monkeypatch):
    monkeypatch.setattr(choice, "_sees_cuda", lambda: False)
    fast = {"costs": costs(1e-6)}
    plant(bundle, "onnx", **fast, verified=False)
    plant(bundle, "torch-bf16", **fast, weights_digest="0")
    plant(bundle, "openvino", **fast)
    plant(bundle, "onnx-cuda", **fast)
    plant(bundle, "torch-compile", **fast)
    plant(bundle, "tensorrt", **fast, verified=False, build={"version": "1"})
    why = {candidate.kind: candidate.why for candidate in explain(bundle) if not candidate.usable}
    assert "not verified; run `fewstep verify" in why["onnx"]
    assert "made from other weights; run `fewstep export" in why["torch-bf16"] and "bf16`" in why["torch-bf16"]
    assert why["openvino"] == "the package openvino is not installed"
    assert "needs a CUDA device" in why["onnx-cuda"]
    assert why["torch-compile"].endswith("when it is opened: name it, --engine torch-compile")
    assert "never ran on the device" in why["tensorrt"]
    assert order(bundle) == ["torch"]
    (bundle.root / "engines" / "onnx" / "manifest.json").write_text("{")
    assert "is not JSON" in {c.kind: c.why for c in explain(bundle)}["onnx"]


def test_engines_of_native_code_are_named_to_be_opened(bundle, monkeypatch):
    """Whoever made the folder wrote its manifest too: proofs and costs in there are no reason to run its programs."""
    monkeypatch.setattr(choice, "_sees_cuda", lambda: True)
    opened = []
    for kind in NATIVE:
        plant(bundle, kind, costs=costs(1e-6), executed_on={"device": "any"}, build={"device": "cpu"})
        module, function = KINDS[kind].module, KINDS[kind].function
        monkeypatch.setattr(
            f"fewstep.runtime.engines{module}.{function}",
            lambda bundle, kind=kind, **settings: opened.append(kind) or FakeEngine(),
        )
    found = {candidate.kind: candidate for candidate in explain(bundle)}
    assert order(bundle) == ["torch"] and set(found) == {"torch", *NATIVE}
    for kind in NATIVE:
        assert found[kind].why.startswith("native code that was not built here:") and found[kind].why.endswith(kind)
        assert found[kind].costs_s, "what it would cost is shown"
    assert open_engine(bundle).name == "torch" and not opened
    open_engine(bundle, "aoti")
    assert opened == ["aoti"]


def test_auto_takes_native_code_that_was_built_here(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(choice, "_sees_cuda", lambda: True)
    made = {"roles": {"denoiser": Graph(file="a.pt2", sha256="1" * 64, inputs=(), outputs=())}, "costs": costs(1e-6)}
    plant(bundle, "aoti", **made, executed_on={"device": "any"}, build={"device": "cpu"})
    assert order(bundle) == ["torch"]
    remember(read_manifest(bundle, "aoti"))
    assert order(bundle) == ["aoti", "torch"]
    changed = read_manifest(bundle, "aoti")
    graphs = {role: replace(graph, sha256="0" * 64) for role, graph in changed.roles.items()}
    write_manifest(bundle, replace(changed, roles=graphs))
    assert order(bundle) == ["torch"], "other files are not those that were built"
    plant(bundle, "onnx-tensorrt", **made, executed_on={"device": "any"}, build={"device": "cuda"})
    remember(read_manifest(bundle, "onnx-tensorrt"))
    assert not built_here(read_manifest(bundle, "onnx-tensorrt")), "its plans are in no manifest"


def test_every_kind_whose_files_are_programs_is_held_for_native():
    made = {kind for kind, found in KINDS.items() if found.module in (".aoti_engine", ".tensorrt_engine")}
    assert made | {"onnx-tensorrt"} == NATIVE


def test_auto_passes_over_what_cannot_be_opened(bundle, monkeypatch, caplog):
    plant(bundle, "onnx")
    opened = []

    def refuse(opened_bundle, **settings):
        opened.append(settings)
        raise EngineUnavailable("its provider is asleep")

    monkeypatch.setattr("fewstep.runtime.engines.ort_engine.OrtEngine", refuse)
    with caplog.at_level(logging.INFO, "fewstep.runtime.engines.registry"):
        engine = open_engine(bundle, threads=1)
    assert engine.name == "torch" and opened == [{"threads": 1, "kind": "onnx"}]
    assert "engine onnx is passed over: its provider is asleep" in caplog.text


def test_taking_an_unmeasured_engine_is_said_aloud(bundle, monkeypatch, caplog):
    plant(bundle, "onnx")
    monkeypatch.setattr("fewstep.runtime.engines.ort_engine.OrtEngine", lambda bundle, **settings: FakeEngine())
    with caplog.at_level(logging.INFO, "fewstep.runtime.engines.registry"):
        open_engine(bundle)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "onnx, not measured on this machine; `fewstep verify" in record.message


def test_costs_are_measured_as_serving_calls_and_kept(bundle):
    found = measure_costs(TorchEngine(bundle), bundle)
    assert found["machine"] == HERE and found["device"] == "cpu"
    assert set(found["roles"]) == {"text", "denoiser", "decoder"}
    assert all(set(sizes) == {"1", "4"} and min(sizes.values()) > 0 for sizes in found["roles"].values())
    record_costs(bundle, "torch", found)
    assert explain(bundle)[0].cost_s == pytest.approx(picture_cost_s(found, bundle.spec, 4))


def test_guided_models_cost_two_rows_a_step(tiny_teacher):
    known = {"roles": {"text": {"1": 1.0}, "denoiser": {"1": 2.0, "2": 3.0}, "decoder": {"1": 4.0}}}
    assert picture_cost_s(known, tiny_teacher.spec, 10) == 1 + 10 * 3 + 4
    del known["roles"]["denoiser"]["2"]
    assert picture_cost_s(known, tiny_teacher.spec, 10) is None


def test_a_picture_costs_what_the_calls_that_serving_makes_cost(tiny_lcm):
    """A tiny decoder at its step counts, and one call for all where that is listed."""
    roles = {"text": {"1": 1.0}, "denoiser": {"1": 3.0}, "decoder": {"1": 5.0}, "decoder+tiny": {"1": 2.0}}
    spec = replace(tiny_lcm.spec, tiny_decoder=(1, 2))
    assert [picture_cost_s({"roles": roles}, spec, n) for n in (1, 2, 4)] == [6.0, 9.0, 18.0]
    roles |= {"picture": {"1": 4.5}, "picture-4": {"1": 17.0}}
    assert [picture_cost_s({"roles": roles}, spec, n) for n in (1, 2, 4)] == [4.5, 9.0, 17.0]
    for role in ("decoder+tiny", "picture"):
        del roles[role]
    assert picture_cost_s({"roles": roles}, spec, 1) == 9.0, "an engine without the tiny decoder decodes with the other"


def test_a_graph_of_the_whole_request_is_listed_where_serving_would_take_it(bundle, monkeypatch):
    taken_s = {"text": 0.001, "denoiser": 0.002, "decoder": 0.001, "decoder+tiny": 0.001, "picture": 0.002,
               "picture-2": 0.02}  # fmt: skip
    calls = {role: (lambda n, s=seconds: time.sleep(s)) for role, seconds in taken_s.items()}
    monkeypatch.setattr("fewstep.runtime.engines.calibrate.role_calls", lambda model: calls)
    monkeypatch.setattr(choice, "REPEATS", 3)
    roles = measure_costs(FakeEngine(), bundle)["roles"]
    assert set(roles) == {"text", "denoiser", "decoder", "decoder+tiny", "picture"}
    assert 0.002 <= roles["picture"]["1"] < 0.004 and set(roles["picture"]) == set(roles["decoder+tiny"]) == {"1"}


def test_the_fastest_of_a_few_calls_within_the_budget():
    taken = iter([9.0, 5.0, 3.0, *[4.0] * (choice.REPEATS - 2)])
    now = [0.0]

    def call():
        now[0] += next(taken)

    assert fastest_s(call, 1e3, lambda: now[0]) == 3.0 and next(taken, None) is None
    taken, now[0] = iter([9.0, 5.0, 3.0]), 0.0
    assert fastest_s(call, 6.0, lambda: now[0]) == 5.0 and next(taken) == 3.0, "a second call would not fit"


def test_fingerprint_says_machine_threads_and_versions():
    facts = fingerprint(3)
    assert facts["threads"] == 3 and facts["cpu"] and facts["cores"] >= 1 and facts["torch"]
    assert fingerprint() == fingerprint() and "date" not in facts


def test_command_prints_the_choice(bundle, capsys):
    plant(bundle, "onnx", costs=costs(0.004))
    plant(bundle, "torch-bf16", precision="bf16", verified=False)
    assert command([str(bundle.root), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["auto"] == "onnx" and [row["kind"] for row in report["engines"]] == ["onnx", "torch", "torch-bf16"]
    assert report["engines"][0]["costs_s"]["1"] == pytest.approx(0.008)
    assert command([str(bundle.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["onnx", "(auto)", "verified"] and "8.0  12.0  20.0  36.0" in lines[1]
    assert "unverified" in lines[3] and "not verified; run" in lines[3]
    with pytest.raises(SystemExit):
        command([str(bundle.root), "--threads", "0"])


def test_an_unknown_package_is_found_missing():
    assert registry.installed("torch") and not registry.installed("a_package_nobody_has")
