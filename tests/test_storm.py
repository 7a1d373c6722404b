"""The short form of the storm. The long one: `fewstep bench storm --requests 10000`."""

import json
from dataclasses import replace

import pytest
import torch

from fewstep.runtime.bench.storm import MOST_BYTES, MOST_OBJECTS, Storm, StormyEngine, command, storm
from fewstep.runtime.errors import EngineFailed


@pytest.fixture(scope="module")
def found():
    return storm(600, seed=1, faults=0.03)


def test_every_accepted_request_ends_once_and_nothing_is_left(found):
    assert (found.lost, found.twice, found.left) == (0, 0, 0)
    assert sum(found.ends.values()) + found.rejected == found.requests == 600
    assert found.ends["Cancelled"] == found.cancelled > 100


def test_what_finishes_is_right_whatever_breaks_around_it(found):
    assert found.wrong == 0 and found.compared > 100
    assert found.ends["EngineFailed"] > 5, "the storm did blow"
    assert found.loads > 3 + 4, "models came and went"


def test_memory_is_flat(found):
    assert found.objects_grown <= MOST_OBJECTS and found.rss_grown_bytes <= MOST_BYTES
    assert found.ok and not replace(found, lost=1).ok and not replace(found, objects_grown=10**6).ok


def test_a_storm_without_faults_breaks_nothing():
    calm = storm(60, seed=2, faults=0.0, cancels=0.0)
    assert isinstance(calm, Storm) and calm.ok
    assert set(calm.ends) <= {"Finished", "DeadlineExceeded"} and calm.cancelled == 0


def test_engines_break_as_often_as_they_are_told():
    feeds = {"latent": torch.zeros(2, 4, 8, 8)}
    failed = spoiled = 0
    engine = StormyEngine(0, 0.5)
    for _ in range(100):
        try:
            (out,) = engine.run("decoder", feeds)
        except EngineFailed:
            failed += 1
        else:
            spoiled += not bool(torch.isfinite(out).all())
    assert 8 <= failed <= 26 and 8 <= spoiled <= 26, "a sixth of the calls each"


def test_the_command_writes_its_counts_and_says_what_was_broken(found, tmp_path, capsys, monkeypatch):
    asked = []

    def blow(requests, **settings):
        asked.append((requests, settings))
        return found

    monkeypatch.setattr("fewstep.runtime.bench.storm.storm", blow)
    file = tmp_path / "storm.json"
    assert command(["--requests", "40", "--seed", "3", "--json", str(file)]) == 0
    assert asked == [(40, {"seed": 3, "faults": 0.02, "cancels": 0.5})]
    counts = json.loads(file.read_text())
    assert counts["ok"] and counts["ends"] == found.ends and "every promise was kept" in capsys.readouterr().err
    monkeypatch.setattr("fewstep.runtime.bench.storm.storm", lambda *_, **__: replace(found, lost=1))
    assert command([]) == 1
    assert "a promise was broken" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--faults", "2"])
