"""Frame streams: latest frame wins, nothing is shown out of order, and rows at other steps share calls."""

import time

import numpy as np
import pytest

from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle, fake_spec
from fewstep.runtime.errors import InvalidRequest, Overloaded
from fewstep.runtime.sampling.events import Failed, Finished
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Edit, GenerateRequest
from fewstep.runtime.service.live import Counts, LiveStream, SimilarityFilter
from fewstep.runtime.service.local import Runtime
from fewstep.runtime.service.ticket import Ticket

draw = np.random.default_rng(0)


def picture():
    return draw.integers(0, 256, (64, 64, 3), np.uint8)


def ask(image=None, **settings):
    edit = None if image is None else Edit(image=image, strength=0.75)
    return GenerateRequest(**{"prompt": "a", "seed": 1, "steps": 4, "edit": edit, **settings})


# --- the filter


def test_still_frames_run_once_in_eleven():
    similar, frame = SimilarityFilter(), picture()
    passed = [similar.passes(frame) for _ in range(111)]
    assert sum(passed) in range(10, 13) and passed[0]
    runs = np.flatnonzero(passed)
    assert set(np.diff(runs).tolist()) == {11}


def test_noise_is_never_skipped():
    similar = SimilarityFilter()
    frames = [draw.standard_normal((64, 64, 3)) for _ in range(50)]
    assert all(similar.passes(frame) for frame in frames)


def test_the_count_begins_anew_with_every_frame_that_passes():
    similar, one, other = SimilarityFilter(max_skip=3), np.eye(8)[0], np.eye(8)[1]
    assert [similar.passes(f) for f in (one, one, one, other, other, other, other, other)] == [
        True, False, False, True, False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(("likeness", "share"), [(0.999, 0.95), (0.99, 0.5), (0.98, 0.0), (0.5, 0.0)])
def test_the_chance_of_a_skip_is_the_papers(likeness, share):
    skips = 0
    for seed in range(400):
        similar = SimilarityFilter(seed=seed)
        similar.passes(np.array([1.0, 0.0]))
        skips += not similar.passes(np.array([likeness, (1 - likeness**2) ** 0.5]))
    assert skips / 400 == pytest.approx(share, abs=0.08)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="eta is 1"):
        SimilarityFilter(eta=1.0)
    with pytest.raises(ValueError, match="max_skip is 0"):
        SimilarityFilter(max_skip=0)
    with pytest.raises(ValueError, match="depth is 0"):
        LiveStream(lambda _: None, lambda _: None, lambda _: None, depth=0)


# --- latest frame wins


class Desk:
    """A runtime's submit and cancel, finished by hand."""

    def __init__(self):
        self.tickets, self.requests, self.cancelled, self.shown = [], [], [], []

    def submit(self, request):
        if request.prompt == "bad":
            raise InvalidRequest("prompt", "prompt is bad")
        self.requests.append(request)
        self.tickets.append(Ticket(str(len(self.tickets))))
        return self.tickets[-1]

    def finish(self, place):
        self.tickets[place].publish(Finished(str(place), place))

    def stream(self, **settings):
        return LiveStream(self.submit, self.cancelled.append, self.shown.append, **settings)


def seeds(desk):
    return [request.seed for request in desk.requests]


def test_a_waiting_frame_makes_room_for_a_newer_one():
    desk = Desk()
    stream = desk.stream()
    assert [stream.frame(ask(seed=k)) for k in range(5)] == [0, 1, 2, 3, 4]
    assert seeds(desk) == [0] and stream.counts.dropped == 3
    desk.finish(0)
    assert seeds(desk) == [0, 4]
    desk.finish(1)
    assert [shown.number for shown in desk.shown] == [0, 4] and stream.counts == Counts(made=2, dropped=3)


def test_as_many_fly_as_there_are_steps_and_none_is_shown_out_of_order():
    desk = Desk()
    stream = desk.stream(depth=3)
    for k in range(4):
        stream.frame(ask(seed=k))
    assert seeds(desk) == [0, 1, 2]
    desk.finish(1)
    assert seeds(desk) == [0, 1, 2, 3]
    for place in (0, 3, 2):
        desk.finish(place)
    assert [shown.number for shown in desk.shown] == [1, 3] and stream.counts.late == 2


def test_refused_and_failed_frames_say_so_and_the_stream_goes_on():
    desk = Desk()
    stream = desk.stream()
    stream.frame(ask(prompt="bad"))
    stream.frame(ask(seed=1))
    desk.tickets[0].publish(Failed("0", Overloaded("full", 1.0)))
    stream.frame(ask(seed=2))
    desk.finish(1)
    assert [(s.number, type(s.error).__name__) for s in desk.shown] == [
        (0, "InvalidRequest"), (1, "Overloaded"), (2, "NoneType"),
    ]  # fmt: skip
    assert stream.counts == Counts(made=1, failed=2)


def test_closing_ends_what_flies_and_shows_nothing_more():
    desk = Desk()
    stream = desk.stream(depth=2)
    for k in range(3):
        stream.frame(ask(seed=k))
    stream.close()
    assert desk.cancelled == ["0", "1"]
    desk.finish(0)
    assert desk.shown == [] and seeds(desk) == [0, 1]


def test_a_skipped_frame_leaves_the_last_picture():
    desk = Desk()
    stream = desk.stream(similar=SimilarityFilter())
    image = picture()
    assert [stream.frame(ask(image)) for _ in range(3)] == [0, None, None] and stream.counts.skipped == 2
    assert stream.frame(ask()) == 1, "what has no picture is always made"


# --- stream batch


FREE = {1: 0.01, 8: 0.0101}
"""A call's seconds by its size: rows beside others cost nothing."""


@pytest.mark.parametrize("edits", [False, True])
def test_frames_in_flight_equal_their_solo_pictures(edits):
    """A frame comes with every engine call, so those in flight are at different steps and share calls; frames that
    must be encoded first wait for those before them, which are due sooner."""
    spec, shown = fake_spec(), []
    frames = [ask(picture() if edits else None, seed=k, steps=4) for k in range(8)]
    coming = iter(frames[1:])

    def next_frame(call):
        if call.role == "denoiser" and (frame := next(coming, None)) is not None:
            stream.frame(frame)

    engine, bundle = FakeEngine(spec, before=next_frame), fake_bundle(spec=spec)
    with Runtime([bundle], engines={bundle.name: engine}) as runtime:
        for role in ("text", "denoiser", "decoder", "encoder"):
            for size, seconds in FREE.items():
                runtime._serving.costs.record((bundle.name, role), size, seconds)
        runtime._serving.costs.record = lambda *_: None
        stream = LiveStream(runtime.submit, runtime.cancel, shown.append, depth=8)
        stream.frame(frames[0])
        end = time.monotonic() + 30
        while stream.counts.made + stream.counts.late < len(frames) and time.monotonic() < end:
            time.sleep(0.001)
    assert stream.counts.made + stream.counts.late == len(frames) and len(shown) == stream.counts.made > 0
    for result in shown:
        alone = run_request(FakeEngine(spec), bundle, frames[result.number])
        assert np.array_equal(result.result.pictures[0], alone.pictures[0])
    rows = [call.t for call in engine.calls if call.role == "denoiser"]
    assert len(rows) < sum(map(len, rows)), "calls were shared"
    assert edits or any(len(set(times)) > 1 for times in rows), "rows at different steps met in a call"
