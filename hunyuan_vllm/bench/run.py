"""The published workload on a running server, measured by vLLM's serving benchmark; runs as tables and compared"""

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
from typing import Any, Literal

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from hunyuan_vllm.bench.client import ServedModel, is_this_machine
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import replacing

MACHINE = ("device", "devices", "cores")
PERCENTILES = (50, 90, 99)
METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}  # vLLM's names → the table's
SPARE = 16  # tokens: decoding and tokenizing random tokens may lengthen a prompt
STRIDE = 1000  # between the seeds of points: repeated prompts would be answered from the prefix cache
LOAD = ("input_len", "output_len", "concurrency")  # points are compared where these are equal


class Run(BaseModel):
    """All points of one run. Times are percentiles in milliseconds, over requests (ITL: over tokens).

    Attributes:
        client: versions, and whether it ran on the server's machine.
        machine: the server's hardware; empty if unknown.
        options: the server's configuration and versions.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[3] = 3
    date: str
    model: str
    client: dict[str, str]
    machine: dict[str, str]
    options: dict[str, str]
    seed: int
    points: list[dict[str, float]] = []

    def save(self, path: Path) -> None:
        """Write the file, completely or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n")


def read_run(path: Path) -> Run:
    """The run in a file."""
    try:
        return Run.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path} is not a file of `hunyuan-vllm bench --output` ({problem})") from None


def describe(served: ServedModel, version: str) -> Run:
    """A run without points, with the server's machine and options from /metrics."""
    families = text_string_to_metric_families(served.read("/metrics"))
    labels = {sample.name: sample.labels for family in families for sample in family.samples}
    options = dict(labels.get("hunyuan_server_info") or labels.get("vllm:cache_config_info") or {})
    options.setdefault("vllm", str(json.loads(served.read("/version")).get("version")))
    return Run(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=served.name,
        client={"version": version, "place": "this machine" if is_this_machine(served.url) else "another machine"},
        machine={name: options.pop(name) for name in MACHINE if name in options},
        options=options,
        seed=1 + secrets.randbelow(2**32 // STRIDE - 1000),  # NumPy takes 32 bits; points count up from it
    )


def check_fits(input_len: int, output_len: int, context: int | None) -> None:
    """Refuse lengths beyond the model's context."""
    if context is None or input_len + output_len + SPARE <= context:
        return
    fitting = max(min(output_len, context // 2 - SPARE), 1)
    raise UserError(
        f"{input_len} tokens in and {output_len} out do not fit into the model's context of {context} tokens, of "
        f"which {SPARE} are kept free: use --input-len {context - fitting - SPARE} --output-len {fitting}, or serve "
        "with a larger --max-model-len"
    )


def measure(
    served: ServedModel, tokenizer: Path, concurrency: int, input_len: int, output_len: int, requests: int, seed: int
) -> tuple[dict[str, float], str | None]:
    """Warm up and measure one point; returns it with an error of a failed request."""
    _prepare(served)
    shared = (served, tokenizer, concurrency, input_len)
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
    """Set variables that vLLM's client reads when it is imported: key, certificates, no proxy."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"NO_PROXY": "*", "no_proxy": "*"}
    os.environ.pop("OPENAI_API_KEY", None)
    if served.key is not None:
        os.environ["OPENAI_API_KEY"] = served.key
    if served.authority is not None:
        os.environ["SSL_CERT_FILE"] = str(served.authority)
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


def run_table(run: Run) -> Table:
    """A row a point; times are milliseconds, p50 / p90 / p99."""
    machine = ", ".join(value if name == "device" else f"{name} {value}" for name, value in run.machine.items())
    table = Table(title=f"{run.model} on {machine or 'an unnamed machine'}", title_justify="left", header_style="bold")
    for name in ("in", "out", "concurrency", "requests", "failed", "requests/s", "out tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in METRICS.values():
        table.add_column(f"{name}, ms", justify="right")
    for point in run.points:
        table.add_row(
            *(f"{point[name]:g}" for name in (*LOAD, "requests")),
            f"[red]{point['failed']:g}[/]" if point["failed"] else "0",
            f"{point['requests_per_second']:.3g}",
            f"{point['output_tokens_per_second']:,.1f}",
            *(" / ".join(_milliseconds(point[f"{name}_p{of}"]) for of in PERCENTILES) for name in METRICS),
        )
    return table


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def check_machines(a: Run, b: Run, names: tuple[Path, Path]) -> None:
    remedy = "--other-machine compares them anyway"
    for run, name in zip((a, b), names, strict=True):
        if not run.machine:
            raise UserError(f"{name} does not say on which machine it was measured: {remedy}")
    if found := _different(a.machine, b.machine):
        raise UserError(f"they were measured on different machines ({'; '.join(found)}): {remedy}")


def differences(a: Run, b: Run) -> list[str]:
    """Everything that differs except the figures, as "name: A's, B's"."""
    parts = ((a.machine, b.machine), ({"model": a.model}, {"model": b.model}), (a.options, b.options))
    found = [line for one, other in parts for line in _different(one, other)]
    return [*found, *(f"client's {line}" for line in _different(a.client, b.client))]


def _different(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [
        f"{name}: {one.get(name, 'unknown')}, {other.get(name, 'unknown')}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]


def pairs(a: Run, b: Run) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Points of the same lengths and concurrency."""
    known = {load(point): point for point in b.points}
    found = [(point, known[load(point)]) for point in a.points if load(point) in known]
    if not found:
        raise UserError("the runs have no point with the same lengths and concurrency")
    return found


def load(point: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(point[name] for name in LOAD)


FIGURES = {"out tokens/s": "output_tokens_per_second"} | {
    f"{METRICS[name]} p{of}": f"{name}_p{of}" for name in ("ttft", "tpot") for of in (50, 99)
}


def comparison(found: list[tuple[dict[str, float], dict[str, float]]]) -> Table:
    """A row a point: A's figure, B's, and B's over A's. Times are medians and 99th percentiles in milliseconds."""
    table = Table(header_style="bold", title="A → B (B/A)", title_justify="left")
    for name in ("in", "out", "concurrency", *FIGURES, "failed"):
        table.add_column(name, justify="right")
    for a, b in found:
        failed = f"{a['failed']:g} → {b['failed']:g}"
        table.add_row(
            *(f"{size:g}" for size in load(a)), *(_change(a[name], b[name]) for name in FIGURES.values()), failed
        )
    return table


def _change(a: float, b: float) -> str:
    ratio = f"{b / a:.2f}×" if a else "-"
    return f"{a:,.1f} → {b:,.1f} ({ratio})"
