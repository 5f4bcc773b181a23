"""A plan on a terminal"""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.bar_chart import bar_chart
from hunyuan_vllm.plan.advice import BATCH
from hunyuan_vllm.plan.hardware import known_gpus
from hunyuan_vllm.plan.memory import Budget
from hunyuan_vllm.plan.plan import Plan
from hunyuan_vllm.plan.scenario import GIB, Assumptions, Scenario, explain
from hunyuan_vllm.plan.speed import Decode
from hunyuan_vllm.util.errors import UserError


def bars(plan: Plan) -> RenderableType:
    """Linear bars; the number beside each says what it stands for."""
    speeds = [(f"batch {rate.decode.batch}", rate.decode.estimate) for rate in plan.rates]
    counts = [(f"{point.length:,} tokens", float(point.shared)) for point in plan.concurrency]
    return Group(
        bar_chart("\nEstimated tokens a second, decoding", speeds), bar_chart("\nSequences at once, by length", counts)
    )


def save_png(plan: Plan, path: Path) -> None:
    """Write both curves, on logarithmic axes.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'hunyuan-vllm[plan]'") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    batches = [rate.decode.batch for rate in plan.rates]
    left.plot(batches, [rate.decode.bound for rate in plan.rates], "--", color="gray", label="bound")
    left.plot(batches, [rate.decode.estimate for rate in plan.rates], "o-", label="decoding, estimated")
    left.plot(batches, [rate.served for rate in plan.rates], "s-", label="with prefill, estimated")
    if plan.published:
        published = [rate.batch for rate in plan.published], [rate.rate for rate in plan.published]
        left.plot(*published, "kx", label="published")
    left.set(xscale="log", yscale="log", xlabel="sequences in flight, an engine", ylabel="output tokens a second")
    lengths = [point.length for point in plan.concurrency]
    right.plot(lengths, [point.shared for point in plan.concurrency], "o-", label="with CLA's shared cache")
    right.plot(lengths, [point.unshared for point in plan.concurrency], "s--", label="without")
    right.set(xscale="log", yscale="log", xlabel="tokens a sequence", ylabel="sequences at once, an engine")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    scenario = plan.scenario
    figure.suptitle(f"{scenario.name}, {scenario.scheme.name}, {scenario.gpus} × {scenario.gpu.name}")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(beside, format="png", dpi=120)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"--png {path} cannot be written: {error.strerror}") from None


KIB, MIB = 2**10, 2**20


def show_plan(plan: Plan, console: Console, chart: bool) -> None:
    verdict = plan.verdict
    console.print(_headline(plan))
    if verdict.budgets:
        console.print(_memory(plan))
    if verdict.fits:
        console.print(_context(plan))
        console.print(_decoding(plan))
    console.print(_changes(plan))
    for note in plan.notes:
        console.print(Text.assemble(("Note: ", "yellow"), note))
    if verdict.fits:
        console.print(_start(plan), soft_wrap=True)
    if verdict.fits and chart:
        console.print(bars(plan))
    exact = "Weights and bytes a token are exact; what is assumed for the rest: --assumptions"
    console.print(Text(f"\n{exact}", style="dim"))


def _headline(plan: Plan) -> Panel:
    scenario, verdict = plan.scenario, plan.verdict
    if verdict.fits:
        shared, longest = verdict.shared, scenario.max_model_len
        each = "Each engine's cache" if scenario.replicas > 1 else "The cache"
        holds = f"{each} holds {shared.tokens:,} tokens: {shared.sequences(longest):,} sequences of {longest:,}."
        body = Text.assemble(("It fits. ", "bold green"), holds, *(f"\n{line}" for line in _speed(plan)))
    else:
        say = "It cannot work: " if verdict.problems else "It does not fit: "
        body = Text("\n").join(Text.assemble((say, "bold red"), why) for why in verdict.problems or verdict.reasons)
    return Panel(body, title=Text(_title(scenario), style="bold"), title_align="left")


def _speed(plan: Plan) -> list[str]:
    """What to expect, and how much is known of it."""
    published = {rate.batch: rate.rate for rate in plan.published}
    lines = []
    for rate in plan.rates:
        decode = rate.decode
        if decode.batch == 1 or decode.batch in published:
            line = f"Batch {decode.batch}: at most {decode.bound:,.0f} tokens/s (bound), estimated {_range(decode)}"
            known = published.get(decode.batch)
            lines.append(f"{line}, published {known:g}." if known else f"{line}.")
    lines.append(
        "The estimate has not been validated on GPUs; its low end is the share of the bound that the only published "
        "rates reached."
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
        again = f"; {scenario.replicas} clusters, one for each engine" if scenario.replicas > 1 else ""
        where = f" (on the head node of a Ray cluster of {scenario.nodes}; LOCAL_IP is its address{again})"
    elif scenario.replicas > 1:
        where = f" ({scenario.replicas} times, each with CUDA_VISIBLE_DEVICES and a PORT of its own)"
    return Text.assemble(("\nStart it with", "bold"), (where, "dim"), f"\n  {plan.command}")


def _memory(plan: Plan) -> RenderableType:
    budget, scenario = plan.verdict.tightest, plan.scenario
    which = "A GPU" if scenario.pipeline == 1 else f"A GPU of the stage with layers {_span(budget)}"
    table = _table(f"{which}: {budget.total / GIB:.1f} GiB")
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    peak = f"a step of {scenario.batched_tokens:,} tokens, or {scenario.sequences:,} sequences sampled"
    weights = ", ".join(f"{part} {size / GIB:.1f}" for part, size in budget.weights.parts.items() if size > GIB / 20)
    token = f"{plan.verdict.shared.bytes_per_token / KIB:.4g} KiB a token on a rank"
    rest = f"CUDA and NCCL {budget.outside / GIB:.1f}, beside vLLM's share of {scenario.utilization:g}"
    for name, size, remark in (
        ("weights", budget.weights.total, weights),
        ("activations", budget.activations, peak),
        ("CUDA graphs", budget.graphs, ""),
        ("workspaces", budget.workspace, ""),
        ("KV cache", budget.cache, token if budget.cache > 0 else "missing"),
        ("left alone", budget.total - budget.taken, rest),
    ):
        table.add_row(name, Text(f"{size / GIB:.2f}", style="red" if size < 0 else ""), remark)
    return table


def _span(budget: Budget) -> str:
    return f"{budget.stage.layers.start} to {budget.stage.layers.stop - 1}"


def _context(plan: Plan) -> RenderableType:
    table = _table("\nSequences at once, by length")
    table.add_column("", no_wrap=True)
    for point in plan.concurrency:
        table.add_column(f"{point.length:,}", justify="right")
    table.add_column("tokens", justify="right")
    shared, unshared = plan.verdict.shared, plan.verdict.unshared
    table.add_row("with CLA's shared cache", *(f"{p.shared:,}" for p in plan.concurrency), f"{shared.tokens:,}")
    table.add_row("without", *(f"{p.unshared:,}" for p in plan.concurrency), f"{unshared.tokens:,}", style="dim")
    return table


def _decoding(plan: Plan) -> RenderableType:
    scenario, prefill = plan.scenario, plan.prefill
    table = _table(f"\nDecoding, {scenario.input_len:,} tokens in and {scenario.output_len:,} out: tokens a second")
    for name in ("batch", "bound", "estimate", "a user", "served", "experts", "weights", "cache", "reduce"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    for rate in plan.rates[::2]:
        decode, step = rate.decode, rate.decode.step
        table.add_row(
            str(decode.batch),
            f"{decode.bound:,.0f}",
            Text(_range(decode), style="bold"),
            f"{decode.per_sequence:,.1f}",
            f"{rate.served:,.0f}",
            f"{step.experts:.1f}",
            f"{step.weight_bytes / GIB:.1f}",
            f"{step.cache_bytes / GIB:.1f}",
            f"{step.reduced_bytes / MIB:.2f}",
            step.limited_by,
        )
    legend = (
        "bound: at the datasheet's rates; estimate: not validated; a user: at its high end;\n"
        "served: with each request's prefill; experts: distinct ones a layer reads;\n"
        "weights, cache: GiB that a GPU reads in a step; reduce: MiB of an all-reduce;\n"
        "limit: what takes most of the estimated step"
    )
    reading = (
        f"{prefill.bound:,.0f} bound, {prefill.estimate:,.0f} estimated; the first token after "
        f"{prefill.first_token:.2f} s on an idle server"
    )
    return Group(table, Text(legend, style="dim"), Text.assemble(("Prefill: ", "bold"), reading))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))


def _changes(plan: Plan) -> RenderableType:
    fits = plan.verdict.fits
    title = "\nWhat would be better" if fits else "\nWhat to change, cheapest first"
    table = _table(title)
    table.show_header = False
    table.add_column(style="cyan")
    table.add_column()
    for remedy in plan.remedies:
        length = remedy.verdict.scenario.max_model_len
        count = remedy.verdict.shared.sequences(length)
        table.add_row(
            remedy.flags, f"{remedy.price}; holds {remedy.verdict.shared.tokens:,} tokens, {count} × {length:,}"
        )
    for better in plan.improvements:
        gain = f"tokens ×{better.tokens:.2f}, speed at batch {BATCH} ×{better.rate:.2f}"
        table.add_row(better.remedy.flags, f"{gain} ({better.remedy.price})")
    if not table.row_count:
        table.add_row("", "nothing the planner knows" if fits else "nothing: no pair of changes makes it fit")
    return table


def show_gpus(console: Console) -> None:
    """The table, where it is from, and how to add to it."""
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
    console.print("\nAnother GPU: --gpu FILE.json, with such fields:")
    console.print(known_gpus()[0].model_dump_json(exclude={"aliases"}), soft_wrap=True)


def show_assumptions(assumptions: Assumptions, console: Console) -> None:
    table = Table(box=None)
    table.add_column("assumption", style="cyan", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("what it is")
    for name, value, meaning in explain(assumptions):
        table.add_row(name, f"{value:g}", meaning)
    console.print(table)
    console.print("Change one with --assume NAME=VALUE; docs/plan.md has the formulae.", style="dim")
