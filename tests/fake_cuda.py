"""A CUDA GPU for vLLM's selection of kernels to see, where there is none: nothing is computed on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import torch
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, Platform
from vllm.v1.attention import selector

from hunyuan_vllm import model as _model

__all__ = ["fake_cuda"]

GIB = 2**30


@contextmanager
def fake_cuda(major: int, minor: int = 0) -> Iterator[None]:
    """`current_platform` is vLLM's CUDA platform, of this compute capability, whose tensors are the CPU's."""
    # Modules that ask the platform while they are imported ask the real one.
    assert _model and get_quantization_config("fp8")
    with patch.dict(sys.modules, {"vllm._C_stable_libtorch": ModuleType("absent in builds for CPUs")}):
        from vllm.platforms.cuda import CudaPlatformBase

    class FakeCuda(CudaPlatformBase):
        device_type = "cpu"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(major, minor)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "a GPU that is not there"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * GIB

    real: type[Platform] = type(current_platform)
    with (
        patch.dict("os.environ", VLLM_DISABLE_SHARED_EXPERTS_STREAM="1"),
        patch.multiple(torch.accelerator, empty_cache=lambda: None, empty_host_cache=lambda: None),
    ):
        current_platform.__class__ = FakeCuda
        try:
            yield
        finally:
            current_platform.__class__ = real
            selector._cached_get_attn_backend.cache_clear()  # or the next engine would take a GPU's attention
