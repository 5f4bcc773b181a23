"""A training plan on a terminal: whether it fits, where memory and time go, and what else would do."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.plan.training.choices import Choice, choices
from hunyuan_vllm.plan.training.memory import GIB, Item, TrainingMemory
from hunyuan_vllm.plan.training.published import against_published
from hunyuan_vllm.plan.training.setup import TrainingSetup
from hunyuan_vllm.plan.training.time import Iteration, iteration

__all__ = ["show_training"]

OFFLOADED = {"none": "nothing offloaded", "optimizer": "optimizer offloaded", "all": "optimizer and weights offloaded"}


def show_training(setup: TrainingSetup, console: Console) -> None:
    memory, took = TrainingMemory(setup), iteration(setup)
    console.print(_headline(memory))
    console.print(_items(f"A GPU: {memory.gpu_bytes / GIB:,.1f} of {memory.gpu_room / GIB:,.1f} GiB", memory.gpu))
    room = f" of {setup.host / GIB:,.0f}" if setup.host else ""
    console.print(_items(f"A host: {memory.host_bytes / GIB:,.1f}{room} GiB", memory.host))
    console.print(_times(took, setup))
    console.print(_others(list(choices(setup)), setup))
    for sentence in against_published(setup):
        console.print(Text.assemble(("Note: ", "yellow"), sentence))
    exact = "Weights, gradients and optimizer are exact; what is assumed for the rest: --assumptions"
    console.print(Text(f"\n{exact}", style="dim"))


def way(setup: TrainingSetup) -> str:
    """As in "ZeRO-3, optimizer offloaded"."""
    stage = f"ZeRO-{setup.stage}" if setup.stage else "no ZeRO"
    return stage if setup.offload == "none" else f"{stage}, {OFFLOADED[setup.offload]}"


def _headline(memory: TrainingMemory) -> Panel:
    setup = memory.setup
    kind = "all weights" if setup.mode == "full" else f"LoRA of rank {setup.rank}"
    title = f"{setup.name} · {kind} · {setup.gpus} × {setup.gpu.name} · {way(setup)}"
    trained = f"{memory.parameters.trained:,} of {memory.parameters.total:,} parameters are trained."
    if memory.fits:
        body = Text.assemble(("It fits. ", "bold green"), trained)
    else:
        body = Text("\n").join(Text.assemble(("It does not fit: ", "bold red"), why) for why in _reasons(memory))
    return Panel(body, title=Text(title, style="bold"), title_align="left")


def _reasons(memory: TrainingMemory) -> list[str]:
    reasons, host = [], memory.setup.host
    if memory.gpu_bytes > memory.gpu_room:
        reasons.append(
            f"a GPU would hold {memory.gpu_bytes / GIB:,.1f} GiB and has room for {memory.gpu_room / GIB:,.1f}"
        )
    if host is not None and memory.host_bytes > host:
        reasons.append(
            f"a host would hold {memory.host_bytes / GIB:,.0f} GiB and has {host / GIB:,.0f} (--host-memory)"
        )
    return reasons


def _items(title: str, items: list[Item]) -> Table:
    table = _table(title)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for item in items:
        note = ", ".join(part for part in ("exact" if item.exact else "", item.note) if part)
        table.add_row(item.name, f"{item.nbytes / GIB:,.2f}", note)
    return table


def _times(took: Iteration, setup: TrainingSetup) -> Table:
    table = _table(f"An iteration, {setup.batch} × {setup.length:,} tokens a GPU")
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    again = ", the forward pass twice" if setup.checkpointing else ""
    table.add_row("products", f"{took.compute:,.1f}", f"{took.operations / 1e12:,.0f} · 10¹² operations a GPU{again}")
    table.add_row("gathering weights", f"{took.gather:,.1f}", "from the other GPUs")
    table.add_row("reducing gradients", f"{took.reduce:,.1f}", "")
    table.add_row("GPU ↔ host", f"{took.host:,.1f}", "")
    table.add_row("optimizer", f"{took.step:,.1f}", "on the GPUs" if setup.offload == "none" else "on the hosts")
    low, high = took.tokens_per_second
    spread = f"{took.overlapped:,.1f} to {took.one_by_one:,.1f}"
    table.add_row(
        "together", spread, f"if transfers hide behind products, and if not: {low:,.0f} to {high:,.0f} tokens/s"
    )
    return table


def _others(found: list[Choice], setup: TrainingSetup) -> Table:
    table = _table("The fewest GPUs, by way")
    for column in ("GPUs", "GiB a GPU", "GiB a host", "s an iteration"):
        table.add_column(column, justify="right", no_wrap=True)
    for choice in found:
        label = way(setup.changed(stage=choice.stage, offload=choice.offload))
        if choice.setup is None:
            table.add_row(label, "more than 1,024", "", "", "")
            continue
        memory, took = choice.memory, choice.iteration
        sizes = [f"{nbytes / GIB:,.0f}" for nbytes in (memory.gpu_bytes, memory.host_bytes)]
        table.add_row(label, f"{choice.setup.gpus:,}", *sizes, f"{took.overlapped:,.0f} to {took.one_by_one:,.0f}")
    return table


def _table(title: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    return table
