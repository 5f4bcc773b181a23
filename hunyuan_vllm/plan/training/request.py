"""From what the user wrote to a training set-up: names looked up, defaults filled in, contradictions refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.plan.gpus import find_gpu
from hunyuan_vllm.plan.models import open_planned
from hunyuan_vllm.plan.training.assumptions import TrainingAssumptions
from hunyuan_vllm.plan.training.choices import WAYS, fewest, fitting
from hunyuan_vllm.plan.training.setup import Mode, Offload, TrainingSetup

__all__ = ["TrainingRequest", "make_setup"]

GIB = 2**30


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
