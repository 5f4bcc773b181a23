"""A user at the real server with the chat page in a real browser."""

import re

import httpx
import pytest
from browser import Page
from chat_server import CONTEXT, KEY
from selenium.webdriver.common.keys import Keys
from serving import Server
from streams import in_parts

pytestmark = pytest.mark.server
SALT = "Why is sea water salty?"
ENDLESS = {"temperature": "0", "repetition_penalty": "0.3"}  # a word that was said is said again, always
COST = r"(\d+) tokens in, (\d+) out (?:· [\d.,]+ tokens/s )?· first token after [\d.]+ s"


def under_way(server: Server) -> float:
    """Requests that the engine works on."""
    metrics = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return sum(float(value) for value in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)", metrics, re.M))


def test_the_key_is_asked_for_and_checked(page: Page, server: Server) -> None:
    page.open(server.url)
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    assert page.focused == "key"
    page.press("wrong", Keys.ENTER)
    page.wait(lambda: "did not accept" in page.find("#key-why").text)
    page.press(KEY, Keys.ENTER)
    page.wait(lambda: not page.find("#key-dialog").is_displayed())
    assert page.text("#model") == "hunyuan"
    assert page.driver.execute_script("return localStorage.getItem('hunyuan.key')") is None
    page.driver.refresh()
    page.wait(lambda: page.text("#model"))  # known in this tab
    page.driver.execute_script("sessionStorage.clear()")
    page.driver.refresh()
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    page.press(Keys.ESCAPE)
    page.wait(lambda: "requires an API key" in page.find("#problem").text)
    page.find("#problem button").click()
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    page.find("#remember").click()
    page.find("#key").send_keys(KEY, Keys.ENTER)
    page.wait(lambda: not page.find("#key-dialog").is_displayed())
    assert page.driver.execute_script("return localStorage.getItem('hunyuan.key')") == KEY


def test_an_answer_streams_and_says_what_it_cost(page: Page, server: Server) -> None:
    def lengths() -> set[int]:
        """Those that the answer had while one could read it."""
        page.forget()
        page.open(server.url, KEY)
        page.driver.execute_script("""
            window.seen = [];
            new MutationObserver(() => seen.push(document.querySelector(".assistant .text")?.textContent.length ?? 0))
              .observe(document.getElementById("log"), { childList: true, subtree: true });
        """)
        page.ask(SALT)
        assert "salt" in page.answered()
        seen = page.driver.execute_script("return seen")
        assert seen == sorted(seen)
        return {length for length in seen if length}

    assert in_parts(lengths, 1)
    cost = re.fullmatch(COST, page.find(".cost:not(:empty)").text)
    assert cost and page.find("#used").text == f"{int(cost[1]) + int(cost[2])} of {CONTEXT:,} tokens of context used."
    assert page.text("#status") == page.find(".assistant .text").get_property("textContent").strip()
    assert page.focused == "question"
    assert page.console() == []
    requested = page.requested()
    assert requested and [address for address in requested if not address.startswith(f"{server.url}/")] == []


def test_stopping_stops_the_engine_too(page: Page, server: Server) -> None:
    page.open(server.url, KEY)
    page.settings(**ENDLESS)
    page.ask("Tell me")
    page.wait(lambda: page.all(".assistant .block"))
    page.press(Keys.ESCAPE)
    page.answered()
    page.wait(lambda: "You stopped this answer." in page.find(".assistant .note").text)
    page.wait(lambda: page.find(".assistant .text").text)
    page.wait(lambda: under_way(server) == 0)
    edit = page.find(".user .buttons [data-text=edit]")
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", edit)
    edit.click()
    page.press(Keys.ENTER)
    page.wait(lambda: page.all(".assistant .block"))
    page.find("#stop").click()
    page.answered()
    page.wait(lambda: page.focused == "question")


def test_settings_reach_the_model(page: Page, server: Server) -> None:
    page.open(server.url, KEY)
    page.settings(temperature="0", max_tokens="5")
    page.ask(SALT)
    first = page.answered()
    assert "cut off" in page.find(".assistant .note").text
    prompt, completion = re.match(COST, page.find(".cost:not(:empty)").text).groups()
    assert completion == "5"
    page.settings(system="You are a helpful assistant who likes the sea.")
    page.all(".assistant .buttons button")[-1].click()  # answer again
    page.answered()
    assert len(page.all("article")) == 2
    with_system = int(re.match(COST, page.find(".cost:not(:empty)").text)[1])
    assert with_system > int(prompt) and first
    page.settings(temperature="9")
    page.find("#question").send_keys("Hello", Keys.ENTER)
    assert page.focused == "temperature" and len(page.all("article")) == 2
    page.find("#published").click()
    values = {name: page.find(f"#{name}").get_property("value") for name in ("temperature", "top_p", "max_tokens")}
    assert values == {"temperature": "0.7", "top_p": "0.6", "max_tokens": ""}


def test_the_conversation_stays_in_the_browser(page: Page, server: Server) -> None:
    page.open(server.url, KEY)
    page.settings(system="Be brief.", temperature="0", max_tokens="12")
    page.ask(SALT)
    answer = page.answered()
    page.driver.refresh()
    page.wait(lambda: page.text("#model"))
    assert [element.text for element in page.all("article .text")] == [SALT, answer]
    assert page.find("#system").get_property("value") == "Be brief."
    page.find("#save").click()
    saved = page.wait(lambda: list(page.downloads.glob("*.md")))[0].read_text()
    assert saved.startswith(f"## system\n\nBe brief.\n\n## user\n\n{SALT}\n\n## assistant\n\n{answer[:10]}")
    edit = page.find(".user .buttons [data-text=edit]")
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", edit)
    edit.click()
    assert page.all("article") == [] and page.find("#question").get_property("value") == SALT
    page.press(Keys.ENTER)
    page.answered()
    page.find("#new").click()
    page.driver.switch_to.alert.dismiss()
    assert len(page.all("article")) == 2
    page.find("#new").click()
    page.driver.switch_to.alert.accept()
    page.wait(lambda: not page.all("article"))
    page.driver.refresh()
    assert page.all("article") == []


def test_too_long_a_conversation_and_a_lost_server_are_explained(page: Page, server: Server) -> None:
    page.open(server.url, KEY)
    page.wait(lambda: page.text("#model"))
    page.driver.execute_script("document.getElementById('question').value = 'sea '.repeat(4000)")
    page.find("#send").click()
    page.wait(lambda: "longer than the model's context" in page.find("#problem").text)
    assert [element.get_attribute("class") for element in page.all("article")] == ["user"]
    page.driver.execute_cdp_cmd("Network.enable", {})
    lost = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", lost)
    try:
        page.find("#problem button").click()
        page.wait(lambda: "cannot be reached" in page.find("#problem").text)
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", lost | {"offline": False})
    page.find(".user .buttons [data-text=edit]").click()
    assert page.find("#problem").text == ""
    page.settings(max_tokens="5")
    page.find("#question").send_keys(Keys.CONTROL, "a")
    page.ask(SALT)
    assert page.answered()


def test_chinese(page: Page, server: Server) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setUserAgentOverride", {"userAgent": "test", "acceptLanguage": "zh-CN,zh;q=0.9"}
    )
    try:
        page.open(server.url, KEY)
        assert page.find("html").get_attribute("lang") == "zh"
        assert page.find("#send").text == "发送"
        page.find(".example:lang(zh)").click()
        assert "盐" in page.answered()
        assert "首个词元用时" in page.find(".cost:not(:empty)").text
        page.settings(language="en")
        assert page.find("#send").text == "Send"
        assert "first token after" in page.find(".cost:not(:empty)").text
        page.driver.refresh()
        page.wait(lambda: page.find("#send").text == "Send")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": "test", "acceptLanguage": "en"})
