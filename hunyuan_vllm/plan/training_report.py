"""A training plan: the set-up from the command's options, shown on a terminal or as JSON"""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.plan.hardware import find_gpu
from hunyuan_vllm.plan.model import open_planned
from hunyuan_vllm.plan.report import headline, new_table, shown
from hunyuan_vllm.plan.training import WAYS, Item, Mode, Offload, TrainingMemory, TrainingSetup, fewest, fitting
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.text import GIB


def make_setup(
    model: str, gpu: str, gpus: int | None, mode: Mode, stage: int | None, offload: Offload | None, **others: Any
) -> TrainingSetup:
    """The set-up from the options of `hunyuan-vllm plan --train`; None where the user left the choice.

    Without a number of GPUs it takes the fewest; without a stage or offload, the fastest that fits, or else the one
    that needs the least memory.
    """
    found = open_planned(model)
    longest = found.config.longest_context
    if found.format.kind is not None:
        raise UserError(f"--model {model} is quantised: training starts from the BF16 checkpoint")
    if others["length"] > longest:
        raise UserError(f"--seq-length {others['length']}: the model's longest context is {longest} tokens")
    ways = tuple(way for way in WAYS if stage in (None, way[0]) and offload in (None, way[1]))
    if not ways:
        wanted = "stage 3" if offload == "all" else "stage 2 or 3"
        raise UserError(f"--offload {offload} with --zero-stage {stage}: it needs {wanted}")
    setup = TrainingSetup(
        found.name, found.config, find_gpu(gpu), gpus or 1, mode, stage=ways[-1][0], offload=ways[-1][1], **others
    )
    if gpus is None:
        setup = fewest(setup) or setup.changed(gpus=1024)
    return fitting(setup, ways) or setup


SETUP = {
    "model": "name", "train": "mode", "gpu": "gpu.name", "gpus": "gpus", "nodes": "nodes", "zero_stage": "stage",
    "offload": "offload", "tokens_a_gpu": "length", "gradient_checkpointing": "checkpointing",
}  # fmt: skip


def to_json(setup: TrainingSetup) -> dict[str, Any]:
    memory = TrainingMemory(setup)
    return {
        **shown(setup, SETUP),
        "fits": memory.fits,
        "parameters": {"total": memory.parameters.total, "trained": memory.parameters.trained},
        "gpu_memory": {"available": memory.gpu_free, "used": memory.gpu_bytes, "items": _items(memory.gpu)},
        "host_memory": {"available": setup.host, "used": memory.host_bytes, "items": _items(memory.host)},
        "fewest_gpus": [
            {"zero_stage": way.stage, "offload": way.offload, "gpus": found and found.gpus}
            for way, found in _smallest(setup)
        ],
    }


def _items(items: list[Item]) -> list[dict[str, Any]]:
    return [shown(item, {"name": "name", "bytes": "nbytes", "exact": "exact"}) for item in items]


def _smallest(setup: TrainingSetup) -> list[tuple[TrainingSetup, TrainingSetup | None]]:
    """Each ZeRO stage and offload, and the same on the fewest GPUs that it fits on."""
    ways = [setup.changed(stage=stage, offload=offload) for stage, offload in WAYS]
    return [(way, fewest(way)) for way in ways]


def show_training(setup: TrainingSetup, console: Console) -> None:
    memory = TrainingMemory(setup)
    kind = "all weights" if setup.mode == "full" else f"LoRA of rank {setup.rank}"
    title = f"{setup.name} · {kind} · {setup.gpus} × {setup.gpu.name} · {_way(setup)}"
    reasons = []
    if memory.gpu_bytes > memory.gpu_free:
        sizes = f"{memory.gpu_bytes / GIB:,.1f} GiB and has {memory.gpu_free / GIB:,.1f} available"
        reasons.append(f"each GPU needs {sizes}")
    if setup.host is not None and memory.host_bytes > setup.host:
        sizes = f"{memory.host_bytes / GIB:,.0f} GiB and has {setup.host / GIB:,.0f} (--host-memory)"
        reasons.append(f"each host needs {sizes}")
    trained = f"{memory.parameters.trained:,} of {memory.parameters.total:,} parameters are trained."
    console.print(headline(title, trained, reasons))
    total = f" of {setup.host / GIB:,.0f}" if setup.host else ""
    gpu = f"Each GPU: {memory.gpu_bytes / GIB:,.1f} of {memory.gpu_free / GIB:,.1f} GiB"
    console.print(_item_table(gpu, memory.gpu))
    console.print(_item_table(f"Each host: {memory.host_bytes / GIB:,.1f}{total} GiB", memory.host))
    console.print(_others(setup))
    exact = "Weights, gradients and optimizer are exact; docs/plan.md has the assumptions behind the rest"
    console.print(Text(f"\n{exact}", style="dim"))


def _way(setup: TrainingSetup) -> str:
    """As in "ZeRO-3, optimizer offloaded"."""
    stage = f"ZeRO-{setup.stage}" if setup.stage else "no ZeRO"
    offloaded = {"none": "", "optimizer": ", optimizer offloaded", "all": ", optimizer and weights offloaded"}
    return stage + offloaded[setup.offload]


def _item_table(title: str, items: list[Item]) -> Table:
    table = new_table(title, "GiB")
    table.add_column(style="dim")
    for item in items:
        note = ", ".join(part for part in ("exact" if item.exact else "", item.note) if part)
        table.add_row(item.name, f"{item.nbytes / GIB:,.2f}", note)
    return table


def _others(setup: TrainingSetup) -> Table:
    table = new_table("Fewest GPUs", "GPUs", "GiB per GPU", "GiB per host")
    for way, found in _smallest(setup):
        if found is None:
            table.add_row(_way(way), "more than 1,024", "", "")
            continue
        memory = TrainingMemory(found)
        sizes = [f"{nbytes / GIB:,.0f}" for nbytes in (memory.gpu_bytes, memory.host_bytes)]
        table.add_row(_way(way), f"{found.gpus:,}", *sizes)
    return table
