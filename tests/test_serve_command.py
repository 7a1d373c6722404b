"""`fewstep serve`: what its flags and variables give to the runtime, and what it refuses before anything is loaded."""

import json
import sys

import pytest

import fewstep.runtime.service.local
from fewstep.server import commands
from fewstep.server.commands import named_function, serve
from fewstep.server.settings import BadSetting


class Entered(Exception):
    """The runtime would have been opened."""


@pytest.fixture
def opened(monkeypatch):
    """What the runtime is made with, in place of making it."""
    seen = {}

    def runtime(bundles, **settings):
        seen.update(settings, bundles=bundles)
        raise Entered

    monkeypatch.setattr(fewstep.runtime.service.local, "Runtime", runtime)
    return seen


def test_groups_and_scorer_reach_the_runtime(opened, tmp_path, monkeypatch):
    (tmp_path / "judging.py").write_text("def light(prompt, picture):\n    return float(picture.mean())\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("FEWSTEP_MAX_QUEUE", "7")
    with pytest.raises(Entered):
        serve(["a", "b", "--port", "0", "--group", "one.json", "--group", "two.json", "--scorer", "judging:light"])
    assert opened["bundles"] == ["a", "b"] and opened["groups"] == ("one.json", "two.json")
    assert opened["scorer"].__name__ == "light" and opened["limits"].max_queue == 7


def test_the_environment_names_them_too(opened, monkeypatch):
    monkeypatch.setenv("FEWSTEP_GROUPS", "one.json, two.json")
    monkeypatch.setenv("FEWSTEP_SCORER", "json:dumps")
    with pytest.raises(Entered):
        serve(["a", "--port", "0"])
    assert opened["groups"] == ("one.json", "two.json") and opened["scorer"] is json.dumps


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("judging", "write module:function"),
        ("no_such_module_here:f", "cannot be imported"),
        ("json:no_such", "has no function 'no_such'"),
        ("json:__doc__", "has no function"),
    ],
)
def test_a_scorer_that_is_none_is_refused_before_a_model_is_loaded(opened, name, said):
    with pytest.raises(BadSetting, match=said):
        named_function(name)
    with pytest.raises(BadSetting, match=said):
        serve(["a", "--port", "0", "--scorer", name])
    assert not opened


def test_threads_take_turns_at_the_interpreter_more_often_than_python_says():
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)

    async def interval() -> float:
        return sys.getswitchinterval()

    try:
        assert commands.run_async(interval()) == pytest.approx(commands.SWITCH_S)
    finally:
        sys.setswitchinterval(before)
