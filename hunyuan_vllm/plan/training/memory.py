"""Where the memory of a GPU and of its host goes in training, by ZeRO stage and offload.

Under DeepSpeed in bfloat16: weights and gradients in bfloat16; of what is trained a float32 copy and
two moments (Adam).
With the optimizer on the hosts, ZeRO-3 keeps gradients there in float32 for the step and in bfloat16 as they come
(deepspeed/runtime/zero/stage3.py, 0.19: `fp32_partitioned_groups_flat[i].grad` and `grad_partitions_flat_buffer`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hunyuan_vllm.plan.training import activations
from hunyuan_vllm.plan.training.setup import TrainingSetup

__all__ = ["Item", "TrainingMemory"]

GIB = 2**30
BF16, F32 = 2, 4
OPTIMIZER = 3 * F32  # a parameter: float32 copy and two moments
LIVE = 10**9  # parameters: `stage3_max_live_parameters` and sub_group_size of train/ds_zero3_*.json


@dataclass(frozen=True)
class Item:
    """A use of memory, in bytes; `exact` if it is a sum over parameters and nothing else."""

    name: str
    nbytes: float
    exact: bool = False
    note: str = ""


class TrainingMemory:
    """The memory of one GPU and of one node.

    Attributes:
        gpu: what is on each GPU.
        host: what is in a node's memory.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup = setup
        self.parameters = setup.parameters
        self.gpu = [item for item in self._gpu() if item.nbytes]
        self.host = [item for item in self._host() if item.nbytes]

    @property
    def gpu_bytes(self) -> float:
        return sum(item.nbytes for item in self.gpu)

    @property
    def gpu_room(self) -> float:
        """Bytes of a GPU that tensors can have."""
        assumed = self.setup.assumptions
        return (self.setup.gpu.memory - assumed.context_gib * GIB) * assumed.fragmentation_efficiency

    @property
    def host_bytes(self) -> float:
        return sum(item.nbytes for item in self.host)

    @property
    def fits(self) -> bool:
        return self.gpu_bytes <= self.gpu_room and (self.setup.host is None or self.host_bytes <= self.setup.host)

    def _part(self, stage: int) -> int:
        """Among how many GPUs what this stage of ZeRO divides is divided."""
        return self.setup.gpus if self.setup.stage >= stage else 1

    def _gpu(self) -> Iterator[Item]:
        setup, parameters, assumed = self.setup, self.parameters, self.setup.assumptions
        if setup.offload != "all":
            yield Item("weights", parameters.nbytes / self._part(3), True, "bfloat16, routers float32")
        if setup.offload == "none":
            yield Item("gradients", parameters.gradient_bytes / self._part(2), True, "of the same types")
            note = "float32 copy and Adam's moments"
            yield Item("optimizer", OPTIMIZER * parameters.trained / self._part(1), True, note)
            if setup.stage == 3:
                group = min(LIVE, parameters.trained / setup.gpus)
                yield Item("step", F32 * group, note="float32 gradients of a group of parameters")
        if setup.stage == 3:
            gathered = max(LIVE, parameters.experts if setup.leaves else parameters.largest)
            gathered = min(gathered, parameters.total)
            note = "weights of a layer's experts" if setup.leaves else "weights of some modules"
            yield Item("gathered", BF16 * gathered, note=f"{note}, whole while they are used")
        if parameters.trained:
            largest = parameters.largest if setup.mode == "full" else 0
            yield Item("buckets", assumed.bucket_gib * GIB + BF16 * largest, note="gradients on their way")
        yield Item("kept", self._kept(), note=f"for the backward pass, {setup.tokens:,} tokens")
        yield Item(
            "layer", self._working(), note="of one layer at work" if setup.checkpointing else "gradients at work"
        )
        yield Item(
            "head", setup.tokens * activations.head_bytes(setup.config, assumed.logit_bytes), note="logits, loss"
        )
        yield Item("NCCL", self._nccl(), note="its buffers")
        yield Item("workspaces", assumed.workspace_gib * GIB)

    def _kept(self) -> float:
        config = self.setup.config
        of_layer = activations.checkpoint_bytes if self.setup.checkpointing else activations.layer_bytes
        each = sum(of_layer(config, layer) for layer in range(config.num_hidden_layers))
        return self.setup.tokens * (each + activations.input_bytes(config))

    def _working(self) -> float:
        config = self.setup.config
        layers = range(config.num_hidden_layers)
        gradients = self.setup.assumptions.backward_copies * max(activations.widest_bytes(config, n) for n in layers)
        again = max(activations.layer_bytes(config, n) for n in layers) if self.setup.checkpointing else 0
        return self.setup.tokens * (gradients + again)

    def _nccl(self) -> float:
        if self.setup.gpus == 1:
            return 0
        assumed = self.setup.assumptions
        return (assumed.nccl_gib + (assumed.nccl_network_gib if self.setup.nodes > 1 else 0)) * GIB

    def _host(self) -> Iterator[Item]:
        setup, parameters, ranks = self.setup, self.parameters, self.setup.gpus_of_a_node
        if setup.offload == "all":
            yield Item("weights", parameters.nbytes * ranks / setup.gpus, True, "bfloat16")
        if setup.offload != "none":
            share = parameters.trained * ranks / self._part(1)
            yield Item("optimizer", OPTIMIZER * share, True, "float32 copy and Adam's moments")
            if setup.stage == 3:
                yield Item("gradients", (F32 + BF16) * share, True, "float32 for the step, bfloat16 as they come")
            else:
                yield Item("gradients", F32 * share, True, "float32, for the step")
        yield Item("programs", setup.assumptions.host_used_gib * GIB)
