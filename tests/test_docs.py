"""The documents keep up with the code."""

import re
from pathlib import Path

import pytest
import typer

from hunyuan_vllm.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(document: Path) -> set[str]:
    """Names of its headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    paths = re.findall(r"`((?:hunyuan_vllm|deploy|tests|benchmarks|examples|train|docs)/[\w./-]*)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    for link, anchor in re.findall(r"\]\(([^):]*)#([^)]+)\)", text):
        target = document.parent / link if link else document
        missing += [f"{link}#{anchor}"] if target.exists() and anchor not in anchors(target) else []
    assert missing == []


def test_the_reference_page_names_every_option_and_variable() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    options = set()
    commands = [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        options |= {word for option in command.params if option.param_type_name == "option" for word in option.opts}
    directories = ROOT / "hunyuan_vllm", ROOT / "deploy"
    sources = [path for directory in directories for kind in ("*.py", "*.sh") for path in directory.rglob(kind)]
    variables = {name for source in sources for name in re.findall(r"\bHUNYUAN_[A-Z_]+[A-Z]\b", source.read_text())}
    named = set(re.findall(r"`(--?[\w-]+|[A-Z_]+)`", text))
    assert options - {"--help", "--install-completion", "--show-completion", "--version"} - named == set()
    assert variables - {"HUNYUAN_VLLM"} - named == set()  # a word of the router's settings
