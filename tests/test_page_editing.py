"""Drawing in colours on the page, with a real model behind it: img2img through the runtime and its torch engine."""

import pytest
from browser import all_of, at, chromium, drawn, open_page, pixels, say, stroke
from live import serving, until

from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.service.local import Runtime


@pytest.fixture(scope="module")
def live(tiny_lcm):
    with Runtime([tiny_lcm], engines={"tiny-lcm": TorchEngine(tiny_lcm)}) as runtime, serving(runtime) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def settled(browser) -> str:
    until(lambda: drawn(browser))
    return pixels(browser)


def test_info_says_that_the_model_edits(live):
    (model,) = live.http.get("/v1/info").json()["models"]
    assert (model["name"], model["edit"]) == ("tiny-lcm", True)


def test_a_pen_stroke_in_colour_changes_the_picture_and_undo_brings_it_back(browser, live):
    open_page(browser, live.url)
    say(browser, "a red circle")
    seen = [settled(browser)]
    at(browser, "draw").click()
    if at(browser, "steer").is_displayed():
        all_of(browser, "#steer [value=edit]")[0].click()
    assert at(browser, "strength").is_displayed() and at(browser, "colours").is_displayed()
    for column, colour in ((0.3, 2), (0.7, 6)):
        all_of(browser, "#colours input")[colour].click()
        stroke(browser, (column, 0.1), (column, 0.9))
        seen.append(settled(browser))
    assert len(set(seen)) == 3
    at(browser, "undo").click()
    assert settled(browser) == seen[1]
    at(browser, "clear").click()
    assert settled(browser) == seen[0]
