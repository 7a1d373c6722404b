"""The live page in headless Chromium against a live server: words, settings, history, keys, errors, looks."""

import re

import pytest
from browser import all_of, at, chromium, drawn, open_page, pixels, prefer, say, size
from live import fake_server, serving, until
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from fewstep.models.spec import Guidance, Spacing
from fewstep.runtime.engines.fake_engine import FakeEngine, Fault, fake_bundle, fake_spec
from fewstep.runtime.service.local import Runtime
from fewstep.server.settings import Settings


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def live():
    with fake_server() as server:
        yield server


def about(browser) -> str:
    return at(browser, "about").text


def press(browser, keys: str) -> None:
    """Keys to whatever has the focus."""
    ActionChains(browser).send_keys(keys).perform()  # an element that is leaving may still be the active one


def test_the_picture_follows_the_words(browser, live):
    open_page(browser, live.url)
    seed = at(browser, "seed").get_attribute("value")
    seen = []
    for words in ("a red circle", "a red circle above", "a red circle above a square"):
        say(browser, words)
        seen.append(pixels(browser))
    assert len(set(seen)) == 3
    assert about(browser) == f"fake · 4 steps · 4 NFE · guidance 3 · seed {seed}"
    assert browser.execute_script("return document.getElementById('picture').naturalWidth") == 64
    assert at(browser, "picture").value_of_css_property("image-rendering") == "pixelated"
    assert re.fullmatch(r"[\d.]+ ms", at(browser, "latency").text)
    assert at(browser, "said").get_attribute("textContent").startswith("Picture made in")
    stages = [row.text.split()[0] for row in all_of(browser, "#stages div")]
    assert stages == ["queue", "text", "denoise", "decode", "encode", "other"]
    assert at(browser, "queue").text == "0" and at(browser, "dropped").text.isdigit()
    assert not at(browser, "error").is_displayed()


def test_only_step_counts_of_the_model_can_be_chosen(browser, live):
    open_page(browser, live.url)
    say(browser, "a red circle")
    chosen = []
    for key in (Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT):
        at(browser, "steps").send_keys(key)
        count = int(at(browser, "steps-value").text)
        until(lambda: f"{count} NFE" in about(browser))  # noqa: B023
        chosen.append(count)
    assert chosen == [1, 2, 4, 8, 8]
    assert at(browser, "steps").get_attribute("aria-valuetext") == "8 steps"


def test_enter_makes_another_and_a_held_seed_repeats(browser, live):
    open_page(browser, live.url)
    say(browser, "a blue square")
    first, seed = pixels(browser), at(browser, "seed").get_attribute("value")
    at(browser, "prompt").send_keys(Keys.ENTER)
    until(lambda: f"seed {seed}" not in about(browser) and drawn(browser))
    assert pixels(browser) != first
    at(browser, "seed").clear()
    at(browser, "seed").send_keys(seed)
    assert at(browser, "lock").get_attribute("aria-pressed") == "true"
    until(lambda: about(browser).endswith(f"seed {seed}") and drawn(browser))
    assert pixels(browser) == first
    at(browser, "prompt").send_keys(Keys.ENTER)
    until(lambda: drawn(browser))
    assert at(browser, "seed").get_attribute("value") == seed and pixels(browser) == first
    at(browser, "dice").click()
    until(lambda: f"seed {seed}" not in about(browser) and drawn(browser))
    assert pixels(browser) != first


def test_history_outlives_the_page_and_gives_the_same_picture(browser, live):
    open_page(browser, live.url)
    say(browser, "a green ring")
    at(browser, "steps").send_keys(Keys.HOME)
    until(lambda: "1 NFE" in about(browser))
    first, line = pixels(browser), about(browser)
    until(lambda: len(all_of(browser, "#past button")) == 1)  # kept once it rests
    say(browser, "a purple cross")
    at(browser, "prompt").send_keys(Keys.ENTER)
    until(lambda: len(all_of(browser, "#past button")) == 2)
    open_page(browser, live.url, keep=True)
    older = all_of(browser, "#past button")[1]
    assert older.accessible_name.startswith("a green ring")
    older.click()
    until(lambda: about(browser) == line and drawn(browser))
    assert pixels(browser) == first
    assert at(browser, "prompt").get_attribute("value") == "a green ring" and at(browser, "steps-value").text == "1"
    assert at(browser, "lock").get_attribute("aria-pressed") == "true"
    at(browser, "forget").click()
    assert all_of(browser, "#past button") == [] and not at(browser, "past-section").is_displayed()


def test_errors_are_said_in_words_and_the_next_picture_clears_them(browser, live):
    open_page(browser, live.url)
    at(browser, "prompt").send_keys(Keys.ENTER)
    assert at(browser, "error").text == "the prompt is empty; say what the picture should show"
    assert at(browser, "error").get_attribute("role") == "alert"
    all_of(browser, "#examples button")[0].click()
    until(lambda: drawn(browser))
    assert not at(browser, "error").is_displayed()
    assert at(browser, "prompt").get_attribute("value").startswith("a large red circle")
    at(browser, "seed").send_keys("x")
    until(lambda: at(browser, "error").is_displayed())
    assert "use a whole number" in at(browser, "error").text
    at(browser, "dice").click()
    until(lambda: not at(browser, "error").is_displayed())
    browser.execute_script("const p = document.getElementById('prompt'); p.value = 'x'.repeat(4001)")
    at(browser, "prompt").send_keys("x")
    until(lambda: "at most 4000: shorten it" in at(browser, "error").text)


def test_an_engine_failure_and_a_lost_server_are_said_in_words(browser):
    with fake_server(faults={("decoder", k): Fault("fail") for k in range(1, 99)}) as live:
        open_page(browser, live.url)
        at(browser, "prompt").send_keys("a red circle")
        until(lambda: "told to fail" in at(browser, "error").text)
        assert all_of(browser, "#frame.busy") == []
    until(lambda: at(browser, "server").text == "connection lost, trying again")


def test_controls_follow_the_model(browser):
    teacher = fake_spec(
        sampler="ddim", grids={}, spacing=Spacing(kind="trailing", max_steps=30), stochastic=False, boundary=None,
        guidance=Guidance(mode="cfg", default=4.0, range=(1.0, 9.0)),
    )  # fmt: skip
    specs = {"student": fake_spec(guidance=Guidance(mode="none")), "teacher": teacher}
    engines = {name: FakeEngine(spec, control=name == "teacher", edit=False) for name, spec in specs.items()}
    bundles = [fake_bundle(name, spec) for name, spec in specs.items()]
    with Runtime(bundles, engines=engines) as runtime, serving(runtime) as live:
        open_page(browser, live.url)
        assert not at(browser, "guidance").is_displayed() and not at(browser, "negative").is_displayed()
        at(browser, "draw").click()  # a model that follows drawings is taken
        until(lambda: at(browser, "model").get_attribute("value") == "teacher" and at(browser, "scale").is_displayed())
        assert at(browser, "negative").is_displayed() and at(browser, "guidance-value").text == "4.0"
        assert at(browser, "steps-value").text == "8" and at(browser, "steps").get_attribute("max") == "29"
        at(browser, "draw").click()
        assert not at(browser, "scale").is_displayed()
        at(browser, "negative").send_keys("blue")
        say(browser, "a red circle")
        assert "16 NFE" in about(browser)


def test_a_model_that_cannot_follow_lines_does_not_end_the_choice_of_them(browser):
    engines = {name: FakeEngine(fake_spec(), control=name == "both") for name in ("edits", "both")}
    bundles = [fake_bundle(name) for name in engines]
    with Runtime(bundles, engines=engines) as runtime, serving(runtime) as live:
        open_page(browser, live.url)
        model = Select(at(browser, "model"))

        def follows(name: str) -> tuple[str, bool]:
            """Whether the page shows the setting of lines or of colours, and whether one may choose, with a model."""
            model.select_by_value(name)
            until(lambda: at(browser, "scale").is_displayed() != at(browser, "strength").is_displayed())
            return "lines" if at(browser, "scale").is_displayed() else "colours", at(browser, "steer").is_displayed()

        at(browser, "draw").click()
        assert follows("edits") == ("colours", False)
        assert follows("both") == ("lines", True)
        browser.find_element(By.CSS_SELECTOR, "#steer label:last-child").click()
        assert follows("edits") == ("colours", False)
        assert follows("both") == ("colours", True), "it was chosen"


def test_a_key_is_asked_for_and_used(browser):
    with fake_server(Settings(api_keys=("secret",))) as live:
        browser.get(live.url)
        until(lambda: at(browser, "key").is_displayed())
        assert "API key" in at(browser, "error").text
        at(browser, "key").send_keys("wrong", Keys.ENTER)
        until(lambda: "API key" in at(browser, "error").text)
        at(browser, "key").clear()
        at(browser, "key").send_keys("secret", Keys.ENTER)
        until(lambda: at(browser, "server").text == "live")
        say(browser, "a red circle")
        assert not at(browser, "key").is_displayed()
        browser.execute_script("sessionStorage.clear()")


def test_words_the_model_does_not_know_are_noted(browser):
    bundle = fake_bundle("words")
    bundle.tokenizer.get_vocab = lambda: {"a</w>": 0, "red</w>": 1, "circle</w>": 2}
    with Runtime([bundle], engines={"words": FakeEngine()}) as runtime, serving(runtime) as live:
        open_page(browser, live.url)
        say(browser, "a red zebra")
        assert at(browser, "notes").text == "not in this model's vocabulary: zebra"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_light_and_dark(browser, live, scheme: str):
    prefer(browser, prefers_color_scheme=scheme)
    open_page(browser, live.url)
    say(browser, "a red circle")
    try:
        for width in (320, 390, 620, 800, 1280):
            size(browser, width, 800)
            for _ in range(2):
                assert browser.execute_script("return document.documentElement.scrollWidth") <= width
                at(browser, "draw").click()
        assert is_dark(browser) == (scheme == "dark")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        prefer(browser)


def is_dark(browser) -> bool:
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", ground)[:3])) < 382


def test_light_or_dark_can_be_chosen_and_stays(browser, live):
    prefer(browser, prefers_color_scheme="light")
    open_page(browser, live.url)
    assert not is_dark(browser) and at(browser, "theme").accessible_name == "Dark colours"
    at(browser, "theme").click()
    assert is_dark(browser) and at(browser, "theme").accessible_name == "Light colours"
    open_page(browser, live.url, keep=True)
    assert is_dark(browser)
    prefer(browser)


def test_nothing_moves_for_those_who_asked_for_that(browser, live):
    moving = "return getComputedStyle(document.getElementById('frame'), '::after').animationName"
    open_page(browser, live.url)
    browser.execute_script("document.getElementById('frame').classList.add('busy')")
    assert browser.execute_script(moving) == "run"
    prefer(browser, prefers_reduced_motion="reduce")
    assert browser.execute_script(moving) == "none"
    prefer(browser)


def test_the_keyboard_reaches_every_control_in_order(browser, live):
    open_page(browser, live.url)
    assert browser.switch_to.active_element.get_attribute("id") == "prompt"
    reached = []
    for _ in range(16):
        press(browser, Keys.TAB)
        reached.append(browser.switch_to.active_element.get_attribute("id"))
    named = [name for name in reached if name]
    assert named[:6] == ["model", "steps", "guidance", "seed", "dice", "lock"]
    assert {"draw", "theme", "help-button"} <= set(named)


def test_single_keys_work_outside_text_and_can_be_turned_off(browser, live):
    open_page(browser, live.url)
    say(browser, "why?")  # in the prompt the keys are letters
    assert not at(browser, "help").is_displayed()
    press(browser, Keys.ESCAPE)
    seed = at(browser, "seed").get_attribute("value")
    press(browser, "r")
    assert at(browser, "seed").get_attribute("value") != seed
    press(browser, "l")
    assert at(browser, "lock").get_attribute("aria-pressed") == "true"
    press(browser, "-")
    assert at(browser, "steps-value").text == "2"
    press(browser, "?")
    assert at(browser, "help").is_displayed() and "undo a stroke" in at(browser, "shortcuts").text
    at(browser, "single").click()
    press(browser, Keys.ESCAPE)
    assert not at(browser, "help").is_displayed()
    press(browser, "+")
    assert at(browser, "steps-value").text == "2"


def test_every_control_has_a_name(browser, live):
    open_page(browser, live.url)
    at(browser, "draw").click()
    say(browser, "a red circle")
    found = all_of(browser, "button, input, select, textarea, canvas, a[href], img, dialog")
    shown = [one for one in found if one.is_displayed()]
    assert len(shown) > 14
    assert [one.get_attribute("outerHTML")[:80] for one in shown if not one.accessible_name] == []


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_logged(browser, live):
    browser.get_log("browser")
    open_page(browser, live.url)
    at(browser, "draw").click()
    say(browser, "a red circle")
    until(lambda: all_of(browser, "#past button"))
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded and all(name.startswith((live.url, "data:", "blob:")) for name in loaded)
    assert browser.execute_script("return violations") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] not in ("DEBUG", "INFO")] == []
    policy = live.http.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_the_page_is_small(live):
    page = live.http.get("/").text
    parts = sorted(set(re.findall(r'(?:href|src)="(/page/[\w.]+)"', page)))
    files = {name: live.http.get(name) for name in parts}
    assert len(files) == 8 and all(file.status_code == 200 for file in files.values())
    assert len(page) + sum(len(file.content) for file in files.values()) < 50_000
