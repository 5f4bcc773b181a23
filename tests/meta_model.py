"""The real model class, built on the meta device as one rank of a larger group would build it.

Tensors have shapes and no memory, so the published 389B network takes seconds. Nothing can be computed with it.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from checkpoints import published_json
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    get_pp_group,
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.model import HunYuanForCausalLM


@contextmanager
def meta_model(
    config: HunYuanConfig,
    *,
    tensor_parallel: int = 1,
    rank: int = 0,
    pipeline_parallel: int = 1,
    stage: int = 0,
    quantization: str | None = None,
    quantization_config: dict[str, Any] | None = None,
    device: str = "meta",
    **options: Any,
) -> Iterator[HunYuanForCausalLM]:
    """The model of tensor-parallel rank `rank` in pipeline stage `stage`, before weights are loaded.

    Args:
        quantization: vLLM's name of a method that quantises while loading.
        quantization_config: the entry of that name in the checkpoint's config.json.
        device: where the parameters are; on "cpu" a small model can be loaded.
        options: further arguments of vLLM's `EngineArgs`.
    """
    with tempfile.TemporaryDirectory() as directory:
        fields = published_json(config)
        if quantization_config:
            fields["quantization_config"] = quantization_config
        (Path(directory) / "config.json").write_text(json.dumps(fields))
        defaults: dict[str, Any] = dict(
            dtype="bfloat16", skip_tokenizer_init=True, load_format="dummy", enforce_eager=True
        )
        args = EngineArgs(model=directory, quantization=quantization, **(defaults | options))
        vllm_config = args.create_engine_config()
        dtype = torch.get_default_dtype()
        with _faked_ranks(vllm_config, Path(directory) / "ranks", tensor_parallel, rank, pipeline_parallel, stage):
            torch.set_default_dtype(vllm_config.model_config.dtype)
            try:
                with torch.device(device):
                    model = HunYuanForCausalLM(vllm_config=vllm_config)
                yield model
            finally:
                torch.set_default_dtype(dtype)


def parameter_bytes(model: nn.Module, part: str = "") -> int:
    """Bytes of the parameters with `part` in their names; one that is used twice (a tied head) counts once."""
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if part in name)


@contextmanager
def _faked_ranks(
    vllm_config: VllmConfig, rendezvous: Path, tensor: int, rank: int, pipeline: int, stage: int
) -> Iterator[None]:
    """One process, whose groups claim to be larger: layers only ask for their size and their rank in it."""
    parallel = vllm_config.parallel_config
    with set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        try:
            initialize_model_parallel(1, 1)
            pp_group = dict(world_size=pipeline, rank_in_group=stage, rank=stage, ranks=[*range(pipeline)])
            with (
                patch.multiple(get_tp_group(), world_size=tensor, rank_in_group=rank),
                patch.multiple(get_pp_group(), **pp_group),
                patch.multiple(parallel, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline),
            ):
                yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
