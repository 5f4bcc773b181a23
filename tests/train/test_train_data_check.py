"""`hunyuan-vllm data check`: every bad line by number and cause, lengths, truncation, and a sample with its marks."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_data import GOLDEN
from typer.testing import CliRunner

from hunyuan_vllm import demo
from hunyuan_vllm.cli import app
from hunyuan_vllm.train.dataset import percentiles
from hunyuan_vllm.util.errors import UserError


def line(user: str, assistant: str, **more: str) -> str:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"messages": messages, **more}, ensure_ascii=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lines = [line("Hi", "Hello."), line("a b c", "1 2 3 4 5 6"), '{"messages": []}', "", "nonsense", line("一", "二")]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["data", "check", *map(str, arguments)])


def test_bad_lines_are_named_and_the_rest_is_counted(file: Path) -> None:
    result = run(file)
    assert result.exit_code == 1
    assert "line 3: it has no user and assistant messages\n" in result.stdout
    assert "line 5: it is not JSON: Expecting value: line 1 column 1 (char 0)\n" in result.stdout
    assert result.stdout.endswith("3 good conversations, 2 bad lines\n")


def test_the_sample_marks_what_is_learned(file: Path) -> None:
    result = run(file, "--default_system", "S")
    assert "\n  <|startoftext|>S<|extra_4|>Hi<|extra_0|>⟦Hello.<|eos|>⟧\n" in result.stdout
    result = run(file, "--sample", 6, "--train-on-all", "--default-system", "")
    assert "\n  ⟦<|startoftext|>一<|extra_0|>二<|eos|>⟧\n" in result.stdout


def test_the_system_message_of_the_published_training(file: Path, tmp_path: Path) -> None:
    """Hunyuan-Large's, which the V1 models are trained without."""
    v1 = tmp_path / "v1"
    shutil.copytree(demo.path(), v1, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__", "*.py"))
    shutil.copy(GOLDEN / "v1_a13b" / "config.json", v1)
    assert "<|startoftext|>You are a helpful assistant.<|extra_4|>Hi" in run(file).stdout
    assert "\n  <|startoftext|>Hi<|extra_0|>" in run(file, "--model", v1).stdout


@pytest.mark.parametrize("flag", ["--max_seq_length", "--max-seq-length"])
def test_json_with_truncation(file: Path, flag: str) -> None:
    result = run(file, flag, 8, "--default_system", "", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    # <|startoftext|> Hi <|extra_0|> He llo . <|eos|>: how many tokens words have is the vocabulary's affair.
    assert report["bad"] == [
        {"line": 3, "cause": "it has no user and assistant messages"},
        {"line": 5, "cause": "it is not JSON: Expecting value: line 1 column 1 (char 0)"},
    ]
    assert report["conversations"] == 3 and report["truncated"] == 1
    cut = 8
    longest = report["lengths"]["longest"]
    assert longest > cut
    assert report["tokens"] - report["tokens_after_truncation"] == longest - cut
    assert report["sample"]["parts"][-1] == {"text": "Hello.<|eos|>", "learned": True}


def test_a_file_without_a_bad_line(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text(line("Hi", "Hello.") + "\n")
    result = run(good)
    assert result.exit_code == 0
    assert result.stdout.endswith("1 good conversation, no bad lines\n")
    assert "0 conversations are longer than --max_seq_length 2,048" in result.stdout


def test_the_forms_of_the_lines_are_named(tmp_path: Path) -> None:
    """Each line is converted by its own fields; an answer of weight 0 is read and not learned."""
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    alpaca = {"instruction": "Hi", "input": "", "output": "Hello."}
    messages = json.loads(line("Hi", "Hello."))["messages"]
    half = {"messages": [messages[0], messages[1] | {"weight": 0}, *messages]}
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, [sharegpt, sharegpt, alpaca, half])))
    result = run(file, "--default_system", "", "--sample", 4)
    assert result.exit_code == 0, result.output
    assert "form     sharegpt (2), alpaca (1), messages (1)\n" in result.stdout
    said = "<|startoftext|>Hi<|extra_0|>"
    assert f"\n  {said}Hello.<|eos|>{said}⟦Hello.<|eos|>⟧\n" in result.stdout
    assert json.loads(run(file, "--json").stdout)["forms"] == {"sharegpt": 2, "alpaca": 1, "messages": 1}
    samples = [run(file, "--sample", number).stdout.splitlines()[-2] for number in (1, 3)]
    assert samples[0] == samples[1] and "⟦Hello.<|eos|>⟧" in samples[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"{}", mtime=0), "compressed with gzip: write it as JSONL first, with gunzip -k "),
        (b"PAR1\x15\x04", "is a Parquet table: "),
        (line("Hi", "Hello.").encode("utf-16"), "is UTF-16: convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8 "),
        (line("Hi", "Hello.").encode("utf-16-le"), "(iconv -f UTF-16LE -t UTF-8 "),
    ],
)
def test_a_file_that_is_not_jsonl_is_named_with_what_makes_it_so(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(content)
    result = run(file)
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception) and str(file) in str(result.exception)


def test_only_bad_lines(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n" * 30)
    result = run(bad)
    assert result.exit_code == 1
    assert result.stdout.count('it has no "messages"') == 20 and "and 10 more (--json" in result.stdout
    assert len(json.loads(run(bad, "--json").stdout)["bad"]) == 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.jsonl"], "none.jsonl cannot be read: No such file or directory"),
        (["{file}", "--model", "nowhere"], "--model nowhere is not a directory"),
        (["{file}", "--sample", "3"], "--sample 3: no conversation is in that line of"),
    ],
)
def test_mistakes(file: Path, arguments: list[str], said: str) -> None:
    result = run(*(argument.format(file=file) for argument in arguments))
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)


def test_percentiles() -> None:
    assert percentiles([3]) == {"shortest": 3, "p50": 3, "p90": 3, "p95": 3, "p99": 3, "longest": 3}
    found = percentiles(list(range(200, 0, -1)))
    assert found == {"shortest": 1, "p50": 100, "p90": 180, "p95": 190, "p99": 198, "longest": 200}
