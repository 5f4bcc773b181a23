"""A headless Chromium for tests, and the chat page in it as a user handles it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OPTIONS = (
    "--headless",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
    "--window-size=1000,760",
)
TIMEOUT = 20  # seconds


@contextmanager
def chromium(profile: Path, downloads: Path) -> Iterator[webdriver.Chrome]:
    """Start it with an empty profile directory, in English, keeping its console's and its network's log."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    preferences = {"intl.accept_languages": "en", "download.default_directory": str(downloads)}
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The chat page."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path) -> None:
        self.driver = driver
        self.downloads = downloads

    def open(self, url: str, key: str | None = None) -> None:
        """Load it, with `key` entered before if there is one."""
        source = f"sessionStorage.setItem('hunyuan.key', '{key}')" if key else ""
        before = self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        self.driver.get(url)
        self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", before)

    def forget(self) -> None:
        """Drop what it keeps in the browser, and what was logged."""
        if self.driver.current_url.startswith("http"):
            self.driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What is in an element, shown or not."""
        return self.find(selector).get_property("textContent")

    def wait(self, condition: Any) -> Any:
        """Until condition() is true; its value."""
        return WebDriverWait(self.driver, TIMEOUT, poll_frequency=0.02).until(lambda _: condition())

    @property
    def focused(self) -> str:
        """The id of the element that has the keyboard."""
        return self.driver.switch_to.active_element.get_attribute("id")

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the keyboard."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def ask(self, question: str) -> None:
        """Type a question and Enter."""
        self.wait(lambda: self.find("#model").text)
        self.find("#question").send_keys(question, Keys.ENTER)

    def answered(self) -> str:
        """The last answer, once it is whole."""
        self.wait(lambda: self.find("#send").is_displayed() and self.all(".assistant"))
        return self.all(".assistant .text")[-1].text

    def settings(self, **values: str) -> None:
        """Open the settings and fill them in, by element id."""
        if not self.find("#settings").is_displayed():
            self.find("#show-settings").click()
        for name, value in values.items():
            field = self.find(f"#{name}")
            if field.tag_name == "select":
                field.find_element(By.CSS_SELECTOR, f"option[value={value}]").click()
            else:
                field.send_keys(Keys.CONTROL, "a")
                field.send_keys(value or Keys.DELETE)

    def console(self) -> list[str]:
        """What went wrong by the browser's own account: errors, and what the page's policy refused."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requested(self) -> list[str]:
        """Addresses of all requests since the last look."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [message["params"]["request"]["url"] for message in sent]
