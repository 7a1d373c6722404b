"""The life of a request, as ARCHITECTURE.md tells it, is what a request does: its files are entered in that order."""

import re
import sys
import threading
from pathlib import Path

import numpy as np

from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.sampling.request import Edit, GenerateRequest, Helper
from fewstep.runtime.service.local import Runtime

ROOT = Path(__file__).parents[1]
NOT_ENTERED = {
    "runtime/engine.py",
    "runtime/sampling/events.py",
    "runtime/sampling/images.py",
    "runtime/sampling/request.py",
}
"""A protocol, plain values, and what the server does (it makes the `GenerateRequest`): not entered on the way."""


def told():
    """(step, file) of every runtime file that the page names, in order."""
    life = (ROOT / "ARCHITECTURE.md").read_text().split("## The life of a request\n\n")[1].split("\n\n")[0]
    return [
        (int(line.split(".")[0]), name)
        for line in life.splitlines()
        for name in re.findall(r"`(runtime/[\w/]+\.py)`", line)
        if name not in NOT_ENTERED
    ]


def entered():
    """Runtime files in the order in which a request first enters them, in whichever thread."""
    order = []

    def look(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT / "runtime"):
            name = path.relative_to(ROOT).as_posix()
            if name not in order:
                order.append(name)

    picture = np.full((64, 64, 3), 99, np.uint8)
    helper = Helper(model="teacher", mode="refine", steps=2, strength=0.5, threshold=9.0)
    request = GenerateRequest(prompt="a red cat", steps=2, edit=Edit(image=picture), helper=helper)
    engines = {"student": FakeEngine(), "teacher": FakeEngine()}
    bundles = [fake_bundle("student"), fake_bundle("teacher")]
    with Runtime(bundles, engines=engines, scorer=lambda *_: 0.0) as runtime:
        go = threading.Event()
        hold = runtime.submit(GenerateRequest(prompt="hold"), "student")
        hold.result(30)
        serving = runtime._serving
        wait = serving._next_work  # the engine thread looks at nothing before its next turn

        def turn():
            sys.setprofile(look)
            go.set()
            return wait()

        serving._next_work = turn
        threading.setprofile(look)
        sys.setprofile(look)
        try:
            result = runtime.submit(request, "student").result(30)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    assert result.refined == (True,) and go.is_set()
    return order


def test_the_life_of_a_request_is_told_in_the_order_in_which_it_happens():
    page, order = told(), entered()
    assert len(page) >= 12
    missing = [name for _, name in page if name not in order]
    assert not missing, f"the page names files that a request never enters: {missing}"
    first = {}
    for step, name in page:
        first.setdefault(step, []).append(order.index(name))
    starts = [min(places) for _, places in sorted(first.items())]
    assert starts == sorted(starts), f"steps are told out of order; files were first entered as {order}"
