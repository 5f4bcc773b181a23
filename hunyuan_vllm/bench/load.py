"""vLLM's serving benchmark (`vllm bench serve`), run in this process on one point after the other."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_vllm.bench.result import PERCENTILES, Measured, Times
from hunyuan_vllm.bench.target import Target
from hunyuan_vllm.bench.workload import Point
from hunyuan_vllm.errors import UserError

__all__ = ["prepare", "run_point", "warm_up"]

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
METRICS = ("ttft", "tpot", "itl", "e2el")
STRIDE = 1000  # between the seeds of points; no prompt comes twice, or the prefix cache would answer for the model


def prepare(key: str | None, authority: Path | None) -> None:
    """Set what vLLM's client reads from the environment, before it is imported: key, certificates, no proxy."""
    os.environ.update(QUIET)
    os.environ.pop("OPENAI_API_KEY", None)
    if key is not None:
        os.environ["OPENAI_API_KEY"] = key
    if authority is not None:
        os.environ["SSL_CERT_FILE"] = str(authority)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
    logging.disable(logging.WARNING)  # what vLLM and torch say of themselves as they are imported
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections that are open when somebody interrupts


def warm_up(target: Target, point: Point, number: int, seed: int) -> None:
    """Ask once at each place of the `number`th point: kernels that are chosen or compiled then are not measured.

    Raises:
        UserError: the server does not answer these.
    """
    few = Point(point.concurrency or 1, None, point.input_len, min(point.output_len, 32), point.concurrency or 1)
    if error := _error(_run(target, few, seed + STRIDE * number + 1, bar=False)):
        raise UserError(f"{target.url} did not answer the requests of the warm-up ({error}): see the server's log")


def run_point(target: Target, point: Point, number: int, seed: int) -> tuple[Measured, str | None]:
    """Measure one point, the `number`th of a run: the figures, and an error of a request that failed."""
    result = _run(target, point, seed + STRIDE * number, bar=sys.stderr.isatty())
    times = {("e2e" if name == "e2el" else name): _times(result, name) for name in METRICS}
    measured = Measured(
        concurrency=point.concurrency,
        rate=point.rate,
        input_len=point.input_len,
        output_len=point.output_len,
        requests=point.requests,
        failed=result["failed"],
        seconds=result["duration"],
        requests_per_second=result["request_throughput"],
        output_tokens_per_second=result["output_throughput"],
        total_tokens_per_second=result["total_token_throughput"],
        **times,
    )
    return measured, _error(result)


def _error(result: Mapping[str, Any]) -> str | None:
    """The last line of the first error."""
    return next((text.strip().splitlines()[-1] for text in result["errors"] if text.strip()), None)


def _times(result: Mapping[str, Any], name: str) -> Times:
    percentiles = {f"p{number}": result[f"p{number}_{name}_ms"] for number in PERCENTILES}
    return Times(mean=result[f"mean_{name}_ms"], **percentiles)


def _run(target: Target, point: Point, seed: int, bar: bool) -> dict[str, Any]:
    """What `vllm bench serve` has as its result; its report on standard output is not shown.

    Raises:
        UserError: it refuses the workload.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from hunyuan_vllm.plugin import register

    register()  # the tokenizer
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    flags = {
        "base-url": target.url,
        "backend": "openai",
        "endpoint": "/v1/completions",
        "model": target.model.name,
        "served-model-name": target.model.name,
        "tokenizer": target.tokenizer,
        "dataset-name": "random",
        "input-len": point.input_len,
        "output-len": point.output_len,
        "num-prompts": point.requests,
        "max-concurrency": point.concurrency,
        "request-rate": point.rate,
        "seed": seed,
        "temperature": 0,
        "percentile-metrics": ",".join(METRICS),
        "metric-percentiles": ",".join(map(str, PERCENTILES)),
        "ready-check-timeout-sec": 0,  # its check is the first prompt, whose prefix would then be cached
    }
    arguments = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    arguments += ["--save-detailed"] + ([] if bar else ["--disable-tqdm"])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result: dict[str, Any] = asyncio.run(main_async(parser.parse_args(arguments)))
    except ValueError as error:
        raise UserError(f"vLLM's benchmark cannot ask for {point}: {' '.join(str(error).split())}") from None
    return result
