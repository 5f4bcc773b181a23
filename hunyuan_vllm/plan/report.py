"""A plan on a terminal and as JSON"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.kv_cache import CacheShape
from hunyuan_vllm.plan.advice import remedies
from hunyuan_vllm.plan.fit import Fit, check_fit
from hunyuan_vllm.plan.hardware import find_gpu, known_gpus
from hunyuan_vllm.plan.memory import rank_weights
from hunyuan_vllm.plan.model import PUBLISHED
from hunyuan_vllm.plan.plan import lengths, make_scenario, plan_notes, rates, serve_command
from hunyuan_vllm.plan.scenario import Scenario
from hunyuan_vllm.plan.speed import Decode, Step, prefill, published_rates
from hunyuan_vllm.quant import schemes as quant
from hunyuan_vllm.util.text import GIB, gibibytes

KIB = 2**10


def show_plan(fit: Fit, console: Console) -> None:
    scenario, shared, longest = fit.scenario, fit.shared, fit.scenario.max_model_len
    each = "Each engine's cache" if scenario.replicas > 1 else "The cache"
    holds = f"{each} holds {shared.tokens:,} tokens: {shared.sequences(longest):,} sequences of {longest:,}."
    text = "\n".join([holds, *_speed(fit)]) if fit.fits else ""
    problem = "It cannot run: " if fit.problems else "It does not fit: "
    console.print(headline(_title(scenario), text, fit.problems or fit.reasons, problem))
    if fit.budgets:
        console.print(_memory(fit))
    if fit.fits:
        console.print(_context(fit))
        console.print(_decoding(fit))
    else:
        console.print(_changes(fit))
    for note in plan_notes(fit):
        console.print(Text.assemble(("Note: ", "yellow"), note))
    if fit.fits:
        console.print(_start(scenario), soft_wrap=True)
    exact = "Weights and cache bytes are exact; docs/plan.md has the assumptions behind the rest"
    console.print(Text(f"\n{exact}", style="dim"))


def headline(title: str, text: str, reasons: Sequence[str], problem: str = "It does not fit: ") -> Panel:
    """That it fits, and `text`; or, where there are reasons against it, each of them behind `problem`."""
    body = Text.assemble(("It fits. ", "bold green"), text)
    if reasons:
        body = Text("\n").join(Text.assemble((problem, "bold red"), reason) for reason in reasons)
    return Panel(body, title=Text(title, style="bold"), title_align="left")


def new_table(title: str, *numbers: str, show_header: bool = True) -> Table:
    """A table without lines; columns of numbers behind a first one of names."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=show_header)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column(no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _speed(fit: Fit) -> list[str]:
    """What to expect, with the published rates where there are any."""
    published = {rate.batch: rate.rate for rate in published_rates(fit.scenario)}
    lines = []
    for decode in rates(fit):
        if decode.batch == 1 or decode.batch in published:
            line = f"Batch {decode.batch}: at most {decode.bound:,.0f} tokens/s (bound), estimated {_range(decode)}"
            known = published.get(decode.batch)
            lines.append(f"{line}, published {known:g}." if known else f"{line}.")
    lines.append(
        "The estimate has not been validated on GPUs; its low end is the share of the bound that the published rates "
        "of Hunyuan-Large reached."
    )
    return lines


def _range(decode: Decode) -> str:
    low, high = f"{decode.low:,.0f}", f"{decode.estimate:,.0f}"
    return low if low == high else f"{low}–{high}"


def _title(scenario: Scenario) -> str:
    ranks = [f"tensor {scenario.tensor}"]
    ranks += [f"pipeline {scenario.pipeline}"] if scenario.pipeline > 1 else []
    ranks += [f"context {scenario.dcp}"] if scenario.dcp > 1 else []
    ranks += [f"{scenario.nodes} nodes"] if scenario.nodes > 1 else []
    engines = f"{scenario.replicas} engines, each " if scenario.replicas > 1 else ""
    weights = scenario.scheme.name + (", FP8 cache" if scenario.kv == "fp8" else "")
    return f"{scenario.name} · {weights} · {scenario.gpus} × {scenario.gpu.name} ({engines}{', '.join(ranks)})"


def _start(scenario: Scenario) -> Text:
    where = ""
    if scenario.nodes > 1:
        again = f"; {scenario.replicas} clusters, one per engine" if scenario.replicas > 1 else ""
        where = f" (on the head node of a Ray cluster of {scenario.nodes}; LOCAL_IP is its address{again})"
    elif scenario.replicas > 1:
        where = f" ({scenario.replicas} times, each with its own CUDA_VISIBLE_DEVICES and PORT)"
    return Text.assemble(("\nStart it with", "bold"), (where, "dim"), f"\n  {serve_command(scenario)}")


def _memory(fit: Fit) -> RenderableType:
    budget, scenario = fit.tightest, fit.scenario
    layers = budget.stage.layers
    stage = f" of the stage with layers {layers.start} to {layers.stop - 1}" if scenario.pipeline > 1 else ""
    table = new_table(f"Each GPU{stage}: {budget.total / GIB:.1f} GiB", "", show_header=False)
    table.add_column(style="dim")
    peak = f"a step of {scenario.batched_tokens:,} tokens, or sampling for {scenario.sequences:,} sequences"
    weights = ", ".join(f"{part} {size / GIB:.1f}" for part, size in budget.weights.parts.items() if size > GIB / 20)
    token = f"{fit.shared.bytes_per_token / KIB:.4g} KiB per token and rank"
    rest = f"CUDA and NCCL take {budget.outside / GIB:.1f}; vLLM's share is {scenario.utilization:g}"
    for name, size, remark in (
        ("weights", budget.weights.total, weights),
        ("activations", budget.activations, peak),
        ("CUDA graphs", budget.graphs, ""),
        ("workspaces", budget.workspace, ""),
        ("KV cache", budget.cache, token if budget.cache > 0 else "missing"),
        ("outside vLLM", budget.total - budget.taken, rest),
    ):
        table.add_row(name, Text(f"{size / GIB:.2f}", style="red" if size < 0 else ""), remark)
    return table


def _context(fit: Fit) -> RenderableType:
    held = lengths(fit.scenario)
    table = new_table("\nSequences at once, by length", *(f"{length:,}" for length in held), "tokens")
    rows = {"with CLA's shared cache": fit.shared, "without": fit.unshared}
    for name, cache in rows.items() if fit.scenario.config.use_cla else [("sequences", fit.shared)]:
        counts = (f"{cache.sequences(length):,}" for length in held)
        table.add_row(name, *counts, f"{cache.tokens:,}", style="dim" if cache is fit.unshared else "")
    return table


def _decoding(fit: Fit) -> RenderableType:
    scenario, reading = fit.scenario, prefill(fit.scenario)
    title = f"\nDecoding, {scenario.input_len:,} tokens in and {scenario.output_len:,} out: tokens per second"
    table = new_table(title, "bound", "estimate", "per user")
    table.columns[0].header, table.columns[0].justify = "batch", "right"
    table.add_column("limit", no_wrap=True)
    found = rates(fit)
    for decode in [*found[:-1:2], *found[-1:]]:
        figures = f"{decode.bound:,.0f}", Text(_range(decode), style="bold"), f"{decode.per_sequence:,.1f}"
        table.add_row(str(decode.batch), *figures, decode.step.limited_by)
    legend = (
        "bound: at the datasheet's rates; estimate: not validated; per user: high end of the estimate;\n"
        "limit: the largest part of the estimated step"
    )
    text = (
        f"{reading.bound:,.0f} bound, {reading.estimate:,.0f} estimated; first token after "
        f"{reading.first_token:.2f} s on an idle server"
    )
    return Group(table, Text(legend, style="dim"), Text.assemble(("Prefill: ", "bold"), text))


def _changes(fit: Fit) -> RenderableType:
    table = new_table("\nWhat to change, cheapest first", show_header=False)
    table.columns[0].style, table.columns[0].no_wrap = "cyan", False
    table.add_column()
    for remedy in remedies(fit):
        shared, length = remedy.fit.shared, remedy.fit.scenario.max_model_len
        holds = f"holds {shared.tokens:,} tokens, {shared.sequences(length)} × {length:,}"
        table.add_row(remedy.flags, f"{remedy.price}; {holds}")
    if not table.row_count:
        table.add_row("", "none found: no one or two changes make it fit")
    return table


def show_gpus(console: Console) -> None:
    """The table with its sources, and how to add to it."""
    numbers = ("GiB", "GB/s", "BF16", "FP8", "INT8", "link GB/s", "capability")
    table = new_table("Rates are 10¹² dense operations a second", *numbers)
    for gpu in known_gpus():
        rates = (gpu.bf16_tflops, gpu.fp8_tflops, gpu.int8_tops)
        table.add_row(
            gpu.name,
            f"{gpu.memory_gib:g}",
            f"{gpu.bandwidth_gbs:g}",
            *("–" if rate is None else f"{rate:g}" for rate in rates),
            f"{gpu.link_gbs:g} {gpu.link}",
            ".".join(map(str, gpu.capability)),
        )
    console.print(table)
    for gpu in known_gpus():
        console.print(Text(f"{gpu.name}: {'; '.join(gpu.sources)}", style="dim"))
    console.print("\nAnother GPU: --gpu FILE.json, with these fields:")
    console.print(known_gpus()[0].model_dump_json(exclude={"aliases"}), soft_wrap=True)


TABLE_GPUS = ("RTX-4090", "L40S", "H100", "H20", "H200")
SCRIPTS = {
    "bf16": "run_server.sh",
    "int8": "run_server_int8.sh",
    "fp8": "run_server_fp8.sh",
    "int4": "run_server_int4.sh",
}
MIN_CONTEXT = 32768


def show_models(console: Console) -> None:
    """A Markdown table: the fewest GPUs for each published model and script, and the longest sequence on them."""
    names = ["model", "script", "weights", "cache per token", *TABLE_GPUS]
    rows = [names, ["---"] * len(names)]
    for model in PUBLISHED:
        for scheme, script in SCRIPTS.items():
            if (model, scheme) == ("hunyuan-large", "int4"):  # not published
                continue
            kv = quant.SCHEMES[scheme].kv_cache
            scenarios = [
                make_scenario(model, gpu, scheme=scheme, kv=kv, max_model_len=MIN_CONTEXT) for gpu in TABLE_GPUS
            ]
            one = scenarios[0]
            weights = rank_weights(one.config, one.scheme, 1).total
            cache = CacheShape.of(one.config, itemsize=1 if kv == "fp8" else 2)
            sizes = [gibibytes(weights), f"{cache.bytes_per_token / KIB:g} KiB"]
            rows.append([model, f"`{script}`", *sizes, *map(_fewest_gpus, scenarios)])
    for row in rows:
        console.print(f"| {' | '.join(row)} |", soft_wrap=True, markup=False)
    memory = ", ".join(f"{gpu} {find_gpu(gpu).memory_gb:.0f} GB" for gpu in TABLE_GPUS)
    explanation = "in brackets, the longest sequence that their cache holds"
    console.print(
        f"\nThe fewest GPUs ({memory}) that hold a sequence of {MIN_CONTEXT:,} tokens; {explanation}.", soft_wrap=True
    )


def _fewest_gpus(scenario: Scenario) -> str:
    """As in "2 (256K)"."""
    if not check_fit(scenario).fits:
        return "–"
    longest = scenario.config.longest_context
    held = min(longest, check_fit(scenario.changed(max_model_len=longest)).shared.tokens)
    return f"{scenario.gpus} ({held // 1024}K)"


# Keys of the JSON, which are stable, and the attributes that they show.
SCENARIO = {
    "model": "name", "gpus": "gpus", "replicas": "replicas", "tensor_parallel_size": "tensor",
    "pipeline_parallel_size": "pipeline", "layer_partition": "partition", "decode_context_parallel_size": "dcp",
    "scheme": "scheme.name", "kv_cache_dtype": "kv", "max_model_len": "max_model_len",
    "gpu_memory_utilization": "utilization", "max_num_batched_tokens": "batched_tokens", "max_num_seqs": "sequences",
    "block_size": "block_size", "enforce_eager": "eager", "input_len": "input_len", "output_len": "output_len",
    "gpus_per_node": "per_node", "node_link_bytes_per_second": "node_link",
}  # fmt: skip
BUDGET = {
    "total_bytes": "total", "vllm_share_bytes": "taken", "weight_bytes": "weights.total",
    "weight_parameter_bytes": "weights.parameters", "weight_buffer_bytes": "weights.buffers",
    "weight_padding_bytes": "weights.padding", "weight_parts_bytes": "weights.parts",
    "activation_bytes": "activations", "cuda_graph_bytes": "graphs", "workspace_bytes": "workspace",
    "kv_cache_bytes": "cache", "outside_bytes": "outside",
}  # fmt: skip
CAPACITY = {
    "blocks": "blocks", "block_tokens": "block_size", "tokens": "tokens",
    "bytes_per_token_on_a_rank": "bytes_per_token",
}  # fmt: skip
REMEDY = {
    "flags": "flags", "price": "price", "tokens": "fit.shared.tokens", "max_model_len": "fit.scenario.max_model_len"
}  # fmt: skip
RATES = {"bound_tokens_per_second": "bound", "estimate_tokens_per_second": "estimate"}
DECODE = {
    "batch": "batch", **RATES, "estimate_low_tokens_per_second": "low",
    "per_sequence_tokens_per_second": "per_sequence", "limited_by": "step.limited_by",
}  # fmt: skip


def shown(value: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    return {key: attrgetter(attribute)(value) for key, attribute in keys.items()}


def to_json(fit: Fit) -> dict[str, Any]:
    """Keys are stable; sizes end in _bytes, times in _seconds. What does not apply is absent."""
    scenario = fit.scenario
    document: dict[str, Any] = {
        "fits": fit.fits,
        "problems": fit.problems,
        "reasons": fit.reasons,
        "notes": plan_notes(fit),
        "scenario": shown(scenario, SCENARIO)
        | {
            "gpu": scenario.gpu.model_dump(mode="json", exclude={"aliases"}),
            "assumptions": asdict(scenario.assumptions),
        },
        "stages": [
            {"layers": [one.stage.layers.start, one.stage.layers.stop], **shown(one, BUDGET)} for one in fit.budgets
        ],
    }
    if fit.budgets:
        document["kv_cache"] = shown(fit.shared, CAPACITY)
        document["kv_cache_without_cla"] = shown(fit.unshared, CAPACITY)
    if not fit.fits:
        return document | {"remedies": [shown(remedy, REMEDY) for remedy in remedies(fit)]}
    reading = prefill(scenario)
    return document | {
        "command": serve_command(scenario),
        "concurrency": [
            {"length": length, "shared": fit.shared.sequences(length), "unshared": fit.unshared.sequences(length)}
            for length in lengths(scenario)
        ],
        "decode": [shown(decode, DECODE) | {"step": _step_json(decode.step)} for decode in rates(fit)],
        "prefill": shown(reading, RATES)
        | {"first_token_seconds": reading.first_token, "step": _step_json(reading.step)},
        "published": [asdict(rate) | {"share_of_bound": rate.share} for rate in published_rates(scenario)],
    }


def _step_json(step: Step) -> dict[str, float]:
    """Bytes and seconds of each GPU."""
    return asdict(step) | {"estimate_seconds": step.estimate}
