"""Renews the pictures of the chat page: PYTHONPATH=tests .venv/bin/python tests/chat/make_pictures.py docs/pictures

Needs Chromium and a Chinese font (Debian: chromium, chromium-driver, fonts-wqy-zenhei or fonts-noto-cjk).
"""

import io
import sys
import tempfile
from pathlib import Path

from browser import Page, chromium
from PIL import Image
from serving import running_server

COLOURS = 64  # a page has few; the files are a third as large
QUESTIONS = {"en": ("Why is sea water salty?", "Rank the four oceans by area."), "zh": ("海水为什么是咸的？",)}
PICTURES = {
    "chat-light": {"language": "en", "theme": "light"},
    "chat-dark": {"language": "en", "theme": "dark", "temperature": "0.3", "system": "You are a helpful assistant."},
    "chat-zh": {"language": "zh", "theme": "light"},
}


def take(page: Page, url: str, settings: dict[str, str]) -> Image.Image:
    """The page after a short conversation; with the settings open where the picture is about them."""
    page.forget()
    page.open(url)
    page.settings(**settings)
    if "system" not in settings:
        page.find("#show-settings").click()
    for question in QUESTIONS[settings["language"]]:
        page.ask(question)
        page.answered()
    picture = Image.open(io.BytesIO(page.driver.get_screenshot_as_png()))
    return picture.convert("RGB").quantize(COLOURS)


def main(directory: Path) -> None:
    with running_server() as server, tempfile.TemporaryDirectory() as scratch:
        with chromium(Path(scratch) / "profile", Path(scratch)) as driver:
            for name, settings in PICTURES.items():
                take(Page(driver, Path(scratch)), server.url, settings).save(directory / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
