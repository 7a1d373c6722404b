"""The Grafana dashboard asks only for what /metrics really shows: names, labels and their values."""

import json
import re
from pathlib import Path

import pytest
from live import fake_server
from prometheus_client.parser import text_string_to_metric_families

from fewstep.runtime.service.metrics import MIXES, STAGES

BOARD = json.loads((Path(__file__).parents[1] / "docs" / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def shown():
    """Every sample's labels by name, after traffic of each kind."""
    with fake_server() as live:
        assert live.generate(steps=4).status_code == 200
        assert live.generate(steps=4).status_code == 200
        assert live.http.get("/v1/models").status_code == 200
        page = live.http.get("/metrics").text
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_query_asks_for_what_is_there(expression, shown):
    asked = re.findall(r"(fewstep_\w+)\{([^}]*)\}", expression)
    assert asked, "each query names a metric"
    for name, selector in asked:
        assert name in shown, f"{name} is not on /metrics"
        for label, value in re.findall(r'(\w+)="([^"]*)"', selector):
            if label != "job":  # Prometheus adds it
                assert value in {labels.get(label) for labels in shown[name]}, f"{name} has no {label}={value}"
    for group in re.findall(r"by \(([^)]*)\)", expression):
        for label in group.split(", "):
            known = {label for name, _ in asked for labels in shown[name] for label in labels}
            assert label in known, f"{label} is no label of {[name for name, _ in asked]}"


def test_every_metric_is_on_the_board(shown):
    """A metric that nobody looks at is found here; buckets, sums and counts are one metric."""
    families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown} - {
        "fewstep_rejected",  # by reason, as fewstep_admissions has it
        "fewstep_pictures",
        "fewstep_model_load_seconds",
    }
    text = " ".join(EXPRESSIONS)
    assert sorted(family for family in families if family.startswith("fewstep") and family not in text) == []


def test_the_board_can_be_imported():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids)) == 20
    assert {variable["name"] for variable in BOARD["templating"]["list"]} == {"datasource", "job"}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places)


def test_composition_and_stages_have_all_their_labels(shown):
    assert {labels["by"] for labels in shown["fewstep_mixed_calls_total"]} == set(MIXES)
    assert {labels["stage"] for labels in shown["fewstep_stage_seconds_count"]} == {*STAGES, "file"}
