"""How many ranks, which executor starts them, and the wait for the cluster's GPUs"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hunyuan_vllm.plan.hardware import choose_backend
from hunyuan_vllm.server.hardware import GpuKind, Machine
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.server.ray_cluster import RayCluster, find_ray_cluster
from hunyuan_vllm.settings import Settings
from hunyuan_vllm.util.errors import NotYetError, UserError
from hunyuan_vllm.util.text import duration

# With these the user has chosen something that shared caches may not go with.
CHOSEN_OTHERWISE = ("decode-context-parallel-size", "attention-backend", "speculative-config", "kv-transfer-config")


def choose_context_ranks(flags: Flags, gpu: GpuKind | None, model: ModelSource, tensor: int, fp8_cache: bool) -> int:
    """vLLM's --decode-context-parallel-size; 1 where the option is not to be given.

    With more tensor-parallel ranks than KV heads each head is held several times. Those ranks then hold different
    tokens of it instead, and the cache takes as many times the tokens.
    """
    if gpu is None or model.config is None or any(name in flags for name in CHOSEN_OTHERWISE):
        return 1
    copies = tensor // model.config.num_key_value_heads
    if copies <= 1:
        return 1
    backend = choose_backend(gpu, model.config.head_dim, fp8_cache, copies)
    return copies if backend else 1


PERIOD = 2.0  # seconds between two looks at the cluster, each of which takes some itself
REMINDER = 30.0  # seconds between two lines in a log that say the same
NO_CLUSTER = "no Ray cluster is running here"
START = "start it on this node (sh deploy/ray_head.sh), or on all at once (hunyuan-vllm cluster up)"


class Stopping(Protocol):
    """Says whether the operator wants no more."""

    @property
    def requested(self) -> bool: ...


def wait_for_gpus(
    needed: int,
    environ: Mapping[str, str],
    limit: float,
    expected: Sequence[str] = (),
    stop: Stopping | None = None,
    find: Callable[[Mapping[str, str]], RayCluster | None] = find_ray_cluster,
    stream: TextIO | None = None,
) -> None:
    """Return once so many GPUs are free in the cluster, or once `stop` is requested.

    Args:
        needed: GPUs.
        environ: says where the cluster is.
        limit: seconds to wait at most.
        expected: addresses of the nodes that are to be there, where they are known.
        stream: where it says what it waits for; None is standard error.

    Raises:
        NotYetError: they are not there in that time; the message says what is missing.
    """
    console = Console(file=stream or sys.stderr, highlight=False)
    deadline = time.monotonic() + limit
    said: tuple[str, float] = ("", 0.0)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while stop is None or not stop.requested:
            free, lines = _look(needed, environ, expected, find)
            if free >= needed:
                if said[0]:
                    console.print(f"hunyuan-vllm: all {needed} GPUs are there", soft_wrap=True)
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise NotYetError(
                    f"{needed} GPUs are needed and {free} are free in Ray after {limit:g} s: {'; '.join(lines)}. Set "
                    "TP_SIZE for fewer, or GPU_WAIT for longer (seconds)"
                )
            head = f"hunyuan-vllm: waiting for GPUs in Ray: {free} of {needed} are free"
            said = _say(live, head, lines, left, said)
            _count_down(live, head, lines, min(deadline, time.monotonic() + PERIOD), deadline, stop)


def describe(cluster: RayCluster | None, expected: Sequence[str] = ()) -> list[str]:
    """One line for each node: what it has, or that it is missing and what to do."""
    if cluster is None:
        return [f"{NO_CLUSTER}: {START}"]
    here = {node.address for node in cluster.members if node.alive}
    lines = [
        f"{node.address} has {node.free_gpus} of its {node.gpus} GPUs free"
        + ("" if node.free_gpus == node.gpus else ": another program of Ray holds the rest")
        for node in cluster.members
        if node.alive
    ]
    gone = dict.fromkeys(node.address for node in cluster.members if not node.alive and node.address not in here)
    lines += [f"{address} has left: start Ray there again (sh deploy/ray_worker.sh HEAD_IP)" for address in gone]
    absent = [address for address in expected if address not in here and address not in gone]
    return lines + [f"{address} has not joined: run sh deploy/ray_worker.sh HEAD_IP there" for address in absent]


def _look(
    needed: int,
    environ: Mapping[str, str],
    expected: Sequence[str],
    find: Callable[[Mapping[str, str]], RayCluster | None],
) -> tuple[int, list[str]]:
    """GPUs that are free, and the lines about what is missing."""
    try:
        cluster = find(environ)
    except UserError as error:
        return 0, [str(error)]
    lines = describe(cluster, expected)
    if cluster is None:
        return 0, lines
    if cluster.gpus < needed and len(lines) == cluster.nodes:
        lines.append(f"nodes with {needed - cluster.gpus} more GPUs have not joined: sh deploy/ray_worker.sh HEAD_IP")
    return cluster.free_gpus, lines


def _say(live: Live, head: str, lines: Sequence[str], left: float, said: tuple[str, float]) -> tuple[str, float]:
    """In a log: all of it when it has changed, one line now and then while it has not."""
    text, now = "\n  ".join([head, *lines]), time.monotonic()
    if text == said[0] and now - said[1] < REMINDER:
        return said
    if not live.console.is_terminal:
        live.console.print(
            head if text == said[0] else text, f"  giving up in {duration(left)}", sep="\n", soft_wrap=True
        )
    return text, now


def _count_down(
    live: Live, head: str, lines: Sequence[str], until: float, deadline: float, stop: Stopping | None
) -> None:
    while (now := time.monotonic()) < until and not (stop and stop.requested):
        if live.console.is_terminal:
            live.update(Text("\n  ".join([head, *lines, f"giving up in {duration(deadline - now)}"])), refresh=True)
        time.sleep(min(0.5, until - now))


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
