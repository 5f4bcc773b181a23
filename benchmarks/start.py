"""Seconds from `hunyuan-vllm serve` to the first answer, stage by stage: with empty caches, and again.

    python benchmarks/start.py                                       # the demo model
    python benchmarks/start.py /models/hunyuan-a13b --max-model-len 8k   # as serve takes them

The caches of vLLM and its compiler are empty at the first start and kept for the others; the packages' bytecode and the
system's page cache are as they are. CPU seconds are those of all processes until the server is ready; on a busy machine
they are more reliable than wall-clock time.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
from common import Report, note

from hunyuan_vllm.server.terminal import STAGES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import COMMAND, free_port  # noqa: E402

QUESTION = {"messages": [{"role": "user", "content": "Why is sea water salty?"}], "max_tokens": 8}
READY = re.compile(rb"hunyuan-vllm: ready after")
LIMIT = 3600.0  # seconds


def start(arguments: list[str], environ: dict[str, str]) -> dict[str, float]:
    """Start a server, ask it once and stop it. Returns seconds a stage, in all, and of CPU time."""
    port = free_port()
    begun = time.monotonic()
    server = subprocess.Popen(
        [COMMAND, "serve", *arguments], env={**environ, "PORT": str(port)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert server.stdout is not None
    marks, output, cpu = {"launcher": 0.0}, b"", 0.0
    found = [(b"hunyuan-vllm: starting", STAGES[0][0]), *[(pattern, title) for title, pattern in STAGES[1:]]]
    try:
        for line in server.stdout:
            output += line
            for pattern, title in found:
                if title not in marks and re.search(pattern, line):
                    marks[title] = time.monotonic() - begun
            if READY.search(line):
                break
        else:
            raise SystemExit(output[-4000:].decode(errors="replace"))
        marks["first answer"] = time.monotonic() - begun
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        for process in family:
            with suppress(psutil.Error):
                times = process.cpu_times()
                # Children that have ended, such as compilers, are in their parents' times.
                cpu += times.user + times.system + times.children_user + times.children_system
        httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=QUESTION, timeout=60).raise_for_status()
        total = time.monotonic() - begun
    finally:
        server.terminate()
        server.communicate()
    ends = [*list(marks.values())[1:], total]
    stages = {title: end - at for (title, at), end in zip(marks.items(), ends, strict=True)}
    return stages | {"in all": total, "CPU": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=2, help="the first with empty caches (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        places = {"XDG_CACHE_HOME": directory, "VLLM_CACHE_ROOT": f"{directory}/vllm", "TMPDIR": f"{directory}/tmp"}
        Path(places["TMPDIR"]).mkdir()
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | places
        rows = []
        for number in range(options.starts):
            rows.append(start(arguments, environ))
            note(f"start {number + 1}: {rows[-1]['in all']:.1f} s")
    report = Report("start", options, serve=arguments)
    for stage in rows[0]:
        seconds = {f"start {number}": row.get(stage, 0.0) for number, row in enumerate(rows, 1)}
        report.add("seconds", stage=stage, **seconds)
    report.show()


if __name__ == "__main__":
    main()
