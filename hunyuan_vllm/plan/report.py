"""A plan on a terminal and as JSON"""

from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.kv_cache import CacheShape
from hunyuan_vllm.plan.fit import check_fit
from hunyuan_vllm.plan.hardware import find_gpu, known_gpus
from hunyuan_vllm.plan.memory import Budget, Capacity, rank_weights
from hunyuan_vllm.plan.model import PUBLISHED
from hunyuan_vllm.plan.plan import Plan, lengths, make_scenario
from hunyuan_vllm.plan.scenario import Scenario
from hunyuan_vllm.plan.speed import Decode, Step
from hunyuan_vllm.quant import schemes as quant
from hunyuan_vllm.util.text import GIB, gibibytes

KIB = 2**10


def show_plan(plan: Plan, console: Console) -> None:
    fit = plan.fit
    console.print(_headline(plan))
    if fit.budgets:
        console.print(_memory(plan))
    if fit.fits:
        console.print(_context(plan))
        console.print(_decoding(plan))
    else:
        console.print(_changes(plan))
    for note in plan.notes:
        console.print(Text.assemble(("Note: ", "yellow"), note))
    if fit.fits:
        console.print(_start(plan), soft_wrap=True)
    exact = "Weights and cache bytes are exact; docs/plan.md has the assumptions behind the rest"
    console.print(Text(f"\n{exact}", style="dim"))


def _headline(plan: Plan) -> Panel:
    scenario, fit = plan.scenario, plan.fit
    if fit.fits:
        shared, longest = fit.shared, scenario.max_model_len
        each = "Each engine's cache" if scenario.replicas > 1 else "The cache"
        holds = f"{each} holds {shared.tokens:,} tokens: {shared.sequences(longest):,} sequences of {longest:,}."
        body = Text.assemble(("It fits. ", "bold green"), holds, *(f"\n{line}" for line in _speed(plan)))
    else:
        start = "It cannot run: " if fit.problems else "It does not fit: "
        body = Text("\n").join(Text.assemble((start, "bold red"), why) for why in fit.problems or fit.reasons)
    return Panel(body, title=Text(_title(scenario), style="bold"), title_align="left")


def _speed(plan: Plan) -> list[str]:
    """What to expect, with the published rates where there are any."""
    published = {rate.batch: rate.rate for rate in plan.published}
    lines = []
    for decode in plan.rates:
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
    return f"{decode.low:,.0f}–{decode.estimate:,.0f}"


def _title(scenario: Scenario) -> str:
    ranks = [f"tensor {scenario.tensor}"]
    ranks += [f"pipeline {scenario.pipeline}"] if scenario.pipeline > 1 else []
    ranks += [f"context {scenario.dcp}"] if scenario.dcp > 1 else []
    ranks += [f"{scenario.nodes} nodes"] if scenario.nodes > 1 else []
    engines = f"{scenario.replicas} engines, each " if scenario.replicas > 1 else ""
    weights = scenario.scheme.name + (", FP8 cache" if scenario.kv == "fp8" else "")
    return f"{scenario.name} · {weights} · {scenario.gpus} × {scenario.gpu.name} ({engines}{', '.join(ranks)})"


def _start(plan: Plan) -> Text:
    scenario, where = plan.scenario, ""
    if scenario.nodes > 1:
        again = f"; {scenario.replicas} clusters, one per engine" if scenario.replicas > 1 else ""
        where = f" (on the head node of a Ray cluster of {scenario.nodes}; LOCAL_IP is its address{again})"
    elif scenario.replicas > 1:
        where = f" ({scenario.replicas} times, each with its own CUDA_VISIBLE_DEVICES and PORT)"
    return Text.assemble(("\nStart it with", "bold"), (where, "dim"), f"\n  {plan.command}")


def _memory(plan: Plan) -> RenderableType:
    budget, scenario = plan.fit.tightest, plan.scenario
    which = "Each GPU" if scenario.pipeline == 1 else f"Each GPU of the stage with layers {_span(budget)}"
    table = _table(f"{which}: {budget.total / GIB:.1f} GiB")
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    peak = f"a step of {scenario.batched_tokens:,} tokens, or sampling for {scenario.sequences:,} sequences"
    weights = ", ".join(f"{part} {size / GIB:.1f}" for part, size in budget.weights.parts.items() if size > GIB / 20)
    token = f"{plan.fit.shared.bytes_per_token / KIB:.4g} KiB per token and rank"
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


def _span(budget: Budget) -> str:
    return f"{budget.stage.layers.start} to {budget.stage.layers.stop - 1}"


def _context(plan: Plan) -> RenderableType:
    table = _table("\nSequences at once, by length")
    table.add_column("", no_wrap=True)
    for length in lengths(plan.scenario):
        table.add_column(f"{length:,}", justify="right")
    table.add_column("tokens", justify="right")
    rows = {"with CLA's shared cache": plan.fit.shared, "without": plan.fit.unshared}
    for name, cache in rows.items() if plan.scenario.config.use_cla else [("sequences", plan.fit.shared)]:
        held = (f"{cache.sequences(length):,}" for length in lengths(plan.scenario))
        table.add_row(name, *held, f"{cache.tokens:,}", style="dim" if cache is plan.fit.unshared else "")
    return table


def _decoding(plan: Plan) -> RenderableType:
    scenario, prefill = plan.scenario, plan.prefill
    assert prefill is not None
    table = _table(f"\nDecoding, {scenario.input_len:,} tokens in and {scenario.output_len:,} out: tokens per second")
    for name in ("batch", "bound", "estimate", "per user"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    for decode in plan.rates[::2]:
        table.add_row(
            str(decode.batch),
            f"{decode.bound:,.0f}",
            Text(_range(decode), style="bold"),
            f"{decode.per_sequence:,.1f}",
            decode.step.limited_by,
        )
    legend = (
        "bound: at the datasheet's rates; estimate: not validated; per user: high end of the estimate;\n"
        "limit: the largest part of the estimated step"
    )
    reading = (
        f"{prefill.bound:,.0f} bound, {prefill.estimate:,.0f} estimated; first token after "
        f"{prefill.first_token:.2f} s on an idle server"
    )
    return Group(table, Text(legend, style="dim"), Text.assemble(("Prefill: ", "bold"), reading))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))


def _changes(plan: Plan) -> RenderableType:
    table = _table("\nWhat to change, cheapest first")
    table.show_header = False
    table.add_column(style="cyan")
    table.add_column()
    for remedy in plan.remedies:
        shared, length = remedy.fit.shared, remedy.fit.scenario.max_model_len
        holds = f"holds {shared.tokens:,} tokens, {shared.sequences(length)} × {length:,}"
        table.add_row(remedy.flags, f"{remedy.price}; {holds}")
    if not table.row_count:
        table.add_row("", "none found: no one or two changes make it fit")
    return table


def show_gpus(console: Console) -> None:
    """The table with its sources, and how to add to it."""
    table = _table("Rates are 10¹² dense operations a second")
    for name in ("GPU", "GiB", "GB/s", "BF16", "FP8", "INT8", "link GB/s", "capability"):
        table.add_column(name, justify="left" if name == "GPU" else "right", no_wrap=True)
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
            one = scenarios[0].changed(tensor=1, pipeline=1)
            weights = rank_weights(one.config, one.scheme, 1).total
            cache = CacheShape.of(one.config, tensor_parallel=1, stage=one.stages[0].layers, itemsize=one.kv_itemsize)
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


def to_json(plan: Plan) -> dict[str, Any]:
    """Keys are stable; sizes end in _bytes, times in _seconds. What does not apply is absent."""
    fit = plan.fit
    document: dict[str, Any] = {
        "fits": fit.fits,
        "problems": fit.problems,
        "reasons": fit.reasons,
        "notes": plan.notes,
        "scenario": _scenario_json(plan.scenario),
        "stages": [_budget_json(budget) for budget in fit.budgets],
    }
    if fit.budgets:
        document["kv_cache"] = _capacity_json(fit.shared)
        document["kv_cache_without_cla"] = _capacity_json(fit.unshared)
    if not fit.fits:
        document["remedies"] = [
            {
                "flags": remedy.flags,
                "price": remedy.price,
                "tokens": remedy.fit.shared.tokens,
                "max_model_len": remedy.fit.scenario.max_model_len,
            }
            for remedy in plan.remedies
        ]
        return document
    assert plan.prefill is not None
    return document | {
        "command": plan.command,
        "concurrency": [
            {"length": length, "shared": fit.shared.sequences(length), "unshared": fit.unshared.sequences(length)}
            for length in lengths(plan.scenario)
        ],
        "decode": [_decode_json(decode) for decode in plan.rates],
        "prefill": {
            "bound_tokens_per_second": plan.prefill.bound,
            "estimate_tokens_per_second": plan.prefill.estimate,
            "first_token_seconds": plan.prefill.first_token,
            "step": _step_json(plan.prefill.step),
        },
        "published": [asdict(rate) | {"share_of_bound": rate.share} for rate in plan.published],
    }


def _scenario_json(scenario: Scenario) -> dict[str, Any]:
    return {
        "model": scenario.name,
        "gpu": scenario.gpu.model_dump(mode="json", exclude={"aliases"}),
        "gpus": scenario.gpus,
        "replicas": scenario.replicas,
        "tensor_parallel_size": scenario.tensor,
        "pipeline_parallel_size": scenario.pipeline,
        "layer_partition": scenario.partition,
        "decode_context_parallel_size": scenario.dcp,
        "scheme": scenario.scheme.name,
        "kv_cache_dtype": scenario.kv,
        "max_model_len": scenario.max_model_len,
        "gpu_memory_utilization": scenario.utilization,
        "max_num_batched_tokens": scenario.batched_tokens,
        "max_num_seqs": scenario.sequences,
        "block_size": scenario.block_size,
        "enforce_eager": scenario.eager,
        "input_len": scenario.input_len,
        "output_len": scenario.output_len,
        "gpus_per_node": scenario.per_node,
        "node_link_bytes_per_second": scenario.node_link,
        "assumptions": asdict(scenario.assumptions),
    }


def _budget_json(budget: Budget) -> dict[str, Any]:
    """Bytes of each GPU of a pipeline stage."""
    return {
        "layers": [budget.stage.layers.start, budget.stage.layers.stop],
        "total_bytes": budget.total,
        "vllm_share_bytes": budget.taken,
        "weight_bytes": budget.weights.total,
        "weight_parameter_bytes": budget.weights.parameters,
        "weight_buffer_bytes": budget.weights.buffers,
        "weight_padding_bytes": budget.weights.padding,
        "weight_parts_bytes": budget.weights.parts,
        "activation_bytes": budget.activations,
        "cuda_graph_bytes": budget.graphs,
        "workspace_bytes": budget.workspace,
        "kv_cache_bytes": budget.cache,
        "outside_bytes": budget.outside,
    }


def _capacity_json(capacity: Capacity) -> dict[str, int]:
    return {
        "blocks": capacity.blocks,
        "block_tokens": capacity.block_size,
        "tokens": capacity.tokens,
        "bytes_per_token_on_a_rank": capacity.bytes_per_token,
    }


def _decode_json(decode: Decode) -> dict[str, Any]:
    return {
        "batch": decode.batch,
        "bound_tokens_per_second": decode.bound,
        "estimate_tokens_per_second": decode.estimate,
        "estimate_low_tokens_per_second": decode.low,
        "per_sequence_tokens_per_second": decode.per_sequence,
        "limited_by": decode.step.limited_by,
        "step": _step_json(decode.step),
    }


def _step_json(step: Step) -> dict[str, float]:
    """Bytes and seconds of each GPU."""
    return asdict(step) | {"estimate_seconds": step.estimate}
