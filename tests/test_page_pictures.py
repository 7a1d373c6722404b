"""Screenshots of the page, as the documents show them. With real models, of which the last is drawn with:

PAGE_BUNDLES=scenes-lcm,scenes-teacher PAGE_PICTURES=docs/pictures pytest tests/test_page_pictures.py
"""

import base64
import io
import math
import os
from pathlib import Path

import pytest
from browser import all_of, at, chromium, drawn, open_page, prefer, say, size, stroke
from live import serving, until
from PIL import Image
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.service.local import Runtime

SEED = "3"
EARLIER = (
    "two green triangles on a pink background",
    "a yellow star to the left of a purple ring",
    "a small white cross and a large black square",
)
WORDS = "a large red circle above a small blue square"
DRAWN = "a large red circle and a small yellow square"
TURNS = [k * math.tau / 36 for k in range(37)]
CIRCLE = [(0.34 + 0.2 * math.cos(turn), 0.4 + 0.2 * math.sin(turn)) for turn in TURNS]
SQUARE = [(0.68, 0.6), (0.86, 0.6), (0.86, 0.78), (0.68, 0.78), (0.68, 0.6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = Path(os.environ.get("PAGE_PICTURES", tmp_path_factory.mktemp("pictures")))
    target.mkdir(parents=True, exist_ok=True)
    return target


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    named = os.environ.get("PAGE_BUNDLES")
    runtime = Runtime(named.split(",")) if named else Runtime([fake_bundle("fake")], engines={"fake": FakeEngine()})
    with runtime, serving(runtime) as live, chromium(tmp_path_factory.mktemp("chromium")) as browser:
        size(browser, 1280, 800)
        open_page(browser, live.url)
        for number, words in enumerate(EARLIER, 1):
            say(browser, words)
            at(browser, "prompt").send_keys(Keys.ENTER)
            until(lambda: len(all_of(browser, "#past button")) == number)  # noqa: B023
        at(browser, "seed").clear()
        at(browser, "seed").send_keys(SEED)
        say(browser, WORDS)
        yield browser


def shoot(browser, path: Path) -> tuple[int, int]:
    """Keep a screenshot; its number of colours and its bytes."""
    until(lambda: drawn(browser))
    browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    picture.save(path, optimize=True)
    return len(picture.getcolors(2**24)), path.stat().st_size


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words(page, folder, scheme: str):
    size(page, 1280, 800)
    prefer(page, prefers_color_scheme=scheme)
    colours, size_bytes = shoot(page, folder / f"page-{scheme}.png")
    assert colours > 100 and 4_000 < size_bytes < 200_000


def test_drawing(page, folder):
    size(page, 1280, 800)
    prefer(page, prefers_color_scheme="light")
    models = Select(at(page, "model"))
    models.select_by_index(len(models.options) - 1)
    say(page, DRAWN)
    at(page, "draw").click()
    for line in (CIRCLE, SQUARE):
        stroke(page, *line)
    colours, size_bytes = shoot(page, folder / "page-drawing.png")
    assert colours > 100 and 4_000 < size_bytes < 200_000


def test_mobile(page, folder):
    size(page, 390, 844)
    prefer(page, prefers_color_scheme="dark")
    colours, size_bytes = shoot(page, folder / "page-mobile.png")
    assert colours > 100 and 4_000 < size_bytes < 200_000
