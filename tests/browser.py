"""Headless Chromium for the tests of the page. Without it they are skipped, unless BROWSER_TESTS=required, as in CI."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from live import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    missing = "chromium or chromedriver is not installed"
    if os.environ.get("BROWSER_TESTS") == "required":
        raise RuntimeError(f"BROWSER_TESTS is required, but {missing}")
    pytest.skip(missing, allow_module_level=True)
if os.environ.get("BROWSER_TESTS") != "required":
    pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--window-size=1280,860",
)  # fmt: skip
_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""
_PIXELS = """
const image = document.getElementById("picture"), canvas = document.createElement("canvas");
canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
canvas.getContext("2d").drawImage(image, 0, 0);
return canvas.toDataURL();
"""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser that notes whatever a page's security policy refuses."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    try:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
        yield driver
    finally:
        driver.quit()


def at(browser: Any, name: str) -> Any:
    return browser.find_element(By.ID, name)


def all_of(browser: Any, css: str) -> list[Any]:
    return list(browser.find_elements(By.CSS_SELECTOR, css))


def open_page(browser: Any, url: str, *, keep: bool = False) -> None:
    """The page, connected; without what earlier tests left in the browser, unless `keep`."""
    browser.get(url)
    if not keep:
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.refresh()
    until(lambda: at(browser, "server").text == "live")


def drawn(browser: Any) -> bool:
    """Whether a picture has come, its pixels are decoded, and none is on its way."""
    return bool(
        browser.execute_script(
            "const p = document.getElementById('picture');"
            "return !p.hidden && p.complete && p.naturalWidth > 0 && !document.querySelector('#frame.busy')"
        )
    )


def say(browser: Any, text: str) -> None:
    """Replace the prompt by typing, and wait for its picture."""
    at(browser, "prompt").clear()
    at(browser, "prompt").send_keys(text)
    until(lambda: drawn(browser) and at(browser, "picture").get_attribute("alt") == text.strip())


def pixels(browser: Any) -> str:
    """The shown picture as a data URL: equal for equal pixels."""
    until(lambda: drawn(browser))
    return str(browser.execute_script(_PIXELS))


def stroke(browser: Any, *points: tuple[float, float]) -> None:
    """Draw with the mouse through points of the pad, from (0, 0) to (1, 1)."""
    pad = at(browser, "pad")
    side = pad.size["width"]
    hand = ActionChains(browser, duration=10)
    for number, (x, y) in enumerate(points):
        hand.move_to_element_with_offset(pad, int((x - 0.5) * side), int((y - 0.5) * side))
        if number == 0:
            hand.click_and_hold()
    hand.release().perform()


def size(browser: Any, width: int, height: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )


def prefer(browser: Any, **features: str) -> None:
    """Media features, such as prefers_color_scheme="dark"."""
    found = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": found})
