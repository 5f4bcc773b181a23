"""`hunyuan-vllm bench` against a real server with keys, TLS and limits."""

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
        [COMMAND, "bench", "--url", server.url, *arguments],
        env={
            **os.environ,
            "VLLM_API_KEY": KEYS["alice"],
            "SSL_CERT_FILE": str(server.certificate),
            "COLUMNS": "200",
        },  # fmt: skip
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_small_sweep(keyed_server: KeyedServer, tmp_path: Path) -> None:
    """Each figure is checked against what it must be, or against the others."""
    output = tmp_path / "run.json"
    result = bench(keyed_server, "--input-len=64", "--output-len=16", "--concurrency=1,2", f"--output={output}")
    assert result.returncode == 0, result.stderr
    run = read_run(output)
    server, points = run["server"], run["points"]
    assert run["model"] == "hunyuan" and run["client"]["place"] == "this machine"
    assert server["devices"] == "1" and server["device"] and int(server["cores"]) >= 1
    assert server["max_num_seqs"] == "8" and server["vllm"] in run["client"]["version"]
    assert [(one["concurrency"], one["requests"], one["failed"]) for one in points] == [(1, 8, 0), (2, 8, 0)]
    for one in points:
        assert one["output_tokens_per_second"] == pytest.approx(8 * 16 / one["seconds"])
        assert one["requests_per_second"] == pytest.approx(8 / one["seconds"])
        for name in ("ttft", "tpot", "itl", "e2el"):
            assert 0 < one[f"{name}_p50"] <= one[f"{name}_p90"] <= one[f"{name}_p99"]
        # A request's time is that to its first token and that of the other 15: true of any eight requests.
        for point in ("p50", "p90", "p99"):
            assert max(one[f"ttft_{point}"], 15 * one[f"tpot_{point}"]) <= 1.01 * one[f"e2el_{point}"]
        assert one["e2el_p99"] <= 1.01 * (one["ttft_p99"] + 15 * one["tpot_p99"])
    assert 4 * points[0]["e2el_p50"] <= 1010 * points[0]["seconds"]  # one after the other
    assert "out tokens/s" in result.stdout
    assert KEYS["alice"] not in output.read_text() + result.stdout + result.stderr
    assert "2 of 2: 2 requests at a time" in result.stderr and "Traceback" not in result.stderr
    same = forked_programs.run([COMMAND, "bench", "compare", output, output])
    assert same.returncode == 0 and "(1.00×)" in same.stdout and "differs" not in same.stdout


@pytest.mark.parametrize(
    ("arguments", "key", "says"),
    [
        ([], KEYS["alice"], "2048 tokens in and 256 out do not fit into the model's context of 512 tokens"),
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
    monkeypatch.setenv("SSL_CERT_FILE", str(keyed_server.certificate))
    result = CliRunner().invoke(app, ["bench", "--url", keyed_server.url, *arguments])
    assert isinstance(result.exception, UserError) and says in str(result.exception)
