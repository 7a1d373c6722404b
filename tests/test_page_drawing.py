"""The drawing pad in headless Chromium: the picture follows the pen, the latest stroke wins, the tab ends its work."""

import json
import threading
import time

import pytest
from browser import all_of, at, chromium, drawn, open_page, pixels, say, stroke
from live import fake_server, until
from selenium.webdriver.common.keys import Keys


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def live():
    with fake_server() as server:
        yield server


@pytest.fixture
def page(browser, live):
    """The page with a prompt and an open pad."""
    open_page(browser, live.url)
    say(browser, "a red circle")
    at(browser, "draw").click()
    return browser


def settled(browser) -> str:
    """The picture once nothing is on its way any more, and it is the same a moment later: a pen's last frame may not
    have been asked for yet."""
    seen = [pixels(browser)]

    def stays() -> bool:
        time.sleep(0.25)
        seen.append(pixels(browser))
        return seen[-1] == seen[-2]

    until(stays)
    return seen[-1]


def test_the_picture_follows_the_pen(page):
    seen = [settled(page)]
    for line in (((0.1, 0.1), (0.9, 0.1)), ((0.1, 0.5), (0.9, 0.5), (0.9, 0.9))):
        stroke(page, *line)
        seen.append(settled(page))
    assert len(set(seen)) == 3
    at(page, "undo").click()
    assert settled(page) == seen[1]
    at(page, "clear").click()
    assert settled(page) == seen[0]  # an empty pad asks for nothing: words alone
    at(page, "undo").click()
    assert settled(page) == seen[1]


def test_control_scale_and_eraser_act(page):
    plain = settled(page)
    stroke(page, (0.1, 0.5), (0.9, 0.5))
    followed = settled(page)
    at(page, "scale").send_keys(Keys.HOME)
    until(lambda: at(page, "scale-value").text == "0.00")
    assert settled(page) == plain != followed
    at(page, "scale").send_keys(Keys.END)
    assert settled(page) not in (plain, followed)
    at(page, "rubber").click()
    stroke(page, (0.1, 0.5), (0.9, 0.5))
    assert at(page, "rubber").get_attribute("aria-pressed") == "true"
    assert settled(page) == plain


def test_the_keyboard_draws(page):
    before = settled(page)
    at(page, "pad").send_keys(" ", *(Keys.ARROW_RIGHT,) * 5, *(Keys.ARROW_DOWN,) * 5, " ")
    after = settled(page)
    assert after != before
    at(page, "pad").send_keys(*(Keys.ARROW_LEFT,) * 5)  # lifted: moving draws nothing
    assert settled(page) == after
    at(page, "pad").send_keys("z")
    assert settled(page) == before


EDITING = """
const asked = fetch, send = WebSocket.prototype.send;
window.fetch = async (...given) => {
  const info = await (await asked(...given)).json();
  for (const model of info.models) model.edit = true;
  return { ok: true, status: 200, json: async () => info };
};
window.sent = [];
WebSocket.prototype.send = function (data) {
  if (data instanceof Blob) data.text().then((text) => sent.push(text.slice(0, text.indexOf("\\n"))));
  return send.call(this, data);
};
"""
"""The page is told that its model edits, and the headers of the drawings that it sends are noted."""


def test_colours_are_sent_to_models_that_edit(browser, live):
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": EDITING})
    try:
        open_page(browser, live.url)
        at(browser, "draw").click()
        assert not at(browser, "strength").is_displayed() and at(browser, "scale").is_displayed()
        all_of(browser, "#steer input")[1].click()
        assert at(browser, "strength").is_displayed() and not at(browser, "scale").is_displayed()
        colours = all_of(browser, "#colours input")
        assert [one.accessible_name for one in colours][:3] == ["black", "grey", "red"]
        colours[2].click()
        at(browser, "prompt").send_keys("a red circle")
        stroke(browser, (0.1, 0.5), (0.9, 0.5))
        until(lambda: browser.execute_script("return sent.length"))
        header = json.loads(browser.execute_script("return sent.at(-1)"))
        assert header["edit"] == {"strength": 0.6} and "control" not in header and "strokes" not in header
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": added["identifier"]})


def test_a_drawing_is_kept_with_the_history(page):
    stroke(page, (0.2, 0.2), (0.8, 0.3))
    kept = settled(page)
    until(lambda: len(all_of(page, "#past button")) >= 1)
    at(page, "clear").click()
    at(page, "draw").click()
    say(page, "something else")
    all_of(page, "#past button")[-1].click()
    until(lambda: at(page, "picture").get_attribute("alt") == "a red circle" and drawn(page))
    assert at(page, "pad").is_displayed() and settled(page) == kept


def test_the_latest_frame_wins_and_what_it_displaced_is_counted(browser):
    with fake_server(delay_s=lambda role, batch: 0.15 if role.startswith("denoiser") else 0.0) as live:
        open_page(browser, live.url)
        at(browser, "steps").send_keys(Keys.HOME)
        say(browser, "a red circle")
        at(browser, "draw").click()
        counts = []
        for row in range(1, 4):
            stroke(browser, *((column / 12, row / 4) for column in range(1, 12)))
            counts.append(int(at(browser, "dropped").text))
        last = settled(browser)
        assert 0 < counts[1] < counts[2], counts
        calls = len(live.engine.calls)
        browser.execute_script("document.getElementById('steps').dispatchEvent(new Event('input'))")  # asked once more
        until(lambda: len(live.engine.calls) > calls)
        assert settled(browser) == last
        assert f'outcome="dropped"}} {float(at(browser, "dropped").text)}' in live.http.get("/metrics").text


def test_closing_the_tab_ends_its_work(browser):
    gate = threading.Event()

    def wait(call) -> None:
        if call.role == "denoiser" and call.number >= 4:
            gate.wait(20)

    with fake_server(before=wait) as live:
        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        open_page(browser, live.url)
        at(browser, "prompt").send_keys("a")
        until(lambda: live.runtime.metrics().live == 1)
        browser.close()
        browser.switch_to.window(first)
        until(lambda: "fewstep_live_sessions 0.0" in live.http.get("/metrics").text)
        gate.set()
        until(lambda: live.runtime.metrics().live == 0)
        assert live.runtime.metrics().failed["Cancelled"] == 1
