"""What the server hands out of the chat page, to whom, and under which policy."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from hunyuan_vllm import demo
from hunyuan_vllm.server.middleware.asgi import Receive, Scope, Send, without_prefix
from hunyuan_vllm.server.middleware.page import PAGE, SECURITY_HEADERS, ChatPage, bundle

VENDOR = PAGE / "chat" / "vendor"
OWN = [file for file in PAGE.rglob("*") if file.is_file() and VENDOR not in file.parents]


async def behind(scope: Scope, receive: Receive, send: Send) -> None:
    """The application that the page is in front of."""
    await PlainTextResponse("the application", 401)(scope, receive, send)


@pytest.fixture
def client() -> TestClient:
    return TestClient(ChatPage(behind))


def test_the_page_and_its_files_need_no_key(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    for address in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        answer = client.get(f"/{address}")
        assert answer.status_code == 200
        assert dict(answer.headers) | SECURITY_HEADERS == dict(answer.headers)
    assert client.get("/chat/app.js").headers["content-type"].startswith("text/javascript")
    again = client.get("/chat/app.js", headers={"if-none-match": client.head("/chat/app.js").headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        ("GET", "/v1/models"),
        ("GET", "/chat"),
        ("GET", "/chat/"),
        ("GET", "/chat/none.js"),
        ("GET", "/chat/turn.js"),  # a part of app.js
        ("GET", "/chat/..%2f..%2fchat_page.py"),
        ("GET", "/chat/%2e%2e/%2e%2e/auth.py"),
        ("GET", "//chat/app.js"),
        ("PUT", "/chat/app.js"),
    ],
)
def test_all_else_is_the_applications(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, path).text == "the application"


def test_below_a_prefix() -> None:
    async def with_prefix(scope: Scope, receive: Receive, send: Send) -> None:
        await ChatPage(behind)(without_prefix(scope), receive, send)

    client = TestClient(with_prefix, root_path="/llm")
    assert "<h1>Hunyuan</h1>" in client.get("/llm/").text
    assert client.get("/llm/chat/app.js").status_code == 200
    assert client.get("/llm/v1/models").text == "the application"


def test_the_policy_has_no_exception() -> None:
    policy = dict(part.split(" ", 1) for part in SECURITY_HEADERS["content-security-policy"].split("; "))
    assert policy.pop("trusted-types") == "dompurify"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy["default-src"] == "'none'" and set(policy.values()) == {"'none'", "'self'"}


def test_nothing_of_ours_needs_an_exception() -> None:
    html = (PAGE / "index.html").read_text()
    assert re.findall(r"<script(?! type=\"module\" src=)|<style|\son\w+=|\sstyle=|javascript:", html) == []
    for file in OWN:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert re.findall(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) == [], file


def test_all_modules_are_one_script_each_after_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "app.js").write_text(
        'import { one, two } from "./part/a.js";\nimport it from "./part/it.js";\nshow(one);\n'
    )
    (tmp_path / "part/a.js").write_text(
        'import it from "./it.js";\nexport const one = it;\nexport function* two() {}\n'
    )
    (tmp_path / "part/it.js").write_text("const x = 1;\nexport { x as default };\n//# sourceMappingURL=it.map\n")
    script = bundle(tmp_path, "app.js")
    assert [script.count(f"= {value};") for value in ('modules["part/it.js"]', "it", "1")] == [2, 1, 1]
    starts = [script.index(f'modules["{name}"] = ') for name in ("part/it.js", "part/a.js", "app.js")]
    assert starts == sorted(starts)
    assert "return { one, two };" in script and "return { default: x };" in script


def test_the_pages_script_has_all_of_its_modules(client: TestClient) -> None:
    script = client.get("/chat/app.js").text
    assert re.findall(r"^(?:import|export)\b.*", script, re.M) == []
    for file in (PAGE / "chat").rglob("*.js"):
        assert f'modules["{file.relative_to(PAGE / "chat").as_posix()}"] = ' in script


def test_libraries_are_as_published() -> None:
    rows = re.findall(r"^\| (\S+\.js) \| (\S+) (\S+) \|.* \| (\w{64}) \|$", (VENDOR / "README.md").read_text(), re.M)
    assert {row[0] for row in rows} == {file.name for file in VENDOR.glob("*.js")}
    licences = (VENDOR / "LICENSES.txt").read_text()
    for file, package, version, digest in rows:
        assert hashlib.sha256((VENDOR / file).read_bytes()).hexdigest() == digest
        assert f"==== {package} {version} ====" in licences
    axe = Path(__file__).with_name("axe")
    assert hashlib.sha256((axe / "axe.min.js").read_bytes()).hexdigest() in (axe / "README.md").read_text()


def test_both_languages_say_everything() -> None:
    en, zh = ((PAGE / "chat" / f"words.{language}.js").read_text() for language in ("en", "zh"))
    words = re.compile(r"^  (\w+):\s+\"(.*)\",$", re.M)
    filled = re.compile(r"\{\w+\}")
    assert {name: set(filled.findall(text)) for name, text in words.findall(en)} == {
        name: set(filled.findall(text)) for name, text in words.findall(zh)
    }
    used = {name for file in OWN for name in re.findall(r'data-(?:text|label|placeholder)="(\w+)"', file.read_text())}
    assert used <= {name for name, _ in words.findall(en)}


def test_sampling_starts_with_the_published_values() -> None:
    published = json.loads((demo.path() / "generation_config.json").read_text())
    controls = re.findall(r'name: "(\w+)", published: ([\d.]+)', (PAGE / "chat" / "sampling.js").read_text())
    assert {name: float(value) for name, value in controls} == {
        name: published[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty")
    }
