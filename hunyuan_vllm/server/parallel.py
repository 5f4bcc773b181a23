"""How many ranks, and which executor starts them: all GPUs of the Ray cluster or of the machine, unless told."""

from __future__ import annotations

from dataclasses import dataclass, field

from hunyuan_vllm.errors import NotYetError, UserError
from hunyuan_vllm.server.flags import Flags
from hunyuan_vllm.server.gpu_wait import describe
from hunyuan_vllm.server.machine import GpuKind, Machine
from hunyuan_vllm.server.model_source import ModelSource
from hunyuan_vllm.server.settings import Settings

__all__ = ["Ranks", "choose_ranks"]

FOR_WEIGHTS = 0.85  # of a GPU's memory: vLLM takes 0.92 of it, and the cache and activations want some


@dataclass(frozen=True)
class Ranks:
    """Parallel sizes.

    Attributes:
        tensor: tensor-parallel ranks.
        world: all ranks: tensor × pipeline × data parallel.
        executor: vLLM's --distributed-executor-backend, or None for its default on one machine.
        several_nodes: some ranks are on other machines.
    """

    tensor: int
    world: int
    executor: str | None = None
    several_nodes: bool = False
    notes: list[str] = field(default_factory=list)


def choose_ranks(
    settings: Settings,
    flags: Flags,
    machine: Machine,
    model: ModelSource,
    most: int | None = None,
    weight_bytes: int = 0,
) -> Ranks:
    """Decide on the ranks. In a Ray cluster there may be more than it has GPUs yet, or free ones: they are waited for.

    Args:
        most: GPUs to use at most, unless told.
        weight_bytes: size of the weights as GPUs hold them; 0 where that is unknown.

    Raises:
        NotYetError: there are not as many GPUs as were asked for, or none at all.
        UserError: the network cannot be cut so.
    """
    others = flags.integer("pipeline-parallel-size", 1) * flags.integer("data-parallel-size", 1)
    asked = flags.integer("tensor-parallel-size", 0) or settings.tp_size
    executor = flags.get("distributed-executor-backend")
    by_hand = any(name in flags for name in ("nnodes", "headless", "data-parallel-address"))
    if not machine.cuda or model.demo or by_hand:
        tensor = asked or 1
        _check_cut(model, tensor)
        return Ranks(tensor, tensor * others, executor, several_nodes=by_hand or executor == "ray")
    total = max(machine.ray.gpus if machine.ray else 0, machine.gpus)
    if total == 0:
        raise NotYetError("no GPU is visible (nvidia-smi -L, CUDA_VISIBLE_DEVICES) and no Ray cluster offers one")
    notes: list[str] = []
    usable = total // others
    if most and not asked and usable > most:
        notes.append(f"using {most} of {usable} GPUs: set TP_SIZE for more")
        usable = most
    tensor = asked or _largest_cut(model, usable, notes)
    if not asked and machine.ray:
        tensor = max(tensor, _least_that_hold(weight_bytes // others, machine.gpu, model))
    _check_cut(model, tensor)
    world = tensor * others
    if world > total and machine.ray is None:
        raise NotYetError(
            f"{world} GPUs are asked for and {total} are here: set TP_SIZE={max(total // others, 1)} or less, or start "
            "Ray on several nodes (hunyuan-vllm cluster up)"
        )
    if executor is None and world > machine.gpus:
        executor = "ray"
    if executor == "ray" and machine.ray and machine.ray.free_gpus < world:
        notes.append(f"waits for {world} GPUs in Ray: {'; '.join(describe(machine.ray, settings.node_ips))}")
    return Ranks(tensor, world, executor, executor == "ray", notes)


def _largest_cut(model: ModelSource, gpus: int, notes: list[str]) -> int:
    """The most GPUs, of those there are, that the network can be divided over."""
    for size in range(gpus, 1, -1):
        if _cut_problem(model, size) is None:
            if size < gpus:
                notes.append(f"using {size} of {gpus} GPUs: the network does not divide over more")
            return size
    return 1


def _least_that_hold(weight_bytes: int, gpu: GpuKind | None, model: ModelSource) -> int:
    """The fewest GPUs whose memory the weights fit into, of those that the network can be divided over; else 1."""
    if gpu is None or model.config is None:
        return 1
    for size in range(1, model.config.num_attention_heads + 1):
        if weight_bytes <= size * gpu.memory * FOR_WEIGHTS and _cut_problem(model, size) is None:
            return size
    return 1


def _check_cut(model: ModelSource, size: int) -> None:
    if problem := _cut_problem(model, size):
        raise UserError(problem)


def _cut_problem(model: ModelSource, size: int) -> str | None:
    """Why the network cannot be divided over `size` ranks; None if it can, or if its config is not here yet."""
    if model.config is None:
        return None
    from hunyuan_vllm.preflight import check_tensor_parallel

    try:
        check_tensor_parallel(model.config, size)
        if model.format is not None:
            model.format.check_ranks(model.config, size)
    except ValueError as error:
        return str(error)
    return None
