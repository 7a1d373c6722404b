"""A scorer looks at finished pictures; poor ones go on at the helper under the same ticket. And previews on the way."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep.runtime.engines.fake_engine import FakeEngine, Fault, fake_bundle, fake_spec
from fewstep.runtime.errors import Cancelled, DeadlineExceeded, EngineFailed, InvalidRequest
from fewstep.runtime.sampling import preview
from fewstep.runtime.sampling.events import Failed, Finished, Progress
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Edit, GenerateRequest, Helper
from fewstep.runtime.service.local import Runtime

PATIENCE_S = 30.0
REFINE = Helper(model="teacher", mode="refine", steps=4, strength=0.5, threshold=0.5)


def ask(**settings):
    return GenerateRequest(**{"prompt": "a red cat", "helper": REFINE, "steps": 2, **settings})


def serve(scorer, *, teacher=None, **settings):
    engines = {"student": FakeEngine(), "teacher": teacher or FakeEngine()}
    return Runtime([fake_bundle("student"), fake_bundle("teacher")], engines=engines, scorer=scorer, **settings)


def drawn(**settings):
    return run_request(FakeEngine(), fake_bundle(), GenerateRequest(**{"prompt": "a red cat", "steps": 2, **settings}))


def redrawn(picture, seed):
    edit = Edit(image=picture, strength=0.5)
    return drawn(steps=4, seed=seed, edit=edit)


def test_poor_pictures_are_drawn_again_by_the_helper_and_good_ones_are_left():
    first = drawn(seed=5, n=3).pictures
    scores = {picture.tobytes(): score for picture, score in zip(first, (0.9, 0.1, 0.4), strict=True)}
    seen = []

    def scorer(prompt, picture):
        seen.append((prompt, threading.current_thread().name))
        return scores[picture.tobytes()]

    with serve(scorer) as runtime:
        ticket = runtime.submit(ask(seed=5, n=3), "student")
        result = ticket.result(PATIENCE_S)
        found = runtime.metrics()
    assert (result.scores, result.refined) == ((0.9, 0.1, 0.4), (False, True, True))
    expected = [first[0], *(redrawn(first[k], 5 + k).pictures[0] for k in (1, 2))]
    assert all(np.array_equal(a, b) for a, b in zip(result.pictures, expected, strict=True))
    assert result.model == "student" and result.nfe == drawn().nfe + redrawn(first[0], 5).nfe
    assert seen == [("a red cat", "fewstep-follow")] * 3, "no engine call waits for the scorer"
    events = list(ticket.events())
    assert [type(event) for event in events].count(Finished) == 1 and isinstance(events[-1], Finished)
    again = [event for event in events if isinstance(event, Progress) and event.step > 2]
    assert {event.picture for event in again} == {1, 2} and {(event.step, event.steps) for event in again} == {
        (3, 4),
        (4, 4),
    }
    assert (found.scored, found.refined, found.pictures, found.accepted) == (3, 2, 3, 1)


def test_all_good_is_the_students_own():
    with serve(lambda prompt, picture: 0.5) as runtime:
        result = runtime.generate(ask(seed=1), "student")
    assert (result.scores, result.refined) == ((0.5,), (False,))
    assert np.array_equal(result.pictures[0], drawn(seed=1).pictures[0])


def test_a_scorer_is_needed_and_the_helper_is_checked_at_the_door():
    with serve(None) as runtime, pytest.raises(InvalidRequest, match="needs a scorer"):
        runtime.submit(ask(), "student")
    with serve(lambda *_: 0.0) as runtime:
        with pytest.raises(InvalidRequest, match="nobody"):
            runtime.submit(ask(helper=replace(REFINE, model="nobody")), "student")
        with pytest.raises(InvalidRequest, match=r"helper\.steps"):
            runtime.submit(ask(helper=replace(REFINE, steps=3)), "student")


@pytest.mark.parametrize(
    ("scorer", "said"),
    [(lambda *_: 1 / 0, "the scorer broke"), (lambda *_: float("nan"), "NaN"), (lambda *_: "good", "the scorer broke")],
)
def test_a_scorer_that_breaks_fails_its_request_once_and_the_runtime_goes_on(scorer, said):
    with serve(scorer) as runtime:
        ticket = runtime.submit(ask(), "student")
        with pytest.raises(EngineFailed, match=said):
            ticket.result(PATIENCE_S)
        assert runtime.generate(ask(helper=None), "student").scores == ()
    assert sum(isinstance(event, Failed) for event in ticket.events()) == 1


def test_a_helper_that_breaks_fails_the_request_once():
    with serve(lambda *_: 0.0, teacher=FakeEngine(faults={("denoiser", 1): Fault("nan")})) as runtime:
        with pytest.raises(EngineFailed, match="non-finite"):
            runtime.generate(ask(), "student")
        assert runtime.generate(ask(), "student").refined == (True,)


def test_cancel_and_deadline_reach_a_request_that_is_being_scored():
    go, reached = threading.Event(), threading.Event()

    def slow(prompt, picture):
        reached.set()
        assert go.wait(PATIENCE_S)
        return 0.0

    with serve(slow) as runtime:
        ticket = runtime.submit(ask(), "student")
        assert reached.wait(PATIENCE_S)
        assert runtime.cancel(ticket.id)
        with pytest.raises(Cancelled):
            ticket.result(PATIENCE_S)
        late = runtime.submit(ask(seed=2, deadline_s=0.2), "student")
        with pytest.raises(DeadlineExceeded):
            late.result(PATIENCE_S)
        go.set()
        runtime.close(PATIENCE_S)
        assert runtime.metrics().live == 0
    for each in (ticket, late):
        assert sum(not isinstance(event, Progress) for event in each.events()) == 1


def test_admission_prices_that_every_picture_may_be_drawn_again():
    with serve(lambda *_: 1.0) as runtime:
        for name in ("student", "teacher"):
            for role in ("text", "denoiser", "encoder", "decoder"):
                runtime._serving.costs.record((name, role), 1, 0.1)
        runtime._serving.costs.record = lambda *_: None
        plain = runtime._open("student", ask(helper=None), 0.0)[1]
        refined = runtime._open("student", ask(n=2), 0.0)[1]
    assert plain.then_s is None
    assert refined.then_s == pytest.approx(2 * (0.1 + 0.1 + 2 * 0.1 + 0.1)), "text, encode, two rows and decode, twice"


def previews(runtime, **settings):
    events = list(runtime.stream(GenerateRequest(**{"prompt": "a red cat", "previews": True, **settings}), "student"))
    return [event.preview for event in events if isinstance(event, Progress)], events[-1].result


def test_previews_are_of_the_clean_estimate_and_change_nothing():
    with serve(None) as runtime:
        shown, result = previews(runtime, steps=4, seed=3)
        asked = runtime.generate(GenerateRequest(prompt="a red cat", steps=4, seed=3), "student")
    assert len(shown) == 4 and all(picture.shape == (64, 64, 3) and picture.dtype == np.uint8 for picture in shown)
    assert np.array_equal(shown[-1], result.pictures[0]), "after the last step it is the picture"
    assert np.array_equal(result.pictures[0], asked.pictures[0])
    one_step = drawn(steps=1, seed=3).pictures[0].astype(int)
    assert np.abs(shown[0].astype(int) - one_step).max() <= 8, "the first step's estimate, but for boundary scalings"


def test_previews_come_from_the_map_where_the_bundle_has_one(monkeypatch):
    weights = torch.cat([torch.eye(3), torch.zeros(3, 2)], dim=1)
    monkeypatch.setattr(preview, "read_preview", lambda bundle: weights)
    with serve(None) as runtime:
        shown, _ = previews(runtime, steps=2)
        calls = sum(call.role == "decoder" for call in runtime._loading.served["student"].engine._engine.calls)
    assert [picture.shape for picture in shown] == [(8, 8, 3)] * 2
    assert calls == 1, "no decoder call but the last"


def test_a_preview_that_fails_is_left_out(caplog):
    with serve(None) as runtime:
        runtime._loading.served["student"].engine._engine._faults = {
            ("decoder", 0): Fault("fail"),
            ("decoder", 1): Fault("nan"),
        }
        shown, result = previews(runtime, steps=4)
    assert [picture is None for picture in shown] == [True, True, False, False] and len(result.pictures) == 1
    assert "a preview of student failed" in caplog.text


def test_rows_keep_their_estimate_unless_it_is_spoken_for():
    spec = fake_spec()
    from fewstep.runtime.sampling.plan import compile_plan
    from fewstep.runtime.sampling.request import resolve

    plan = compile_plan(resolve(GenerateRequest(prompt="x", steps=4), spec), spec)
    rows = list(plan.rows)
    rows[1] = replace(rows[1], keep=(0.5, 0.5))
    rows[2] = replace(rows[2], d=1.0)
    found, shown = preview.with_estimates(replace(plan, rows=tuple(rows)), {"m": spec}, "m")
    assert shown == (True, False, True, True)
    assert found.rows[1].keep == (0.5, 0.5) and found.rows[3].keep is None and found.rows[0].keep is not None
