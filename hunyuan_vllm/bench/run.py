"""The published workload on a running server, measured by vLLM's serving benchmark; runs as tables and compared

A run is a JSON object: `model`, `server` (machine, versions and options), `client`, `seed`, and `points`. Times are
percentiles in milliseconds, over requests (ITL: over tokens).
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import secrets
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from hunyuan_vllm.bench.client import ServedModel, is_this_machine
from hunyuan_vllm.util.errors import UserError

PERCENTILES = (50, 90, 99)
METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}  # vLLM's names → the table's
SPARE = 16  # tokens: decoding and tokenizing random tokens may lengthen a prompt
STRIDE = 1000  # between the seeds of points: repeated prompts would be answered from the prefix cache
LOAD = ("input_len", "output_len", "concurrency")  # points are compared where these are equal
Point = dict[str, float]


def read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_bytes())
        _ = run["model"], run["server"], run["client"], [_load(point) for point in run["points"]]
        return run
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a file of `hunyuan-vllm bench --output`") from None


def describe(served: ServedModel, version: str) -> dict[str, Any]:
    """A run without points."""
    families = text_string_to_metric_families(served.read("/metrics"))
    labels = {sample.name: sample.labels for family in families for sample in family.samples}
    server = dict(labels.get("hunyuan_server_info") or labels.get("vllm:cache_config_info") or {})
    server.setdefault("vllm", str(json.loads(served.read("/version")).get("version")))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": served.name,
        "server": server,
        "client": {"version": version, "place": "this machine" if is_this_machine(served.url) else "another machine"},
        "seed": 1 + secrets.randbelow(2**32 // STRIDE - 1000),  # NumPy takes 32 bits; points count up from it
        "points": [],
    }


def measure(
    served: ServedModel, tokenizer: Path, concurrency: int, input_len: int, output_len: int, seed: int
) -> tuple[Point, str | None]:
    """Warm up and measure one point; returns it with an error of a failed request."""
    if served.context and input_len + output_len + SPARE > served.context:
        raise UserError(
            f"{input_len} tokens in and {output_len} out do not fit into the model's context of {served.context} "
            f"tokens, of which {SPARE} are kept free: use a smaller --input-len and --output-len"
        )
    _prepare(served)
    shared, requests = (served, tokenizer, concurrency, input_len), max(8, 4 * concurrency)
    warm_up = _benchmark(*shared, min(output_len, 32), concurrency, STRIDE * seed)
    if error := _error(warm_up):
        raise UserError(f"{served.url} did not answer the warm-up requests ({error}): see the server's log")
    found = _benchmark(*shared, output_len, requests, STRIDE * seed + 1, bar=sys.stderr.isatty())
    point = {
        "input_len": input_len,
        "output_len": output_len,
        "concurrency": concurrency,
        "requests": requests,
        "failed": found["failed"],
        "seconds": found["duration"],
        "requests_per_second": found["request_throughput"],
        "output_tokens_per_second": found["output_throughput"],
    }
    point |= {f"{name}_p{of}": found[f"p{of}_{name}_ms"] for name in METRICS for of in PERCENTILES}
    return point, _error(found)


def _prepare(served: ServedModel) -> None:
    """Set variables that vLLM's client reads when it is imported: key, no proxy."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"NO_PROXY": "*", "no_proxy": "*"}
    os.environ.pop("OPENAI_API_KEY", None)
    if served.key is not None:
        os.environ["OPENAI_API_KEY"] = served.key
    logging.disable(logging.WARNING)  # messages of vLLM and torch while they are imported
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections left open by an interrupt


def _benchmark(
    served: ServedModel, tokenizer: Path, concurrency: int, input_len: int, output_len: int, requests: int, seed: int,
    bar: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The result of `vllm bench serve`, run in this process without its report on standard output."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from hunyuan_vllm.plugin import register

    register()  # the tokenizer
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    flags = {
        "base-url": served.url,
        "backend": "openai",
        "endpoint": "/v1/completions",
        "model": served.name,
        "served-model-name": served.name,
        "tokenizer": tokenizer,
        "dataset-name": "random",
        "input-len": input_len,
        "output-len": output_len,
        "num-prompts": requests,
        "max-concurrency": concurrency,
        "seed": seed,
        "temperature": 0,
        "percentile-metrics": ",".join(METRICS),
        "metric-percentiles": ",".join(map(str, PERCENTILES)),
        "ready-check-timeout-sec": 0,  # the check would send the first prompt, and cache its prefix
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    arguments += ["--save-detailed"] + ([] if bar else ["--disable-tqdm"])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result: dict[str, Any] = asyncio.run(main_async(parser.parse_args(arguments)))
    except ValueError as error:
        raise UserError(f"vLLM's benchmark rejects this workload: {' '.join(str(error).split())}") from None
    return result


def _error(result: dict[str, Any]) -> str | None:
    """The last line of the first error."""
    return next((text.strip().splitlines()[-1] for text in result["errors"] if text.strip()), None)


def run_table(run: Mapping[str, Any]) -> Table:
    """A row a point; times are milliseconds, p50 / p90 / p99."""
    machine = run["server"].get("device", "an unnamed machine")
    table = Table(title=f"{run['model']} on {machine}", title_justify="left", header_style="bold")
    for name in ("in", "out", "concurrency", "requests", "failed", "requests/s", "out tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in METRICS.values():
        table.add_column(f"{name}, ms", justify="right")
    for point in run["points"]:
        table.add_row(
            *(f"{point[name]:g}" for name in (*LOAD, "requests", "failed")),
            f"{point['requests_per_second']:.3g}",
            f"{point['output_tokens_per_second']:,.1f}",
            *(" / ".join(f"{point[f'{name}_p{of}']:,.4g}" for of in PERCENTILES) for name in METRICS),
        )
    return table


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Everything that differs except the figures, as "name: A's, B's"."""
    one, other = (
        {"model": run["model"], **run["server"]} | {f"client's {name}": of for name, of in run["client"].items()}
        for run in (a, b)
    )
    return [
        f"{name}: {one.get(name, 'unknown')}, {other.get(name, 'unknown')}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]


def _load(point: Point) -> tuple[float, ...]:
    return tuple(point[name] for name in LOAD)


FIGURES = {"out tokens/s": "output_tokens_per_second"} | {
    f"{METRICS[name]} p{of}": f"{name}_p{of}" for name in ("ttft", "tpot") for of in (50, 99)
}


def comparison(a: Mapping[str, Any], b: Mapping[str, Any]) -> Table:
    """A row for each load that both have: A's figure, B's, and B's over A's. Times are milliseconds."""
    known = {_load(point): point for point in b["points"]}
    table = Table(header_style="bold", title="A → B (B/A)", title_justify="left")
    for name in ("in", "out", "concurrency", *FIGURES, "failed"):
        table.add_column(name, justify="right")
    for one in a["points"]:
        if other := known.get(_load(one)):
            figures = (_change(one[name], other[name]) for name in FIGURES.values())
            table.add_row(*(f"{one[name]:g}" for name in LOAD), *figures, f"{one['failed']:g} → {other['failed']:g}")
    if not table.row_count:
        raise UserError("the runs have no point with the same lengths and concurrency")
    return table


def _change(a: float, b: float) -> str:
    ratio = f"{b / a:.2f}×" if a else "-"
    return f"{a:,.1f} → {b:,.1f} ({ratio})"
