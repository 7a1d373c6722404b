"""The web page in headless Chromium, against a live server.

PAGE_SCREENSHOT=docs/page.png PAGE_BUNDLE=scenes-lcm pytest tests/test_page.py -k screenshot   writes the picture.
"""

import base64
import os
import re
import shutil
from pathlib import Path

import pytest
from live import fake_server, serving, until

from fewstep.models.spec import Guidance, Spacing
from fewstep.runtime.fake_engine import FakeEngine, Fault, fake_bundle, fake_spec
from fewstep.runtime.local import Runtime
from fewstep.server.settings import Settings

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium or chromedriver is not installed", allow_module_level=True)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--window-size=1100,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def live():
    with fake_server() as server:
        yield server


def at(browser, name: str):
    return browser.find_element(By.ID, name)


def open_page(browser, url: str) -> None:
    browser.get(url)
    until(lambda: at(browser, "steps").find_elements(By.TAG_NAME, "input"))


def drawn(browser) -> bool:
    """Whether the picture has come and its pixels are decoded."""
    return browser.execute_script(
        "const p = document.getElementById('picture'); return !p.hidden && p.naturalWidth > 0"
    )


def choose_steps(browser, steps: int) -> None:
    browser.execute_script(f"document.querySelector('#steps input[value=\"{steps}\"]').click()")


def test_a_prompt_becomes_a_picture_with_its_latency(browser, live):
    open_page(browser, live.url)
    offered = [int(box.get_attribute("value")) for box in at(browser, "steps").find_elements(By.TAG_NAME, "input")]
    assert offered == [1, 2, 4, 8]
    choose_steps(browser, 2)
    at(browser, "prompt").send_keys("a red circle")
    at(browser, "generate").click()
    until(lambda: drawn(browser))
    assert browser.execute_script("return document.getElementById('picture').naturalWidth") == 64
    assert at(browser, "picture").value_of_css_property("image-rendering") == "pixelated"
    assert re.fullmatch(r"[\d.]+ ms", at(browser, "latency").text)
    stages = at(browser, "stages").text.split()
    names = [word for word in stages if word.isalpha() and word != "ms"]
    assert names == ["queue", "text", "denoise", "decode", "encode", "other"]
    about = at(browser, "about").text
    assert "2 steps" in about and "2 NFE" in about and "fake" in about
    assert at(browser, "error").text == ""
    assert len(at(browser, "history").find_elements(By.TAG_NAME, "button")) == 1


def test_enter_generates_and_a_fixed_seed_repeats(browser, live):
    open_page(browser, live.url)
    pictures = []
    for _ in range(2):
        at(browser, "seed").clear()
        at(browser, "seed").send_keys("42")
        before = len(live.engine.calls)
        at(browser, "prompt").send_keys("a blue square" if not pictures else "", Keys.ENTER)
        until(lambda: len(live.engine.calls) > before and "seed 42" in at(browser, "about").text)  # noqa: B023
        until(lambda: at(browser, "generate").text == "Generate")
        pictures.append(at(browser, "picture").get_attribute("src"))
    assert at(browser, "dice").get_attribute("aria-pressed") == "false"
    assert pictures[0] == pictures[1]
    at(browser, "dice").click()
    at(browser, "generate").click()
    until(lambda: "seed 42" not in at(browser, "about").text)
    assert at(browser, "picture").get_attribute("src") != pictures[0]


def test_an_error_is_readable_and_the_next_picture_clears_it(browser, live):
    open_page(browser, live.url)
    at(browser, "generate").click()
    until(lambda: at(browser, "error").is_displayed())
    assert at(browser, "error").text == "prompt is empty; say what the picture should show"
    assert at(browser, "error").get_attribute("role") == "alert"
    at(browser, "examples").find_elements(By.TAG_NAME, "button")[0].click()
    until(lambda: drawn(browser))
    assert not at(browser, "error").is_displayed()
    assert at(browser, "prompt").get_attribute("value").startswith("a large red circle")


def test_an_engine_failure_is_readable(browser):
    with fake_server(faults={("decoder", k): Fault("fail") for k in range(9, 99)}) as live:
        while live.generate(steps=1).status_code == 200:
            pass
        open_page(browser, live.url)
        at(browser, "prompt").send_keys("a red circle", Keys.ENTER)
        until(lambda: at(browser, "error").is_displayed())
        assert "told to fail" in at(browser, "error").text
        assert at(browser, "generate").text == "Generate"


def test_controls_follow_the_model(browser):
    teacher = fake_spec(
        sampler="ddim", grids={}, spacing=Spacing(kind="trailing", max_steps=30), stochastic=False, boundary=None,
        guidance=Guidance(mode="cfg", default=4.0, range=(1.0, 9.0)),
    )  # fmt: skip
    plain = fake_spec(guidance=Guidance(mode="none"))
    specs = {"student": plain, "teacher": teacher}
    engines = {name: FakeEngine(spec) for name, spec in specs.items()}
    with (
        Runtime([fake_bundle(name, spec) for name, spec in specs.items()], engines=engines) as runtime,
        serving(runtime) as live,
    ):
        open_page(browser, live.url)
        assert not at(browser, "guidance").is_displayed() and not at(browser, "negative").is_displayed()
        at(browser, "model").send_keys("teacher")
        until(lambda: at(browser, "guidance").is_displayed())
        assert at(browser, "negative").is_displayed() and at(browser, "guidance-value").text == "4.0"
        choose_steps(browser, 25)
        at(browser, "negative").send_keys("blue")
        at(browser, "prompt").send_keys("a red circle", Keys.ENTER)
        until(lambda: "50 NFE" in at(browser, "about").text)


def test_a_key_is_asked_for_and_used(browser):
    with fake_server(Settings(api_keys=("secret",))) as live:
        browser.get(live.url)
        until(lambda: at(browser, "key").is_displayed())
        assert "API key" in at(browser, "error").text
        at(browser, "key").send_keys("secret", Keys.TAB)
        until(lambda: at(browser, "steps").find_elements(By.TAG_NAME, "input"))
        at(browser, "prompt").send_keys("a red circle", Keys.ENTER)
        until(lambda: drawn(browser))


def test_words_the_model_does_not_know_are_noted(browser):
    bundle = fake_bundle("words")
    bundle.tokenizer.get_vocab = lambda: {"a</w>": 0, "red</w>": 1, "circle</w>": 2}
    with Runtime([bundle], engines={"words": FakeEngine()}) as runtime, serving(runtime) as live:
        open_page(browser, live.url)
        at(browser, "prompt").send_keys("a red zebra", Keys.ENTER)
        until(lambda: drawn(browser))
        assert at(browser, "notes").text == "not in this model's vocabulary: zebra"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_it_fits_narrow_and_wide_light_and_dark(browser, live, scheme: str, width: int):
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        open_page(browser, live.url)
        at(browser, "prompt").send_keys("a red circle", Keys.ENTER)
        until(lambda: drawn(browser))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 382) == (scheme == "light")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_keyboard_reaches_every_control_in_order(browser, live):
    open_page(browser, live.url)
    reached = []
    for _ in range(12):
        reached.append(
            browser.switch_to.active_element.get_attribute("id") or browser.switch_to.active_element.tag_name
        )
        browser.switch_to.active_element.send_keys(Keys.TAB)
    wanted = ["prompt", "generate", "model", "guidance", "seed", "dice"]
    assert [name for name in reached if name in wanted] == wanted


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_logged(browser, live):
    browser.get_log("browser")
    open_page(browser, live.url)
    at(browser, "prompt").send_keys("a red circle", Keys.ENTER)
    until(lambda: drawn(browser))
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded and all(name.startswith((live.url, "data:")) for name in loaded)
    assert [entry for entry in browser.get_log("browser") if entry["level"] not in ("DEBUG", "INFO")] == []


def test_a_screenshot(browser, tmp_path):
    bundle = os.environ.get("PAGE_BUNDLE")
    target = Path(os.environ.get("PAGE_SCREENSHOT", tmp_path / "page.png"))
    runtime = Runtime([bundle]) if bundle else Runtime([fake_bundle("fake")], engines={"fake": FakeEngine()})
    with runtime, serving(runtime) as live:
        open_page(browser, live.url)
        examples = at(browser, "examples").find_elements(By.TAG_NAME, "button")
        for number, example in enumerate(examples):
            example.click()
            until(lambda: len(at(browser, "history").find_elements(By.TAG_NAME, "button")) == number + 1)  # noqa: B023
        until(lambda: drawn(browser))
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    target.write_bytes(base64.b64decode(shot["data"]))
    assert target.stat().st_size > 10_000
