"""`hunyuan-vllm bench` against a real server with keys, TLS and limits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import forked_programs
import pytest
from keyed_server import KEYS, KeyedServer
from serving import COMMAND, free_port
from typer.testing import CliRunner

from hunyuan_vllm.bench.run import read_run
from hunyuan_vllm.cli import app
from hunyuan_vllm.util.errors import UserError

pytestmark = pytest.mark.server


def bench(server: KeyedServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Not forked: aiohttp reads the trusted certificates when it is imported.
    return subprocess.run(
        [COMMAND, "bench", "--url", server.url, "--ca", str(server.certificate), *arguments],
        env={**os.environ, "VLLM_API_KEY": KEYS["alice"], "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_small_sweep(keyed_server: KeyedServer, tmp_path: Path) -> None:
    """Each figure is checked against what it must be, or against the others."""
    output = tmp_path / "run.json"
    result = bench(
        keyed_server, "--input-len=64", "--output-len=16", "--concurrency=1,3", "--requests=6", f"--output={output}"
    )
    assert result.returncode == 0, result.stderr
    run = read_run(output)
    assert run.model == "hunyuan" and run.client["place"] == "this machine"
    assert run.machine["devices"] == "1" and run.machine["device"] and int(run.machine["cores"]) >= 1
    assert run.options["max_num_seqs"] == "8" and run.options["vllm"] in run.client["version"]
    assert [(one["concurrency"], one["requests"], one["failed"]) for one in run.points] == [(1, 6, 0), (3, 6, 0)]
    for one in run.points:
        assert one["output_tokens_per_second"] == pytest.approx(6 * 16 / one["seconds"])
        assert one["requests_per_second"] == pytest.approx(6 / one["seconds"])
        for name in ("ttft", "tpot", "itl", "e2el"):
            assert 0 < one[f"{name}_p50"] <= one[f"{name}_p90"] <= one[f"{name}_p99"]
        # A request's time is that to its first token and that of the other 15; what follows holds for any six requests.
        for point in ("p50", "p90", "p99"):
            assert max(one[f"ttft_{point}"], 15 * one[f"tpot_{point}"]) <= 1.01 * one[f"e2el_{point}"]
        assert one["e2el_p99"] <= 1.01 * (one["ttft_p99"] + 15 * one["tpot_p99"])
    assert 3 * run.points[0]["e2el_p50"] <= 1010 * run.points[0]["seconds"]  # one after the other
    assert "out tokens/s" in result.stdout
    assert KEYS["alice"] not in output.read_text() + result.stdout + result.stderr
    assert "2 of 2: 6 requests, 3 at a time" in result.stderr and "Traceback" not in result.stderr
    same = forked_programs.run([COMMAND, "bench", "compare", output, output, "--json"])
    assert same.returncode == 0 and json.loads(same.stdout)["differs"] == []


@pytest.mark.parametrize(
    ("arguments", "key", "says"),
    [
        ([], KEYS["alice"], "2048 tokens in and 256 out do not fit into the model's context of 512 tokens"),
        (["--model=gpt"], KEYS["alice"], "the server has no model gpt: it has hunyuan, hunyuan-demo, style"),
        ([], "wrong", "does not accept this API key"),
        (["--output=/nowhere/run.json"], KEYS["alice"], "/nowhere does not exist"),
        (["--input-len=64", "--output-len=8", "--tokenizer=/nowhere"], KEYS["alice"], "/nowhere is not a directory"),
        (["--concurrency=0"], KEYS["alice"], "--concurrency 0 is not a list"),
        ([f"--url=http://127.0.0.1:{free_port()}"], KEYS["alice"], "no server answers"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    keyed_server: KeyedServer, monkeypatch: pytest.MonkeyPatch, arguments: list[str], key: str, says: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    where = ["--url", keyed_server.url, "--ca", str(keyed_server.certificate)]
    result = CliRunner().invoke(app, ["bench", *where, *arguments])
    assert isinstance(result.exception, UserError) and says in str(result.exception)
