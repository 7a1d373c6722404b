"""What is said of one kind of engine only reaches that kind, whichever "auto" comes down to."""

import pytest

from fewstep.models.bundle import load_bundle
from fewstep.runtime.engines import choice, registry
from fewstep.runtime.engines.choice import Candidate
from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.engines.registry import open_engine
from fewstep.runtime.errors import EngineUnavailable
from fewstep.runtime.service.local import Runtime


def test_a_server_that_allows_unproven_engines_opens_torch_where_there_are_none(tiny_lcm):
    bundle = load_bundle(tiny_lcm.root)
    engine = open_engine(bundle, "auto", threads=1, allow_unproven=True)
    assert engine.name == "torch"
    engine.close()
    with Runtime([bundle], engine="auto", allow_unproven=True) as runtime:
        assert runtime.models[bundle.name].engine_name == "torch"
    with pytest.raises(EngineUnavailable, match="'torch' is none: leave it out"):
        open_engine(bundle, "torch", allow_unproven=True)


def test_auto_passes_each_kind_what_it_takes(monkeypatch):
    asked = []

    def opened(_bundle, kind, **options):
        asked.append((kind, options))
        if kind != "torch":
            raise EngineUnavailable("not here")
        return FakeEngine()

    found = tuple(Candidate(kind=kind, usable=True, why="") for kind in ("tensorrt-fp16", "onnx", "torch"))
    monkeypatch.setattr(choice, "explain", lambda *_, **__: found)
    monkeypatch.setattr(registry, "open_engine", opened)
    registry._open_best(fake_bundle(), 1, {"allow_unproven": True, "other": 2})
    assert asked == [
        ("tensorrt-fp16", {"threads": 1, "allow_unproven": True, "other": 2}),
        ("onnx", {"threads": 1, "other": 2}),
        ("torch", {"threads": 1, "other": 2}),
    ]
