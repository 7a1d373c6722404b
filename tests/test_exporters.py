"""The registry of exporters: what an engine does not have is refused by name, what it has reaches its function."""

import sys
from types import ModuleType

import pytest

from fewstep.export import commands, exporters
from fewstep.export.exporters import EXPORTERS, Exporter, Option, check_choice, kind_of, make_engine
from fewstep.runtime.errors import EngineUnavailable


@pytest.fixture
def planted(monkeypatch):
    """An engine "toy" with one option; returns what its exporter was called with."""
    calls = []
    module = ModuleType("toy_exporter")
    module.export_toy = lambda bundle, **settings: calls.append(settings) or "manifest"
    monkeypatch.setitem(sys.modules, "fewstep.export.toy_exporter", module)
    option = Option(name="batch_sizes", help="sizes", read=lambda text: tuple(map(int, text.split(","))))
    toy = Exporter(module=".toy_exporter", function="export_toy", precisions=("fp32", "fp8"), options=(option,))
    monkeypatch.setitem(EXPORTERS, "toy", toy)
    return calls


def test_every_exporter_is_a_function_of_its_module():
    for engine, exporter in EXPORTERS.items():
        module = exporters.importlib.import_module(exporter.module, "fewstep.export")
        assert callable(getattr(module, exporter.function)), engine


def test_names_of_kinds():
    assert (kind_of("onnx", "fp32"), kind_of("openvino", "bf16")) == ("onnx", "openvino-bf16")


def test_options_reach_the_exporter(planted, tiny_lcm):
    assert make_engine(tiny_lcm, "toy", precision="fp8", batch_sizes=(1, 2)) == "manifest"
    assert planted == [{"precision": "fp8", "progress": None, "batch_sizes": (1, 2)}]
    assert make_engine(tiny_lcm, "torch", precision="fp32") is None


def test_what_an_engine_lacks_is_refused_by_name(planted):
    with pytest.raises(EngineUnavailable, match="--precision is 'fp8'; the engine 'onnx' has fp32"):
        check_choice("onnx", "fp8", {})
    with pytest.raises(EngineUnavailable, match="--batch-sizes was given; the engine 'onnx-cuda' has no options"):
        check_choice("onnx-cuda", "fp32", {"batch_sizes": (1,)})
    with pytest.raises(EngineUnavailable, match="--workspace was given; the engine 'toy' has --batch-sizes"):
        check_choice("toy", "fp32", {"workspace": 1})


def test_the_command_reads_options_and_refuses_them_to_others(planted, tiny_lcm, capsys):
    with pytest.raises(EngineUnavailable, match="--batch-sizes was given; the engine 'onnx'"):
        commands.export([str(tiny_lcm.root), "--batch-sizes", "1,2"])
    with pytest.raises(SystemExit):
        commands.export([str(tiny_lcm.root), "--engine", "toy", "--batch-sizes", "1,x"])
    assert "--batch-sizes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        commands.export(["--help"])
    assert "toy: sizes" in " ".join(capsys.readouterr().out.split())
