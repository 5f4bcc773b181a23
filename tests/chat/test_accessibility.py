"""The page for those who use a keyboard or a screen reader: axe's checks, light and dark, and the order of the keys."""

from pathlib import Path
from typing import Any

import pytest
from browser import Page
from fake_server import FakeServer
from selenium.webdriver.common.keys import Keys

AXE = Path(__file__).parent / "axe" / "axe.min.js"
TEXT = """# Sea

It is **salty**, see [this](https://example.org).

> quoted

| a |
|---|
| 1 |

```js
let a = 1; // b
```
"""


def violations(page: Page) -> list[str]:
    """What axe finds against WCAG 2.2 A and AA and its own best practices."""
    page.driver.execute_script(AXE.read_text())
    found: list[dict[str, Any]] = page.driver.execute_async_script(
        "axe.run().then((result) => arguments[0](result.violations))"
    )
    return [f"{rule['id']}: {node['html']} {node['failureSummary']}" for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, fake: FakeServer, theme: str) -> None:
    fake.text, fake.fault = TEXT, None
    page.open(fake.url)
    page.settings(theme=theme)
    page.ask("Why?")
    page.answered()
    fake.fault = (429, "busy", {"Retry-After": "3"})
    page.ask("Again?")
    page.wait(lambda: page.find("#problem").text)
    assert violations(page) == []
    page.find("#change-key").click()
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    assert violations(page) == []
    page.press(Keys.ESCAPE)
    background = page.find("body").value_of_css_property("background-color")
    assert background == {"light": "rgba(255, 255, 255, 1)", "dark": "rgba(21, 23, 27, 1)"}[theme]


def test_the_system_chooses_light_or_dark(page: Page, fake: FakeServer) -> None:
    page.open(fake.url)
    seen = []
    for scheme in ("dark", "light"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        seen.append(page.find("body").value_of_css_property("background-color"))
    assert seen == ["rgba(21, 23, 27, 1)", "rgba(255, 255, 255, 1)"]


def test_everything_is_reached_by_tab(page: Page, fake: FakeServer) -> None:
    fake.text, fake.fault = TEXT, None
    page.open(fake.url)
    page.ask("Why?")
    page.answered()
    page.driver.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.press(Keys.TAB)
        element = page.driver.switch_to.active_element
        if element in reached:
            break
        if element.tag_name != "body":  # between the last and the first
            assert element.value_of_css_property("outline-style") == "solid"
            reached.append(element)
    focusable = page.all("header :is(button, select), main :is(button, textarea, a[href], [tabindex='0'])")
    assert set(reached) == {element for element in focusable if element.is_displayed()}


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Page, fake: FakeServer) -> None:
    fake.text, fake.fault = TEXT + "x" * 300, None
    metrics = {"width": 340, "height": 640, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open(fake.url)
        page.ask("Why?")
        page.answered()
        page.settings(theme="auto")
        width = page.driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= 340
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
