"""What is planned: one network served in one way, and the assumptions"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Self

from hunyuan_vllm.kv_cache import CacheShape, even_partition, legal_partition
from hunyuan_vllm.network import Network
from hunyuan_vllm.plan.hardware import Gpu, choose_backend
from hunyuan_vllm.plan.schemes import SCHEMES, Scheme
from hunyuan_vllm.util.text import GIB


@dataclass(frozen=True)
class Assumptions:
    """None of these numbers was measured on the GPUs that are planned for. GiB are of one GPU."""

    context_gib: float = 0.6  # CUDA context and loaded kernels, outside vLLM's share
    nccl_gib: float = 0.8  # NCCL's and the custom all-reduce's buffers, outside vLLM's share
    nccl_network_gib: float = 0.8  # more of them where ranks are on several nodes
    workspace_gib: float = 0.6  # cuBLAS and attention workspaces, allocator rounding
    graph_layer_kib: float = 64  # a layer and captured CUDA graph, beside the largest graph's activations
    logit_bytes: float = 14  # a logit while sampling: bfloat16, float32, probabilities, noise
    memory_efficiency: float = 0.75  # share of the memory bandwidth that a step's reads reach
    compute_efficiency: float = 0.60  # share of the peak rate that large products reach
    link_efficiency: float = 0.70  # share of a link's bandwidth that an all-reduce reaches
    layer_overhead_us: float = 30  # a layer's small kernels, with CUDA graphs
    eager_layer_overhead_us: float = 300  # the same with --enforce-eager: the host launches each kernel
    step_overhead_ms: float = 2  # a step: scheduler, inputs, sampling, output
    all_reduce_us: float = 10  # of an all-reduce however little it carries, within a node
    network_us: float = 25  # more where it crosses nodes


@dataclass(frozen=True)
class Stage:
    """The layers of a pipeline stage.

    Attributes:
        first, last: it has the embedding; it has the final norm and the head.
    """

    layers: range
    first: bool = True
    last: bool = True


def stages(config: Network, partition: list[int]) -> list[Stage]:
    """Pipeline stages of so many layers each."""
    cuts = pairwise(accumulate(partition, initial=0))
    return [Stage(range(*cut), cut[0] == 0, cut[1] == config.num_hidden_layers) for cut in cuts]


def vllm_limits(gpu: Gpu) -> tuple[int, int]:
    """vLLM's own `max_num_batched_tokens` and `max_num_seqs` for a server on this GPU (engine/arg_utils.py)."""
    if gpu.memory >= 160 * GIB:
        return 16384, 1024
    if gpu.memory >= 70 * GIB and "A100" not in gpu.name:
        return 8192, 1024
    return 2048, 256


@dataclass(frozen=True)
class Scenario:
    """A server to plan.

    Attributes:
        quantised: the checkpoint is quantised already, so its scheme is fixed.
        gpus: GPUs in total; those that one engine leaves over run replicas of it.
        tensor, pipeline, dcp: ranks that share each layer, stages, ranks that share a sequence's cache.
        kv: the cache's type, "auto" (the model's) or "fp8".
        node_link: bytes a second that each GPU can send to another node.
    """

    name: str
    config: Network
    gpu: Gpu
    gpus: int
    tensor: int
    pipeline: int = 1
    dcp: int = 1
    scheme: Scheme = SCHEMES["bf16"]
    quantised: bool = False
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

    def changed(self, **values: Any) -> Self:
        return replace(self, **values)

    @property
    def ranks(self) -> int:
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

    def cache_shape(self, stage: Stage, sharing: bool) -> CacheShape:
        """The cache of a rank of a stage; without CLA's sharing, also what a step reads of it."""
        itemsize = 1 if self.kv == "fp8" else 2
        return CacheShape.of(
            self.config, tensor_parallel=self.tensor, stage=stage.layers, itemsize=itemsize, sharing=sharing
        )

    @property
    def attention_backend(self) -> tuple[str | None, dict[str, str]]:
        """See `choose_backend`."""
        return choose_backend(self.gpu.capability, self.config.head_dim, self.kv == "fp8", self.dcp)

    @cached_property
    def partition(self) -> list[int]:
        """Layers of each stage: as vLLM cuts by itself where that is legal, else the most even legal cut."""
        even = even_partition(self.config.num_hidden_layers, self.pipeline)
        if not any(map(self.config.is_cross, accumulate(even[:-1]))):
            return even
        return legal_partition(self.config, self.pipeline) or even

    @property
    def needs_partition(self) -> bool:
        """Whether vLLM must be told the cut."""
        return self.partition != even_partition(self.config.num_hidden_layers, self.pipeline)

    @cached_property
    def stages(self) -> list[Stage]:
        return stages(self.config, self.partition)
