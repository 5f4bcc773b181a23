"""Scenarios to plan for: the published model, and small ones."""

from __future__ import annotations

from functools import cache
from typing import Any

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.network import Network
from hunyuan_vllm.plan.hardware import find_gpu
from hunyuan_vllm.plan.model import DATA, open_planned
from hunyuan_vllm.plan.scenario import Scenario, vllm_limits
from hunyuan_vllm.plan.schemes import SCHEMES

FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": []}
# How vLLM is told of each scheme.
QUANTISED: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "hunyuan_int8"},
    "int8-w8a8": {"quantization": "hunyuan_int8_w8a8"},
    "fp8": {"quantization_config": FP8_CONFIG},
}


@cache
def published() -> HunYuanConfig:
    return HunYuanConfig.from_pretrained(DATA / "hunyuan-large")


@cache
def network() -> Network:
    return open_planned("hunyuan-large").config


def light(config: HunYuanConfig) -> Network:
    """The same network as `plan` reads it, without transformers."""
    return Network.read(config.to_dict())


def planned(
    gpu: str = "H20",
    gpus: int = 16,
    tensor: int = 16,
    scheme: str = "bf16",
    config: HunYuanConfig | None = None,
    **values: Any,
) -> Scenario:
    """The published model, unless `config` is given, with vLLM's limits for the GPU."""
    kind = find_gpu(gpu)
    tokens, sequences = vllm_limits(kind)
    fields: dict[str, Any] = dict(
        name="hunyuan-large",
        config=light(config) if config else network(),
        gpu=kind,
        gpus=gpus,
        tensor=tensor,
        scheme=SCHEMES[scheme],
        batched_tokens=tokens,
        sequences=sequences,
    )
    return Scenario(**(fields | values))
