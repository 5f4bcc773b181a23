"""What is asked of the planner: one network, on so many GPUs of one kind, started with certain options."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.pipeline import even_partition, legal_partition
from hunyuan_vllm.plan.assumptions import Assumptions
from hunyuan_vllm.plan.gpus import Gpu
from hunyuan_vllm.plan.network import Network
from hunyuan_vllm.plan.schemes import SCHEMES, Scheme
from hunyuan_vllm.plan.weights import Stage, stages

__all__ = ["Scenario", "vllm_limits"]

GIB = 2**30


def vllm_limits(gpu: Gpu) -> tuple[int, int]:
    """vLLM's own `max_num_batched_tokens` and `max_num_seqs` for a server on this GPU (engine/arg_utils.py)."""
    if gpu.memory >= 160 * GIB:
        return 16384, 1024
    if gpu.memory >= 70 * GIB and "A100" not in gpu.name:
        return 8192, 1024
    return 2048, 256


@dataclass(frozen=True)
class Scenario:
    """A set-up to judge.

    Attributes:
        gpus: GPUs in all; what the ranks of one engine leave over serves replicas.
        tensor, pipeline, dcp: ranks that share each layer, stages, ranks that share a sequence's cache.
        kv: the cache's type, "auto" (the model's) or "fp8".
        batched_tokens, sequences: vLLM's --max-num-batched-tokens and --max-num-seqs.
        utilization: vLLM's --gpu-memory-utilization.
        block_size: tokens of a KV block.
        eager: without CUDA graphs and compilation (--enforce-eager).
        input_len, output_len: tokens of the requests that rates are given for.
        per_node: GPUs of a node.
        node_link: bytes a second that each GPU can send to another node.
        remarks: what is special about the checkpoint.
    """

    name: str
    network: Network
    gpu: Gpu
    gpus: int
    tensor: int
    pipeline: int = 1
    dcp: int = 1
    scheme: Scheme = SCHEMES["bf16"]
    kv: str = "auto"
    max_model_len: int = 131072
    utilization: float = 0.92
    batched_tokens: int = 8192
    sequences: int = 1024
    block_size: int = 16
    eager: bool = False
    input_len: int = 2048
    output_len: int = 256
    per_node: int = 8
    node_link: float = 400e9 / 8
    assumptions: Assumptions = field(default_factory=Assumptions)
    remarks: tuple[str, ...] = ()

    def changed(self, **values: Any) -> Scenario:
        return replace(self, **values)

    @property
    def config(self) -> HunYuanConfig:
        return self.network.config

    @property
    def ranks(self) -> int:
        """Ranks of one engine."""
        return self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """Engines that fit on the GPUs."""
        return max(1, self.gpus // self.ranks)

    @property
    def nodes(self) -> int:
        """Nodes that one engine's ranks are on."""
        return -(-self.ranks // self.per_node)

    @property
    def tensor_nodes(self) -> int:
        """Nodes that the ranks of one stage are on."""
        return -(-self.tensor // self.per_node)

    @property
    def kv_itemsize(self) -> int:
        return 1 if self.kv == "fp8" else 2

    @cached_property
    def partition(self) -> list[int]:
        """Layers of each stage: as vLLM cuts by itself where that is legal, else the most even legal cut."""
        even = even_partition(self.config.num_hidden_layers, self.pipeline)
        starts = [sum(even[:stage]) for stage in range(1, self.pipeline)]
        if not any(self.config.is_cross(start) for start in starts):
            return even
        return legal_partition(self.config, self.pipeline) or even

    @property
    def needs_partition(self) -> bool:
        """Whether vLLM must be told the cut."""
        return self.partition != even_partition(self.config.num_hidden_layers, self.pipeline)

    @cached_property
    def stages(self) -> list[Stage]:
        return stages(self.config, self.partition)
