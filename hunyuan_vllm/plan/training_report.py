"""A training plan: read from what the user wrote, shown on a terminal or as JSON"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.plan.hardware import find_gpu
from hunyuan_vllm.plan.model import open_planned
from hunyuan_vllm.plan.training import (
    GIB,
    WAYS,
    Choice,
    Item,
    Iteration,
    TrainingMemory,
    against_published,
    choices,
    fewest,
    fitting,
    iteration,
)
from hunyuan_vllm.plan.training_setup import Mode, Offload, TrainingAssumptions, TrainingSetup
from hunyuan_vllm.util.errors import UserError


@dataclass(frozen=True)
class TrainingRequest:
    """The options of `hunyuan-vllm plan --train`; None where the user left the choice."""

    model: str
    gpu: str
    gpus: int | None
    mode: str
    rank: int
    targets: str
    stage: int | None
    offload: str | None
    length: int
    batch: int
    checkpointing: bool
    leaves: bool
    per_node: int
    node_link: float
    host_gib: float
    assumptions: TrainingAssumptions


def make_setup(request: TrainingRequest) -> TrainingSetup:
    """The set-up. Without a number of GPUs it is the fewest, without a way the quickest that fits, or else the one that
    takes least memory.

    Raises:
        UserError: a name is unknown, or two options contradict each other.
    """
    model, gpu = open_planned(request.model), find_gpu(request.gpu)
    if model.format.kind is not None:
        raise UserError(f"--model {request.model} is quantised: training starts from the BF16 checkpoint")
    if request.mode not in get_args(Mode):
        raise UserError(f"--train {request.mode}: it is full or lora")
    if request.offload is not None and request.offload not in get_args(Offload):
        raise UserError(f"--offload {request.offload}: it is none, optimizer or all")
    if request.length > model.config.max_position_embeddings:
        raise UserError(
            f"--seq-length {request.length}: the model knows {model.config.max_position_embeddings} positions"
        )
    ways = tuple(
        (stage, offload)
        for stage, offload in WAYS
        if request.stage in (None, stage) and request.offload in (None, offload)
    )
    if not ways:
        wanted = "stage 3" if request.offload == "all" else "stage 2 or 3"
        raise UserError(f"--offload {request.offload} with --zero-stage {request.stage}: it needs {wanted}")
    targets = tuple(filter(None, request.targets.split(",")))
    linears = {name.split(".")[-2] for name in expected_tensors(model.config) if name.endswith("_proj.weight")}
    for target in targets:
        if target not in linears:
            raise UserError(f"--lora-targets {target}: this network has {', '.join(sorted(linears))}")
    stage, offload = ways[-1]
    setup = TrainingSetup(
        name=model.name,
        config=model.config,
        gpu=gpu,
        gpus=request.gpus or 1,
        mode=request.mode,  # type: ignore[arg-type]
        rank=request.rank,
        targets=targets,
        stage=stage,
        offload=offload,
        length=request.length,
        batch=request.batch,
        checkpointing=request.checkpointing,
        leaves=request.leaves,
        per_node=request.per_node,
        node_link=request.node_link,
        host=request.host_gib * GIB,
        assumptions=request.assumptions,
    )
    if request.gpus is None:
        setup = fewest(setup) or setup.changed(gpus=1024)
    return fitting(setup, ways) or setup


def to_json(setup: TrainingSetup) -> dict[str, Any]:
    memory = TrainingMemory(setup)
    return {
        "model": setup.name,
        "train": setup.mode,
        "gpu": setup.gpu.name,
        "gpus": setup.gpus,
        "nodes": setup.nodes,
        "zero_stage": setup.stage,
        "offload": setup.offload,
        "tokens_a_gpu": setup.tokens,
        "gradient_checkpointing": setup.checkpointing,
        "fits": memory.fits,
        "parameters": {"total": memory.parameters.total, "trained": memory.parameters.trained},
        "gpu_memory": {"room": memory.gpu_room, "used": memory.gpu_bytes, "items": _items(memory.gpu)},
        "host_memory": {"room": setup.host, "used": memory.host_bytes, "items": _items(memory.host)},
        "iteration": _seconds(iteration(setup)),
        "fewest_gpus": [
            {
                "zero_stage": choice.stage,
                "offload": choice.offload,
                "gpus": choice.setup and choice.setup.gpus,
                "iteration": choice.setup and _seconds(choice.iteration),
            }
            for choice in choices(setup)
        ],
        "published": against_published(setup),
        "assumptions": asdict(setup.assumptions),
    }


def _items(items: list[Item]) -> list[dict[str, Any]]:
    return [{"name": item.name, "bytes": item.nbytes, "exact": item.exact} for item in items]


def _seconds(took: Iteration) -> dict[str, float]:
    low, high = took.tokens_per_second
    parts = {name: getattr(took, name) for name in ("compute", "gather", "reduce", "host", "step")}
    together = {"overlapped": took.overlapped, "one_by_one": took.one_by_one}
    return {**parts, **together, "tokens_per_second_least": low, "tokens_per_second_most": high}


OFFLOADED = {"none": "nothing offloaded", "optimizer": "optimizer offloaded", "all": "optimizer and weights offloaded"}


def show_training(setup: TrainingSetup, console: Console) -> None:
    memory, took = TrainingMemory(setup), iteration(setup)
    console.print(_headline(memory))
    console.print(_item_table(f"A GPU: {memory.gpu_bytes / GIB:,.1f} of {memory.gpu_room / GIB:,.1f} GiB", memory.gpu))
    room = f" of {setup.host / GIB:,.0f}" if setup.host else ""
    console.print(_item_table(f"A host: {memory.host_bytes / GIB:,.1f}{room} GiB", memory.host))
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


def _item_table(title: str, items: list[Item]) -> Table:
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
