"""The demo's page in headless Chromium: it fits, loads nothing, sorts, filters, hands over its tables, is labelled."""

import base64
import csv
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.page.cells import DASH
from analysis.page.downloads import ERROR
from quant.bit_plan import BitPlan

pytestmark = pytest.mark.timeout(900)  # the first test that asks for the demo waits for it: minutes on a busy machine

# Every table: its caption, columns, which of them can be sorted, and its cells as text and as number.
TABLES = """
return Array.from(document.querySelectorAll('table'), table => ({
  caption: table.caption.textContent,
  columns: Array.from(table.tHead.rows[0].cells, cell => cell.textContent.trim()),
  sortable: Array.from(table.tHead.rows[0].cells, cell => cell.querySelector('button') !== null),
  rows: Array.from(table.tBodies[0].rows, row => Array.from(row.cells, cell => [cell.textContent, cell.dataset.key])),
  link: table.closest('.table').querySelector('a[download]').href,
  file: table.closest('.table').querySelector('a[download]').download,
}));
"""


@pytest.fixture(scope="module")
def page(demonstrated) -> Path:
    """The page that compares the demo's two networks."""
    return demonstrated / "report" / "index.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Headless Chromium that notes its console and what it loads."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if driver is None or program is None:
        pytest.skip("chromium and its chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def browser(chromium, page):
    """The browser with the page opened anew and unfolded; whatever a test does, it neither complains nor asks."""
    loaded(chromium)
    chromium.get_log("browser")
    chromium.get(page.as_uri())
    chromium.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true; });")
    yield chromium
    assert chromium.get_log("browser") == []
    assert loaded(chromium) == [page.as_uri()]


def loaded(browser) -> list[str]:
    """Addresses that the browser has asked for since the last call, without what lies inside the page."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


def content(address: str) -> str:
    """What a data: address holds."""
    return base64.b64decode(address.partition(";base64,")[2]).decode()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_window(browser, width, scheme):
    """Nothing reaches beyond the window save inside a region that scrolls; figures are there; dark where asked for."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    outside = browser.execute_script(
        "const wide = e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5;"
        "return Array.from(document.body.querySelectorAll('*')).filter(wide)"
        ".filter(e => !e.parentElement.closest('.scroll')).map(e => e.outerHTML.slice(0, 100));"
    )
    assert outside == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_every_table_sorts_by_every_column(browser):
    """Numbers as numbers, words as words, a second click the other way; what was not measured stays last."""
    before = browser.execute_script(TABLES)
    assert sum(any(table["sortable"]) for table in before) > 10
    for i, table in enumerate(before):
        for j in (j for j, sortable in enumerate(table["sortable"]) if sortable):
            orders = []
            for direction in ("ascending", "descending"):
                sort, column = browser.execute_script(
                    "const table = document.querySelectorAll('table')[arguments[0]];"
                    "const head = table.tHead.rows[0].cells[arguments[1]]; head.querySelector('button').click();"
                    "return [Array.from(table.tHead.rows[0].cells, cell => cell.ariaSort), "
                    "Array.from(table.tBodies[0].rows, row => "
                    "[row.cells[arguments[1]].textContent, row.cells[arguments[1]].dataset.key ?? null])];",
                    i,
                    j,
                )
                assert sort == [direction if place == j else None for place in range(len(sort))]
                orders.append(column)
            cells = [row[j] for row in table["rows"]]
            for column in orders:
                assert sorted(map(str, column)) == sorted(str([text, key]) for text, key in cells)
                missing = [key == "" for _, key in column]
                assert missing == sorted(missing)
            ascending, descending = ([float(key) for _, key in column if key] for column in orders)
            assert ascending == sorted(ascending)
            assert descending == ascending[::-1]
            words = [text for text, key in orders[0] if key is None]
            assert words == orders_of_words(browser, words)


def orders_of_words(browser, words: list[str]) -> list[str]:
    """The words as people order them: numbers inside them by their value."""
    return browser.execute_script(
        "return arguments[0].sort((a, b) => a.localeCompare(b, 'en', {numeric: true}));", words
    )


def test_a_column_is_sorted_from_the_keyboard(browser):
    """The head of a column is a button: it takes the focus, and Enter and the space bar press it."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    button = browser.find_element(By.XPATH, "//table[caption[contains(., 'evaluated networks')]]//th[2]/button")
    head = button.find_element(By.XPATH, "..")
    for key, direction in ((Keys.ENTER, "ascending"), (Keys.SPACE, "descending")):
        button.send_keys(key)
        assert head.get_attribute("aria-sort") == direction


def test_long_tables_can_be_filtered(browser):
    """Typing leaves the rows that hold all the words, in whatever case, and says how many; emptied, all are back."""
    from selenium.webdriver.common.by import By

    inputs = [each for each in browser.find_elements(By.CSS_SELECTOR, "input") if each.is_displayed()]
    tables = [each for each in browser.execute_script(TABLES) if len(each["rows"]) > 12 and any(each["sortable"])]
    assert len(inputs) == len(tables) >= 3
    for field, table in zip(inputs, tables, strict=True):
        rows = [" ".join(text for text, _ in row).lower() for row in table["rows"]]
        words = table["rows"][3][0][0][:5].upper(), table["rows"][3][1][0][:2]
        field.send_keys(" ".join(words))
        expected = [all(word.lower() in row for word in words) for row in rows]
        block = field.find_element(By.XPATH, "ancestor::div[@class='table']")
        shown = "return Array.from(arguments[0].querySelectorAll('tbody tr'), row => row.offsetParent !== null);"
        assert browser.execute_script(shown, block) == expected
        assert sum(expected) > 0
        assert block.find_element(By.TAG_NAME, "output").text == f"{sum(expected)} of {len(rows)} rows"
        field.clear()
        field.send_keys(" ")
        assert all(browser.execute_script(shown, block))
        assert block.find_element(By.TAG_NAME, "output").text == ""


def test_every_table_is_handed_over_as_csv(browser):
    """Its columns and rows, numbers to ten digits, errors beside them, nothing where nothing was measured."""
    tables = browser.execute_script(TABLES)
    assert len({table["file"] for table in tables}) == len(tables)
    for table in tables:
        columns, *rows = csv.reader(io.StringIO(content(table["link"])))
        kept = [not name.startswith(ERROR) for name in columns]
        assert [name for name, keep in zip(columns, kept, strict=True) if keep] == table["columns"], table["caption"]
        assert len(rows) == len(table["rows"]) > 0
        for cells, shown in zip(rows, table["rows"], strict=True):
            values = [cell for cell, keep in zip(cells, kept, strict=True) if keep]
            for value, (text, key) in zip(values, shown, strict=True):
                if key:
                    assert float(value) == pytest.approx(float(key), rel=1e-9)
                else:
                    assert value == ("" if text == DASH else text)
            errors = [cell for cell, keep in zip(cells, kept, strict=True) if not keep and cell]
            assert all(float(error) >= 0 for error in errors)


def test_links_lead_somewhere(browser, demonstrated):
    """Those inside the page to what they name, all others to a file that it holds; the plans are those of the runs."""
    inside = browser.execute_script(
        "return Array.from(document.querySelectorAll('a:not([download])'), a => a.getAttribute('href'));"
    )
    assert len(inside) >= 6
    for href in inside:
        assert browser.execute_script("return document.getElementById(arguments[0]) !== null;", href.removeprefix("#"))
    plans = browser.execute_script(
        "return Array.from(document.querySelectorAll('a[download$=\".json\"]'), a => [a.download, a.href]);"
    )
    assert [file for file, _ in plans] == ["resnet-plan.json", "swin-plan.json"]
    for name, (_, address) in zip(("resnet", "swin"), plans, strict=True):
        plan = BitPlan.from_json(content(address), source="the page")
        assert plan.sha256 == BitPlan.from_json((demonstrated / name / "plan.json").read_text()).sha256


def test_a_click_keeps_the_file(browser, tmp_path):
    """A link to a table puts a file of its name into the folder of downloads, with what the page holds."""
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    table = browser.execute_script(TABLES)[0]
    browser.execute_script("document.querySelector('.table a[download]').click();")
    kept = tmp_path / table["file"]
    deadline = time.monotonic() + 60
    while not kept.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert kept.read_text() == content(table["link"])


def test_everything_has_a_name_for_those_who_do_not_see_it(browser):
    """Figures, tables, buttons, fields, links and regions that scroll; one main heading; the page's landmarks."""
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            name = node.get("name", {}).get("value", "")
            named.setdefault(str(node["role"]["value"]), []).append(name)
    for role in ("image", "table", "button", "searchbox", "link", "region", "navigation"):
        assert named[role], role
        assert all(name.strip() for name in named[role]), role
    links = [name for name in named["link"] if name.startswith("CSV")]
    assert len(set(links)) == len(links) == len(named["table"])
    for landmark in ("banner", "main", "contentinfo"):
        assert len(named[landmark]) == 1
    assert browser.execute_script("return document.querySelectorAll('h1').length") == 1
    assert browser.execute_script("return document.documentElement.lang") == "en"
