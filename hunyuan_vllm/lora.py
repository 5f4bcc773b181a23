"""LoRA on CPUs, where vLLM's experts with LoRA need Triton: adapters act on attention, and experts are built without.

On GPUs nothing is restricted: vLLM's own expert layers take adapters there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from hunyuan_vllm.adapter import ATTENTION

__all__ = ["experts_without_lora_on_cpu", "limit_targets_on_cpu"]

logger = init_logger(f"vllm.{__name__}")


def limit_targets_on_cpu(vllm_config: VllmConfig) -> None:
    """Restrict `--lora-target-modules` to attention on CPUs.

    Raises:
        ValueError: the user asked for other modules there.
    """
    lora = vllm_config.lora_config
    if lora is None or not current_platform.is_cpu():
        return
    if lora.target_modules is None:
        lora.target_modules = list(ATTENTION)
        logger.info("LoRA on CPUs acts on attention (%s) only", ", ".join(ATTENTION))
    elif others := sorted(set(lora.target_modules) - set(ATTENTION)):
        raise ValueError(f"--lora-target-modules {' '.join(others)} is not possible on CPUs: use {' '.join(ATTENTION)}")


@contextmanager
def experts_without_lora_on_cpu() -> Iterator[None]:
    """Build experts as if LoRA were off, on CPUs: with it on, vLLM picks its Triton kernel whatever the targets."""
    vllm_config = get_current_vllm_config()
    lora = vllm_config.lora_config
    if current_platform.is_cpu():
        vllm_config.lora_config = None
    try:
        yield
    finally:
        vllm_config.lora_config = lora
