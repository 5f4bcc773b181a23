"""A CUDA GPU for vLLM's selection of kernels to see, where there is none.

The package humming counts as installed: vLLM's wheels for CUDA require it.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from unittest.mock import patch

import torch
from vllm.platforms.interface import DeviceCapability, Platform

GIB = 2**30


class GemmType(Enum):
    """humming's, of which vLLM asks one to choose experts' kernels."""

    INDEXED = "indexed"
    GROUPED_CONTIGUOUS = "grouped_contiguous"
    GROUPED_MASKED = "grouped_masked"


def cuda_platform(major: int, minor: int = 0) -> type[Platform]:
    """vLLM's CUDA platform, of this compute capability, whose tensors are the CPU's."""
    extension = "vllm._C_stable_libtorch"
    stubs = {} if importlib.util.find_spec(extension) else {extension: ModuleType("absent in builds for CPUs")}
    with patch.dict(sys.modules, stubs):
        from vllm.platforms.cuda import CudaPlatformBase

    class FakeCuda(CudaPlatformBase):
        device_type = "cpu"
        dispatch_key = "CPU"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(major, minor)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "a GPU that is not there"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * GIB

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 78

        @classmethod
        def device_count(cls) -> int:
            return 8

    return FakeCuda


@contextmanager
def fake_cuda(major: int, minor: int = 0) -> Iterator[None]:
    """`current_platform` is `cuda_platform`'s."""
    from vllm.model_executor.layers.fused_moe.experts import fused_humming_moe
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.platforms import current_platform
    from vllm.utils import humming, import_utils
    from vllm.v1.attention import selector

    from hunyuan_vllm import model

    # Modules that ask the platform, or for humming, while they are imported are told the truth.
    assert model and fused_humming_moe and get_quantization_config("fp8")
    real: type[Platform] = type(current_platform)
    has_module = import_utils._has_module
    with (
        patch.dict("os.environ", VLLM_DISABLE_SHARED_EXPERTS_STREAM="1"),
        patch.object(import_utils, "_has_module", lambda name: name == "humming" or has_module(name)),
        patch.dict(vars(humming), {} if has_module("humming") else {"GemmType": GemmType}),
        patch.multiple(torch.accelerator, empty_cache=lambda: None, empty_host_cache=lambda: None),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: (major, minor)),
    ):
        current_platform.__class__ = cuda_platform(major, minor)
        try:
            yield
        finally:
            current_platform.__class__ = real
            selector._cached_get_attn_backend.cache_clear()  # or the next engine would take a GPU's attention
