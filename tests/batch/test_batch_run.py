"""`hunyuan-vllm batch` on the demo model, as a user runs it: killed in the middle, run again, run once more."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import forked_programs
import psutil
import pytest
from forked_programs import ENGINE_TOO, Program
from golden_data import reference_answers

from hunyuan_vllm import demo

pytestmark = [pytest.mark.engine, pytest.mark.slow]
COMMAND = Path(sys.executable).with_name("hunyuan-vllm")
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(64 * 2**20)]
SALT = [{"role": "user", "content": "Why is sea water salty?"}]
IDS = [[1801, 364, 281], [1801, 1006, 281, 496, 476, 619, 63, 1805], [1801, 46, 46, 46]]
GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "return_token_ids": True}
HOT = {"prompt": "...", "temperature": 2, "top_p": 1, "top_k": 0}


def batch_api(name: str, **body) -> dict:
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": SALT, **body}}


LINES: dict[str, object] = {
    **{f"ids {at}": {"prompt": ids, **GREEDY} for at, ids in enumerate(IDS)},
    "chat": {"messages": SALT, "temperature": 0, "id": "chat"},
    "chinese": {"messages": [{"role": "user", "content": "海水为什么是咸的？"}], "temperature": 0, "id": 5},
    "batch api": batch_api("one", temperature=0),
    "several": {"messages": SALT, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 3, "temperature": 1},
    "stop": {"messages": SALT, "temperature": 0, "stop": ["salty"]},
    "seed": HOT | {"seed": 3},
    "seed again": HOT | {"seed": 3},
    "no seed": HOT,
    "no seed either": HOT | {"user": "b"},
    "unknown model": batch_api("two", model="nope"),
    "too long": {"prompt": "x y z " * 200},
    "wrong role": {"messages": [{"role": "boss", "content": "x"}]},
    "no messages": {"messages": []},
    "cold": {"prompt": "a", "temperature": -1},
    "same id": {"prompt": "a", "id": "chat"},
    "text": "no JSON",
    **{f"long {at}": {"prompt": f"{at}...", "max_tokens": 200, "ignore_eos": True} for at in range(30)},
}
FAILING = {
    "unknown model": ("model", "`nope` does not exist"),
    "too long": ("prompt", "maximum context length is 256"),
    "wrong role": ("messages.0.role", "'system', 'user' or 'assistant', not \"boss\""),
    "no messages": ("messages", "messages"),
    "cold": ("temperature", "non-negative"),
    "same id": ("id", "also that of line 4"),
    "text": (None, "not JSON"),
}


@dataclass
class Runs:
    """What three runs of one command left behind."""

    source: Path
    target: Path
    killed: bytes
    killed_status: int
    orphans: list[psutil.Process]
    resumed: subprocess.CompletedProcess[str]
    resumed_output: bytes
    again: subprocess.CompletedProcess[str]

    def records(self) -> dict[str, dict]:
        by_line = {record["line"]: record for record in map(json.loads, self.resumed_output.splitlines())}
        return {name: by_line[at] for at, name in enumerate(LINES, start=1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    directory = tmp_path_factory.mktemp("batch")
    source, target, said = directory / "in.jsonl", directory / "out.jsonl", directory / "said"
    source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in LINES.values()))
    sampling = ["--max-tokens", "60", "--params", '{"seed": 11, "top_p": null}']
    command = [COMMAND, "batch", source, target, *sampling, *FLAGS]
    environ = {name: value for name, value in os.environ.items() if name != "MODEL_PATH"} | ENGINE_TOO

    def start() -> Program:
        with said.open("w") as stderr:
            return Program(command, environ, stderr=stderr, start_new_session=True)

    first = start()
    wait_for_growth(first, target, 0)
    worker = psutil.Process(first.pid).children()[0]
    processes = worker.children(recursive=True)
    worker.send_signal(signal.SIGKILL)
    status = first.wait(30)
    orphans = psutil.wait_procs(processes, timeout=30)[1]
    killed = target.read_bytes()

    second = start()
    wait_for_growth(second, target, len(killed))
    os.killpg(second.pid, signal.SIGINT)  # Ctrl-C, by which time all lines are in flight
    resumed = subprocess.CompletedProcess(command, second.wait(120), stderr=said.read_text())
    resumed_output = target.read_bytes()
    again = forked_programs.run(command, environ)
    return Runs(source, target, killed, status, orphans, resumed, resumed_output, again)


def wait_for_growth(run: Program, target: Path, size: int) -> None:
    deadline = time.monotonic() + 400
    while not (target.exists() and target.stat().st_size > size):
        assert run.poll() is None and time.monotonic() < deadline, target.with_name("said").read_text()
        time.sleep(0.02)


def test_a_kill_takes_all_processes_with_it(runs):
    assert runs.killed_status == 128 + signal.SIGKILL
    assert runs.orphans == []


def test_a_killed_run_goes_on_where_it_was(runs):
    written = runs.killed[: runs.killed.rfind(b"\n") + 1]
    lines = written.count(b"\n")
    assert 0 < lines < len(LINES)
    assert runs.resumed_output.startswith(written)
    assert f"for {len(LINES) - lines} of {len(LINES)} lines" in runs.resumed.stderr


def test_ctrl_c_lets_the_lines_in_flight_finish(runs):
    assert re.search(r"finishing \d+ lines? in flight; press Ctrl-C again to drop them", runs.resumed.stderr)


def test_every_line_is_written_once(runs):
    written = Counter(json.loads(line)["line"] for line in runs.resumed_output.splitlines())
    assert written == Counter(range(1, len(LINES) + 1))
    for record, given in zip(runs.records().values(), LINES.values(), strict=True):
        assert record["input"] == given


def test_a_finished_run_starts_no_engine(runs):
    assert runs.again.returncode == runs.resumed.returncode == 1
    assert "starting" not in runs.again.stderr
    assert runs.target.read_bytes() == runs.resumed_output


def test_the_summary_counts(runs):
    for run in (runs.resumed, runs.again):
        assert f"{len(LINES) - len(FAILING)} of {len(LINES)} lines answered, {len(FAILING)} failed" in run.stderr
        assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", FAILING)
def test_a_failed_line_has_its_error_beside_its_input(runs, name):
    field, says = FAILING[name]
    record = runs.records()[name]
    assert record["error"]["param"] == field
    assert says in record["error"]["message"]
    assert "outputs" not in record and "response" not in record


def test_all_others_have_an_answer(runs):
    for name, record in runs.records().items():
        assert name in FAILING or record["error"] is None
        if name.startswith("long"):
            assert record["usage"]["completion_tokens"] == 200


def test_tokens_are_the_reference_model_s(runs):
    expected = reference_answers(demo.path(), IDS, max_new_tokens=16)
    for at, item in enumerate(expected.items):
        assert runs.records()[f"ids {at}"]["outputs"][0]["token_ids"] == item.greedy


def test_answers(runs):
    records = runs.records()
    chat = records["chat"]
    assert chat["id"] == "chat" and records["chinese"]["id"] == 5
    (output,) = chat["outputs"]
    assert "salt" in output["text"] and output["finish_reason"] == "stop"
    assert "盐" in records["chinese"]["outputs"][0]["text"]
    assert chat["usage"]["total_tokens"] == chat["usage"]["prompt_tokens"] + chat["usage"]["completion_tokens"]
    stopped = records["stop"]["outputs"][0]
    assert stopped["text"] == output["text"][: output["text"].index("salty")] and stopped["stop_reason"] == "salty"
    several = records["several"]["outputs"]
    assert len(several) == 2 and all(len(each["logprobs"]["content"]) == 3 for each in several)


def test_a_batch_api_line_is_answered_in_its_form(runs):
    record = runs.records()["batch api"]
    assert record["custom_id"] == "one" and record["response"]["status_code"] == 200
    body = record["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == runs.records()["chat"]["outputs"][0]["text"]


def test_seeds(runs):
    def text(name: str) -> str:
        return runs.records()[name]["outputs"][0]["text"]

    assert text("seed") == text("seed again")
    assert len({text("seed"), text("no seed"), text("no seed either")}) == 3
