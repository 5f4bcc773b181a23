"""What a model writes is shown and never run; what a server does wrong is explained."""

import re

import pytest
from browser import Page
from fake_server import MODEL, FakeServer
from selenium.webdriver.common.keys import Keys

RUNS = "window.ran = true"
HOSTILE = f"""# <script>{RUNS}</script>

<img src=x onerror="{RUNS}"> <svg onload="{RUNS}"> <iframe srcdoc="<script>parent.{RUNS}</script>"></iframe>
<a href="javascript:{RUNS}" id="go">html</a> <form action="/evil"><input name="attributes"></form> <style>*{{}}</style>

[one](javascript:{RUNS}) [two](JaVaScRiPt&colon;{RUNS}) [three](data:text/html,<script>{RUNS}</script>)
[four](vbscript:x) <javascript:{RUNS}> [five]( java\nscript:{RUNS}) [good](https://example.org/?a=1&b="c"#d)

![picture](https://evil.example/pixel.png?secret) ![p](x" onerror="{RUNS}) [title](https://example.org '"><img src=x>')

| <b onmouseover={RUNS}> | `<script>` |
|---|--:|
| <math><mtext></table><mglyph><style><img src=x onerror={RUNS}> | 1 |

```html"><img/src=x/onerror={RUNS}>
</code></pre><script>{RUNS}</script>
```

```js" onclick="{RUNS}
alert(1)
```

```python
print("</span><img src=x onerror={RUNS}>")
```

<noscript><p title="</noscript><img src=x onerror={RUNS}>">
"""


def answer_to(page: Page, fake: FakeServer, text: str) -> None:
    fake.text, fake.fault, fake.breaks_off = text, None, False
    page.open(fake.url)
    page.ask("Go")
    page.answered()


def test_hostile_text_is_shown_and_never_run(page: Page, fake: FakeServer) -> None:
    answer_to(page, fake, HOSTILE)
    allowed = set("article h2 h3 div p pre code span a table thead tbody tr th td button em strong blockquote".split())
    own = "details:has(> summary[data-text=thinking])"  # the page's own, for thinking
    found = {element.tag_name for element in page.all(f"#log :not({own}, {own} > summary)")}
    assert found <= allowed
    links = [link.get_attribute("href") for link in page.all("#log a")]
    assert links and all(link.startswith("https://") for link in links)
    assert all("noopener" in link.get_attribute("rel") for link in page.all("#log a"))
    script = """
        const others = document.querySelectorAll(`#log :not(${arguments[0]})`)
        return [...new Set([...others].flatMap((element) => element.getAttributeNames()))]
    """
    names = page.driver.execute_script(script, own)
    harmless = {"class", "dir", "type", "data-text", "tabindex", "href", "rel", "target", "title", "aria-busy"}
    assert set(names) <= harmless
    for link in page.all("#log a"):
        page.driver.execute_script("arguments[0].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))", link)
    assert page.driver.execute_script("return window.ran") is None
    shown = page.find(".assistant .text").text
    assert f"<script>{RUNS}</script>" in shown and f"</code></pre><script>{RUNS}</script>" in shown
    assert page.console() == []  # not even an attempt that the policy had to refuse
    assert [address for address in page.requested() if not address.startswith(f"{fake.url}/")] == []
    page.driver.refresh()  # from what the browser kept
    page.wait(lambda: page.all(".assistant .block"))
    assert page.driver.execute_script("return window.ran") is None


def test_the_policy_stops_what_would_get_past_the_rest(page: Page, fake: FakeServer) -> None:
    page.open(fake.url)
    page.wait(lambda: page.text("#model"))
    page.driver.execute_script("""
        const script = document.createElement("script");
        try { script.textContent = "window.ran = true"; } catch { window.refusedText = true; }
        document.body.append(script);
        try { document.body.innerHTML = "<img src=x onerror='ran = true'>"; } catch { window.refusedHtml = true; }
        try { document.body.setAttribute("onclick", "window.ran = true"); } catch { window.refusedHandler = true; }
        document.body.click();
        fetch("https://example.org/").catch(() => { window.refusedFetch = true; });
    """)
    page.wait(lambda: page.driver.execute_script("return window.refusedFetch"))
    assert page.driver.execute_script("return refusedText && refusedHtml && refusedHandler && !window.ran")


def test_markdown_and_code(page: Page, fake: FakeServer) -> None:
    code = 'def taste():\n    return "salt"  # sea'
    table = "| a | b |\n|---|--:|\n| 1 | 2 |"
    answer_to(page, fake, f"# Sea\n\n1. **salt**\n2. *water*\n\n{table}\n\n```python\n{code}\n```\n")
    assert page.find("#log h3").text == "Sea"
    assert [item.text for item in page.all("#log li")] == ["salt", "water"]
    assert page.find("#log td:last-child").value_of_css_property("text-align") == "right"
    assert page.find("#log pre").text == code
    assert page.find(".hljs-keyword").text == "def"
    granted = {"origin": fake.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", granted)
    page.find(".code button").click()
    page.wait(lambda: page.find(".code button").text == "Copied")
    assert page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])").strip() == code


def test_the_rate_is_of_tokens_and_not_of_the_pieces_that_they_come_in(page: Page, fake: FakeServer) -> None:
    rates = []
    for fake.tokens in (1, 100):
        fake.pace = 0.02
        try:
            page.forget()
            answer_to(page, fake, "7 chars" * 30)
        finally:
            fake.pace = 0.001
        cost = page.find(".assistant .cost").text.replace(",", "")
        rate = re.search(rf"9 tokens in {30 * fake.tokens} out · ([\d.]+) tokens/s", cost)
        assert rate, cost
        rates.append(float(rate[1]))
    fake.tokens = 1
    assert rates[0] <= 52 and rates[1] / 52 > 5  # 50 pieces a second at most


def test_a_growing_answer_leaves_finished_blocks_alone(
    page: Page, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.text, fake.fault, fake.breaks_off = "First.\n\n" + "word " * 600, None, False
    monkeypatch.setattr(fake, "pace", 0.1)  # until it has been looked at
    page.open(fake.url)
    page.ask("Go")
    page.wait(lambda: len(page.all(".assistant .block")) > 1)
    first = page.find(".assistant .block")
    assert page.find(".assistant .note").text == ""  # nothing is wrong with it yet
    assert not page.find("#send").is_displayed()
    monkeypatch.undo()
    page.answered()
    assert first.text == "First."  # still the same element


def test_models_to_choose_from(page: Page, fake: FakeServer) -> None:
    other_name, adapter = MODEL | {"id": "a/path"}, MODEL | {"id": "style", "root": "/adapter", "parent": "fake"}
    fake.models = (MODEL, other_name, adapter)
    try:
        page.open(fake.url)
        page.wait(lambda: page.text("#model"))
        assert [option.text for option in page.all("#model option")] == ["fake", "style"]
        page.find("#model option:last-child").click()
        page.driver.refresh()
        answer_to(page, fake, "In style")
        assert fake.asked["model"] == "style" and page.find(".assistant h2").text == "style"
    finally:
        fake.models = (MODEL,)


def test_a_browser_that_keeps_nothing_says_so(page: Page, fake: FakeServer) -> None:
    fake.text, fake.fault, fake.breaks_off = "Hi", None, False
    page.open(fake.url)
    page.driver.execute_script("Storage.prototype.setItem = () => { throw new DOMException('QuotaExceededError'); }")
    page.ask("Go")
    assert page.answered() == "Hi" and "does not allow storage" in page.find("#kept").text


def test_faults_are_explained(page: Page, fake: FakeServer) -> None:
    fake.text, fake.breaks_off = "A good answer", False
    page.open(fake.url)
    for fault, words in (
        ((429, "too many requests", {"Retry-After": "7"}), "Try again in 7 seconds"),
        ((503, "the server is about to stop", {}), "busy or shutting down"),
        ((500, "Internal Server Error", {}), "failed while processing"),
        ((400, "top_k: must be at least 0", {}), "did not accept the request"),
    ):
        fake.fault = fault
        page.ask("Go")
        page.wait(lambda words=words: words in page.find("#problem").text)
        assert fault[1] in page.find("#problem .note").text
        page.find(".user .buttons [data-text=edit]").click()
        page.find("#question").send_keys(Keys.CONTROL, "a", Keys.DELETE)
    fake.fault, fake.breaks_off = None, True
    page.ask("Go")
    page.wait(lambda: "connection ended" in page.find("#problem").text)
    assert page.answered() == "A good answer" and "connection ended" in page.find(".assistant .note").text
    fake.breaks_off = False
    page.find("#problem button").click()
    page.wait(lambda: [element.text for element in page.all("article .text")] == ["Go", "A good answer"])
    page.wait(lambda: page.find("#problem").text == "" and page.find("#send").is_displayed())
    assert fake.asked["messages"] == [{"role": "user", "content": "Go"}]
