"""The page in a browser: it draws, its controls work, it fetches nothing, on a desk and a phone."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest

import biassurgery as bs
from tests import models

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
ABSENT = "chromium and its driver are not installed: `make browser` installs Debian's"
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=ABSENT)
pytest.importorskip("vl_convert", reason="needs vl-convert-python (the report extra)")
WIDTHS = (1400, 400)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("browser") / "report.html"
    return bs.report(models.planted("llama"), [models.tokens()], path, progress=False)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def opened(browser, page: Path, width: int = 1400) -> None:
    """The page, drawn, without a word of the ones before in the logs."""
    browser.set_window_size(width, 900)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    wait(lambda: browser.execute_script("return document.documentElement.dataset.drawn") == "yes")


def wait(done, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def find(browser, css: str):
    return browser.find_element("css selector", css)


def logits_shown(browser) -> list[str]:
    """The cells with their colours, in whatever order they are drawn."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#logits .mark-rect path')]"
        ".map(cell => cell.getAttribute('d') + cell.getAttribute('fill')).sort()"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_it_draws_everything_and_fetches_nothing(browser, page, width):
    opened(browser, page, width)
    charts, drawn = browser.execute_script(
        "return [document.querySelectorAll('.chart').length,"
        " document.querySelectorAll('.chart svg').length]"
    )
    assert charts == drawn > 3
    assert browser.get_log("browser") == []
    wide, inside = browser.execute_script(
        "return [document.documentElement.scrollWidth, window.innerWidth]"
    )
    assert wide <= inside
    asked = [
        json.loads(entry["message"])["message"]["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_slider_changes_the_layer(browser, page):
    from selenium.webdriver.common.keys import Keys

    opened(browser, page)
    before = logits_shown(browser)
    slider = find(browser, "#logits input[type=range]")
    layer = int(slider.get_attribute("value"))
    slider.send_keys(Keys.ARROW_RIGHT)
    wait(lambda: logits_shown(browser) != before)
    assert int(slider.get_attribute("value")) == layer + 1
    assert len(logits_shown(browser)) == len(before)


def test_a_table_is_there_when_it_is_opened(browser, page):
    opened(browser, page)
    rows = "return document.querySelectorAll('#magnitudes tbody tr').length"
    assert browser.execute_script(rows) == 0
    find(browser, "#magnitudes summary").click()
    wait(lambda: browser.execute_script(rows) == 4 * models.LAYERS)
    assert len(browser.find_elements("css selector", "#interventions tbody tr")) == 4


def test_large_numbers_are_written_for_people(browser, page):
    opened(browser, page)
    for summary in browser.find_elements("css selector", "summary"):
        summary.click()
    cells = browser.execute_script(
        "return [...document.querySelectorAll('td:not(.text)')].map(cell => cell.textContent)"
    )
    large = [cell for cell in cells if abs(float(cell.replace(",", "") or 0)) >= 1e4]
    assert large
    assert all(re.fullmatch(r"-?\d{1,3}(,\d{3})+", cell) for cell in large)


def test_what_is_downloaded_is_what_is_shown(browser, page, downloads):
    opened(browser, page)
    find(browser, '#magnitudes [data-get="csv"]').click()
    find(browser, '#magnitudes [data-get="png"]').click()
    table, picture = downloads / "magnitudes.csv", downloads / "magnitudes.png"
    wait(lambda: table.is_file() and picture.is_file())
    lines = table.read_text().splitlines()
    assert lines[0] == "block,value,magnitude"
    assert len(lines) == 1 + 4 * models.LAYERS
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_it_speaks_to_those_who_do_not_see_it(browser, page):
    opened(browser, page)
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('figure')].filter(f => !(f.getAttribute('aria-label')"
        " || f.querySelector('img')?.alt)).length"
    )
    assert unnamed == 0
    assert find(browser, "html").get_attribute("lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_the_dark(browser, page, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    opened(browser, page)
    colours = browser.execute_script(
        "const of = (css) => getComputedStyle(document.querySelector(css));"
        "return [of('body').color, of('body').backgroundColor, of('#magnitudes svg text').fill]"
    )
    text, back, label = map(luminance, colours)
    for each in (text, label):
        assert (max(each, back) + 0.05) / (min(each, back) + 0.05) > 7  # WCAG's AAA
    assert (back < 0.5) == (scheme == "dark")


def luminance(colour: str) -> float:
    """Of `rgb(r, g, b)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
