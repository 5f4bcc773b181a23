"""Every change we make to vLLM itself, each with its reason and its end. There is no hook for what is here.

1. CPU experts repacked on reload.
   where     vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py, process_weights_after_loading
   why       Experts are packed into the CPU kernel's layout only when their kernel is first built. After
             `reload_weights` they stay unpacked and the kernel reads them in the wrong order: no error, wrong tokens.
   upstream  not reported yet (0.32.0 and 0.33.0 have it)
   until     tests/test_patches.py::test_cpu_experts_still_need_repacking fails
"""

from __future__ import annotations

from functools import wraps

from torch import nn
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

__all__ = ["apply_patches"]

_applied = False


def apply_patches() -> None:
    """Apply all patches to this process, once. Called when a Hunyuan model is built."""
    global _applied
    if not _applied:
        _repack_cpu_experts_on_reload()
        _applied = True


def _repack_cpu_experts_on_reload() -> None:
    stock = UnquantizedFusedMoEMethod.process_weights_after_loading

    @wraps(stock)
    def process_weights_after_loading(self: UnquantizedFusedMoEMethod, layer: nn.Module) -> None:
        is_reload = self.moe_kernel is not None
        stock(self, layer)
        if is_reload and self.unquantized_backend == UnquantizedMoeBackend.CPU:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod.process_weights_after_loading = process_weights_after_loading
