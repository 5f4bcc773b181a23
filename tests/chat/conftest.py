"""One server with an API key for the page, and one Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, Page, chromium
from chat_server import KEY, chat_server
from fake_server import FakeServer, fake_server
from serving import Server


@pytest.fixture(scope="package")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "api-key"
    file.touch(mode=0o600)
    file.write_text(KEY)
    return file


@pytest.fixture(scope="package")
def server(key_file: Path) -> Iterator[Server]:
    with chat_server(key_file) as running:
        yield running


@pytest.fixture(scope="package")
def fake() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("Chromium is not here (Debian: apt-get install chromium chromium-driver)")
    downloads = tmp_path_factory.mktemp("downloads")
    with chromium(tmp_path_factory.mktemp("profile"), downloads) as driver:
        yield Page(driver, downloads)


@pytest.fixture
def page(browser: Page) -> Page:
    """The browser, with nothing kept from earlier tests of any server."""
    browser.forget()
    return browser
