"""Memory and time of loading: a BF16 checkpoint as it is, and quantised to int8 while it streams in.

    python benchmarks/load_memory.py

Each load is vLLM's whole model load (creating parameters, reading weights, packing them for the CPU's kernels) in a new
process. Memory is RssAnon, sampled: what the process allocated itself, without the mapped checkpoint. For int8 the peak
must not exceed the computed size of the model by more than one layer's BF16 experts; otherwise the exit status is 1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from common import Report, Spread, checkpoint_option, interleaved, mid_checkpoint, options, ratios
from processes import Child, Watch, anonymous_bytes, engine_environ

MB = 1e6
SCHEMES = {"bf16": None, "int8": "hunyuan_int8", "int8-w8a8": "hunyuan_int8_w8a8"}
SAMPLE_EVERY = 0.002  # seconds
ALLOWANCE = 1.02  # packed weights are aligned, and an allocator rounds up


@dataclass(frozen=True)
class Load:
    """One load: seconds, and bytes above what the process had before it."""

    seconds: float
    parameters: int
    after: int
    peak: int


class Loader:
    """An engine, of which only the load of its model is measured; to be built in a `Child`."""

    def __init__(self, checkpoint: Path, quantization: str | None) -> None:
        from vllm import LLM
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader

        # Imported before, so that they do not count as the load's memory.
        from hunyuan_vllm import model as _model  # noqa: F401
        from hunyuan_vllm.quant import int8_layers  # noqa: F401
        from hunyuan_vllm.quant.cpu import w8a8, w8a16  # noqa: F401

        stock = BaseModelLoader.load_model

        def measured(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            with Watch(SAMPLE_EVERY) as watch:
                loaded = stock(*arguments, **named)
            seconds, after = time.perf_counter() - begin, anonymous_bytes()
            parameters = sum(parameter.nbytes for parameter in loaded.parameters())
            self.load = Load(seconds, parameters, after - watch.before, watch.peak - watch.before)
            return loaded

        BaseModelLoader.load_model = measured
        LLM(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=256,
            kv_cache_memory_bytes=16 << 20,
            quantization=quantization,
        )

    def result(self) -> Load:
        return self.load


def by_arithmetic(model: Path) -> tuple[dict[str, int], int]:
    """Bytes of the model in each scheme, and of one layer's BF16 experts."""
    from hunyuan_vllm.config import HunYuanConfig
    from hunyuan_vllm.layout import expected_tensors
    from hunyuan_vllm.quant.layouts import IgnoredLayers, quantised_linears

    config = HunYuanConfig.from_pretrained(model)
    linears = quantised_linears(config, IgnoredLayers()).values()
    shapes = expected_tensors(config)
    routers = sum(prod(shape) for name, shape in shapes.items() if name.endswith("gate.wg.weight"))
    bf16 = 2 * (sum(map(prod, shapes.values())) + routers)  # routers are float32
    int8 = bf16 + sum(4 * rows - rows * columns for rows, columns in linears)  # a float32 scale for each row
    experts = sum(2 * prod(shape) for name, shape in shapes.items() if name.startswith("model.layers.0.mlp.experts."))
    return {"bf16": bf16, "int8": int8, "int8-w8a8": int8}, experts


def main() -> None:
    parser = options(__doc__, rounds=2)
    checkpoint_option(parser)
    arguments = parser.parse_args()
    model = mid_checkpoint(arguments.checkpoint)
    sizes, experts = by_arithmetic(model)
    report = Report("load_memory", arguments)
    environ = engine_environ(arguments.threads)

    def load(name: str) -> Load:
        with Child(f"load {name}", Loader, model, SCHEMES[name], environ=environ) as child:
            return child.ready().call("result")

    loads = interleaved({name: lambda name=name: load(name) for name in SCHEMES}, arguments.rounds)
    plain = [one.seconds for one in loads["bf16"]]
    for name, rounds in loads.items():
        report.add(
            f"Loading, in MB; above: the peak above the arithmetic (one layer's BF16 experts: {experts / MB:.0f} MB)",
            scheme=name,
            seconds=Spread.of(one.seconds for one in rounds),
            to_bf16=ratios([one.seconds for one in rounds], plain),
            arithmetic=sizes[name] / MB,
            parameters=rounds[0].parameters / MB,
            after=Spread.of(one.after / MB for one in rounds),
            peak=Spread.of(one.peak / MB for one in rounds),
            above=Spread.of((one.peak - sizes[name]) / MB for one in rounds),
        )
    report.show()
    bounded = [one.peak <= ALLOWANCE * sizes[name] + experts for name in ("int8", "int8-w8a8") for one in loads[name]]
    raise SystemExit(not all(bounded))


if __name__ == "__main__":
    main()
