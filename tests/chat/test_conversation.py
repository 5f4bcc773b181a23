"""What the page shows of an answer, and what it sends of a conversation, with a server that answers as it is told."""

from browser import Page
from fake_server import FakeServer
from selenium.webdriver.common.keys import Keys

REFUSED = (400, "not this one", {})
TABLE = """| 海水为什么是咸的 | an/uncommonly-long_word.without_a_place_to_break | c |
|---|---|---|
| 盐 | Pneumonoultramicroscopicsilicovolcanoconiosis | Donaudampfschifffahrtsgesellschaft |
"""
FORMULAS = r"""Inline \(a_1 * b_1 * c_{*}\) and $x_1*y_1*z_1$, at $5 or *then* $10.

\[
- x_1 \\

= \frac{a_{1}}{b_{1}}
\]

$$E = m c^2 \\ <b>p_1</b>$$
"""


def refused(page: Page, fake: FakeServer, question: str) -> None:
    fake.fault = REFUSED
    page.ask(question)
    page.wait(lambda: "not this one" in page.find("#problem").text)
    fake.fault = None


def asked(fake: FakeServer) -> list[str]:
    return [message["content"] for message in fake.asked["messages"]]


def test_a_question_that_failed_is_not_sent_again_with_the_next(page: Page, fake: FakeServer) -> None:
    fake.text, fake.fault, fake.breaks_off = "Yes", None, False
    page.open(fake.url)
    page.ask("One")
    page.answered()
    refused(page, fake, "Two")
    assert "not answered" in page.all(".user .note")[1].text
    page.find("#question").send_keys("Three", Keys.ENTER)
    page.wait(lambda: len(page.all(".assistant")) == 2 and page.find("#send").is_displayed())
    assert asked(fake) == ["One", "Yes", "Three"]
    assert [element.text for element in page.all("article .text")] == ["One", "Yes", "Two", "Three", "Yes"]
    page.driver.refresh()
    page.ask("Four")
    page.wait(lambda: len(page.all(".assistant")) == 3 and page.find("#send").is_displayed())
    assert asked(fake) == ["One", "Yes", "Three", "Yes", "Four"]
    (remove,) = page.all("[data-text=remove]")
    page.driver.execute_script("arguments[0].click()", remove)
    assert [element.text for element in page.all(".user .text")] == ["One", "Three", "Four"]
    assert page.all("[data-text=remove]") == []


def test_a_question_that_failed_can_be_edited_removed_and_asked_again(page: Page, fake: FakeServer) -> None:
    fake.text, fake.breaks_off = "Yes", False
    page.open(fake.url)
    refused(page, fake, "One")
    page.find(".user [data-text=edit]").click()
    assert page.all("article") == [] and page.find("#question").get_property("value") == "One"
    page.find("#question").send_keys(Keys.CONTROL, "a")
    refused(page, fake, "Two")
    page.find(".user [data-text=remove]").click()
    assert page.all("article") == [] and page.find("#problem").text == ""
    refused(page, fake, "Three")
    page.find("#problem button").click()
    page.wait(lambda: page.all(".assistant") and page.find("#send").is_displayed())
    assert asked(fake) == ["Three"]
    assert page.find(".user .note").text == ""


def test_thinking_is_shown_apart_and_not_sent_again(page: Page, fake: FakeServer) -> None:
    fake.text, fake.reasoning, fake.fault, fake.breaks_off = "Yes", "Is it\n<b>so</b>?", None, False
    page.open(fake.url)
    page.ask("One")
    page.answered()
    thought = page.find(".assistant .thought")
    assert page.find(".assistant .text").text == "Yes" and thought.text == "Thinking"
    thought.find_element("css selector", "summary").click()
    assert thought.text == "Thinking\nIs it\n<b>so</b>?"
    fake.reasoning = ""
    page.find("#question").send_keys("Two", Keys.ENTER)
    page.wait(lambda: len(page.all(".assistant")) == 2 and page.find("#send").is_displayed())
    assert asked(fake) == ["One", "Yes", "Two"]
    assert not page.all(".thought")[-1].is_displayed()
    fake.text, fake.reasoning, fake.breaks_off = "", "Endless", True
    page.find("#question").send_keys("Three", Keys.ENTER)
    page.wait(lambda: len(page.all(".assistant")) == 3 and page.find("#send").is_displayed())
    assert "Endless" in page.all(".thought")[-1].get_property("textContent")
    fake.reasoning = ""


def test_formulas_stay_as_they_were_written(page: Page, fake: FakeServer) -> None:
    fake.text, fake.fault, fake.breaks_off = FORMULAS, None, False
    page.open(fake.url)
    page.ask("Go")
    page.answered()
    assert [element.text for element in page.all(".math")] == [
        r"\(a_1 * b_1 * c_{*}\)",
        "$x_1*y_1*z_1$",
        "\\[\n- x_1 \\\\\n\n= \\frac{a_{1}}{b_{1}}\n\\]",
        r"$$E = m c^2 \\ <b>p_1</b>$$",
    ]
    assert [element.text for element in page.all("#log em")] == ["then"]
    assert page.all("#log li") == []


def test_a_table_scrolls_instead_of_breaking_words(page: Page, fake: FakeServer) -> None:
    fake.text, fake.fault, fake.breaks_off = TABLE, None, False
    metrics = {"width": 400, "height": 640, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open(fake.url)
        page.ask("Go")
        page.answered()
        heights = page.driver.execute_script("""
            return [...document.querySelectorAll("#log td")].slice(1).map((cell) => {
              const range = document.createRange();
              range.selectNodeContents(cell);
              return range.getClientRects().length;
            });
        """)
        assert heights == [1, 1]  # lines
        frame = page.find(".wide")
        assert int(frame.get_property("scrollWidth")) > int(frame.get_property("clientWidth"))
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 400
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_load_is_a_few_requests(page: Page, fake: FakeServer) -> None:
    page.open(fake.url)
    page.wait(lambda: page.text("#model"))
    requested = [address for address in page.requested() if address.startswith(fake.url)]
    assert 1 < len(requested) <= 6, requested
    assert page.console() == []
