"""Text to pixels in one graph: equal to the row-by-row form, and used only where it is measured to be sooner."""

from dataclasses import replace

import numpy as np
import pytest

from fewstep.export.graphs import random_feeds, role_graph
from fewstep.runtime.engine import DECODER, DECODER_TINY, DENOISER, PICTURE, TEXT
from fewstep.runtime.engines.calibrate import saved_s
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineUnavailable
from fewstep.runtime.sampling.loop import admit, run_request
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.sampling.work import fits_one_call
from fewstep.runtime.service.config import RuntimeConfig
from fewstep.runtime.service.local import Runtime


class Offering:
    """A torch engine that offers `picture`, and tells which roles were run."""

    def __init__(self, bundle):
        self._engine = TorchEngine(bundle)
        able = self._engine.capabilities
        self.name, self.capabilities = "torch", replace(able, roles=able.roles | {PICTURE, "picture-2"})
        self.seen = []

    def run(self, role, feeds):
        self.seen.append((role, next(iter(feeds.values())).shape[0]))
        return self._engine.run(role, feeds)

    def close(self):
        self._engine.close()


def serve(bundle, engine, saved):
    runtime = Runtime([bundle], engines={bundle.name: engine}, config=RuntimeConfig(calibration_budget_s=0))
    runtime._serving.costs.record((bundle.name, TEXT), 1, 0.01)
    runtime._serving.costs.saved.update({(bundle.name, role): seconds for role, seconds in saved.items()})
    return runtime


CHEAP = {PICTURE: 0.02, "picture-2": 0.02}


@pytest.mark.parametrize(("steps", "role"), [(1, PICTURE), (2, "picture-2")])
@pytest.mark.parametrize("name", ["tiny_dmd2", "tiny_lcm"])
def test_one_call_makes_the_picture_of_the_row_by_row_form(request, name, steps, role):
    bundle = request.getfixturevalue(name)
    asked = [GenerateRequest(prompt=text, seed=seed, steps=steps) for seed, text in enumerate(["a red cat", "big dog"])]
    alone = [run_request(TorchEngine(bundle), bundle, one).pictures[0] for one in asked]
    engine = Offering(bundle)
    with serve(bundle, engine, CHEAP) as runtime:
        results = [ticket.result() for ticket in [runtime.submit(one) for one in asked]]
    for mine, result in zip(alone, results, strict=True):
        assert np.abs(mine.astype(int) - result.pictures[0].astype(int)).max() <= 1
        assert (result.steps, result.nfe) == (steps, steps)
    assert {seen for seen, _ in engine.seen} == {role}
    assert np.abs(alone[0].astype(int) - alone[1].astype(int)).max() > 8


@pytest.mark.parametrize(
    ("settings", "saved"),
    [({"steps": 4}, CHEAP), ({"steps": 1}, {**CHEAP, PICTURE: -0.001}), ({"steps": 1}, {})],
    ids=["steps without a graph", "measured slower", "not measured"],
)
def test_it_is_used_only_where_it_can_and_pays(tiny_dmd2, settings, saved):
    engine = Offering(tiny_dmd2)
    with serve(tiny_dmd2, engine, saved) as runtime:
        runtime.generate(GenerateRequest(prompt="a red cat", seed=1, **settings))
    assert not {PICTURE, "picture-2"} & {role for role, _ in engine.seen}


@pytest.mark.parametrize("both", [False, True], ids=["one decoder", "the tiny one too"])
def test_a_request_fits_where_its_decoder_is_the_graphs(tiny_dmd2, both):
    """A graph holds the decoder that the spec names; an engine without the tiny one decodes by the larger."""
    engine = Offering(tiny_dmd2)
    more = {DECODER_TINY} if both else set()
    engine.capabilities = replace(engine.capabilities, roles=engine.capabilities.roles | more)
    with serve(tiny_dmd2, engine, CHEAP) as runtime:
        served = runtime._loading.served[tiny_dmd2.name]
        shrunk = replace(served, spec=replace(served.spec, tiny_decoder=(1,)))
        request = GenerateRequest(prompt="a red cat", steps=1)
        assert fits_one_call(admit(served, request))
        assert fits_one_call(admit(shrunk, request)) == both


def test_a_known_prompt_counts_without_its_text_call(tiny_dmd2):
    engine = Offering(tiny_dmd2)
    with serve(tiny_dmd2, engine, {PICTURE: 0.005}) as runtime:
        served = runtime._loading.served[tiny_dmd2.name]
        live = admit(served, GenerateRequest(prompt="a red cat", steps=1))
        assert runtime._in_one_call(live)
        live.own.embedded["a red cat"] = {}
        assert not runtime._in_one_call(live), "0.005 s saved against 0.01 s for the text that is known"


@pytest.mark.parametrize(("whole_s", "saved"), [(0.03, 0.02), (0.07, -0.02)])
def test_whole_requests_are_compared_in_turns(whole_s, saved):
    now, seen = [0.0], []

    def call(role, seconds):
        def run(size):
            seen.append(role)
            now[0] += seconds

        return run

    calls = {role: call(role, 0.01) for role in (TEXT, DENOISER, DECODER)} | {"picture-3": call("picture-3", whole_s)}
    assert saved_s(calls, "picture-3", 0.0, lambda: now[0]) == pytest.approx(saved)
    assert seen == 2 * [TEXT, DENOISER, DENOISER, DENOISER, DECODER, "picture-3"], "once to warm, once to measure"


def test_guided_teachers_and_students_without_one_step_have_none(tiny_teacher):
    assert tiny_teacher.extra_roles == ()
    with pytest.raises(EngineUnavailable, match="role is 'picture'"):
        role_graph(tiny_teacher, PICTURE)


def test_its_graph_takes_the_updates_numbers(tiny_lcm):
    graph = role_graph(tiny_lcm, PICTURE)
    assert list(graph.feeds) == ["ids", "x", "w", "t", "a", "b"]
    feeds = random_feeds(tiny_lcm, PICTURE, batch=3, size=(32, 32), seed=1)
    assert set(feeds) == set(graph.feeds), "what the text encoders give is inside"
    assert feeds["t"].tolist() == [[999.0]] * 3 and feeds["ids"].shape[0] == feeds["w"].shape[0] == 3
    whole = random_feeds(tiny_lcm, "picture-4", batch=2, size=(32, 32), seed=1)
    assert whole["t"].tolist() == [list(tiny_lcm.spec.grids[4])] * 2 and whole["z"].shape == (2, 3, 4, 16, 16)


def test_a_call_that_broke_is_repeated_with_the_same_noise(tiny_dmd2):
    asked = GenerateRequest(prompt="a red cat", seed=7, steps=2)
    alone = run_request(TorchEngine(tiny_dmd2), tiny_dmd2, asked).pictures[0]
    engine = Offering(tiny_dmd2)
    run, broken = engine.run, []

    def break_once(role, feeds):
        if role == "picture-2" and not broken and feeds["x"].shape[0] == 2:
            broken.append(role)
            raise RuntimeError("once")
        return run(role, feeds)

    engine.run = break_once
    with serve(tiny_dmd2, engine, CHEAP) as runtime:
        first = runtime.generate(replace(asked, n=2))
    assert np.abs(alone.astype(int) - first.pictures[0].astype(int)).max() <= 1
