"""Each patch of vLLM: the test fails once an engine without the patch does right, and the patch can go."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from unittest.mock import MagicMock

import forked_programs
import pytest
import torch
from adapters import adapter_pairs, rename_modules, write_adapter
from checkpoints import tiny_config, write_checkpoint
from engine import engine, greatest_difference, random_prompts, score
from golden_data import FLOAT32_TOLERANCE, load_golden, reference_answers
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
from vllm import _custom_ops
from vllm.compilation import decorators
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatMessage
from vllm.lora.lora_model import LoRAModel
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from vllm.v1 import structured_output
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.structured_output.request import StructuredOutputRequest

from hunyuan_vllm import demo, model, patches
from hunyuan_vllm.cpu import NativeCPUExperts, PackedCPUExperts
from hunyuan_vllm.cpu_kernels import EXPERTS, Kernel, kernel
from hunyuan_vllm.quant.schemes import BF16

without_amx = pytest.mark.skipif(
    kernel(BF16, EXPERTS) is not Kernel.PACKED,
    reason="needs a CPU with AVX-512 BF16 and without AMX, where the patch acts",
)

without_avx512 = pytest.mark.skipif(torch.cpu._is_avx512_supported(), reason="needs a CPU without AVX-512")

pytestmark = pytest.mark.engine


def test_cpu_experts_still_need_repacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "process_weights_after_loading"
    patched = getattr(UnquantizedFusedMoEMethod, name)
    monkeypatch.setattr(UnquantizedFusedMoEMethod, name, getattr(patched, "__wrapped__", patched))
    monkeypatch.setattr(model, "apply_patches", lambda: None)
    config = tiny_config()
    first = write_checkpoint(tmp_path / "first", config)
    second = write_checkpoint(tmp_path / "second", config, seed=5)
    prompts = random_prompts(config.vocab_size, [60])
    with engine(first) as llm:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
        results = score(llm, prompts)
    assert greatest_difference(results, reference_answers(second, prompts, 1)) > FLOAT32_TOLERANCE


def upstream(function: Callable) -> Callable:
    return getattr(function, "__wrapped__", function)


@without_amx
def test_upstream_still_has_no_packed_experts() -> None:
    """A class of vLLM's own that packs for AVX-512 BF16 would be in this list."""
    classes = upstream(unquantized.backend_to_kernel_cls)(unquantized.UnquantizedMoeBackend.CPU)
    assert [cls.__name__ for cls in classes] == [
        "X86CPUUnquantizedExperts",
        "ArmCPUUnquantizedExperts",
        "PowerCPUUnquantizedExperts",
        "CPUUnquantizedExperts",
    ]


@without_avx512
def test_upstream_still_has_no_linear_for_avx2() -> None:
    """Its own products of bfloat16 would come from oneDNN."""
    with pytest.raises(RuntimeError, match="could not create a primitive"):
        _custom_ops.create_onednn_mm(torch.ones(64, 64, dtype=torch.bfloat16), 32)


@pytest.mark.skipif(kernel(BF16, EXPERTS) is Kernel.UPSTREAM, reason="this CPU keeps vLLM's kernels")
def test_the_packed_kernels_are_used() -> None:
    """By a bfloat16 engine; a float32 one keeps the portable kernels."""

    def experts(model: torch.nn.Module) -> str:
        kernel = model.model.layers[0].mlp.experts.routed_experts.quant_method.moe_kernel
        return type(kernel.fused_experts).__name__

    golden = load_golden("cla2_top1")
    ours = (NativeCPUExperts if kernel(BF16, EXPERTS) is Kernel.OURS else PackedCPUExperts).__name__
    for dtype, expected in (("bfloat16", ours), ("float32", "CPUUnquantizedExperts")):
        with engine(golden.path, dtype=dtype) as llm:
            assert llm.apply_model(experts) == [expected]


@pytest.fixture
def zentorch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An AMD CPU with a zentorch whose experts fail, as they do where one gets all tokens."""

    def fused_moe(*_: object) -> None:
        raise RuntimeError("only 1 expert(s) received tokens")

    library = torch.library.Library("zentorch", "FRAGMENT")
    weights = "Tensor w1, Tensor w2, Tensor? w1_bias, Tensor? w2_bias, Tensor topk_weights, Tensor topk_ids"
    library.define(f"zentorch_fused_moe(Tensor(a!) output, Tensor x, {weights}, bool on_input, str activation) -> ()")
    library.impl("zentorch_fused_moe", fused_moe, "CPU")
    monkeypatch.setattr(type(current_platform), "is_zen_cpu", lambda self: True)
    yield
    library._destroy()


def test_upstream_still_prefers_zentorch(zentorch: None) -> None:
    patches.apply_patches()
    layer = SimpleNamespace(activation="silu", moe_config=None)
    assert upstream(cpu_moe.is_zentorch_moe_supported)(layer)
    assert not cpu_moe.is_zentorch_moe_supported(layer)


def test_experts_do_without_zentorch(zentorch: None) -> None:
    golden = load_golden("cla2_top1")
    with engine(golden.path) as llm:
        results = score(llm, [item.prompt for item in golden.items], max_tokens=2)
    assert greatest_difference(results, golden) <= FLOAT32_TOLERANCE


def test_upstream_still_adapts_rows_without_an_adapter() -> None:
    """tests/test_lora.py shows what that does to a batch, and that the patch prevents it."""
    patches.apply_patches()
    assert punica_cpu.bgmv_shrink is lora_ops.bgmv_shrink
    for shrink, adapts in ((upstream(lora_ops.bgmv_shrink), True), (lora_ops.bgmv_shrink, False)):
        out = torch.zeros(2, 1)
        shrink(torch.ones(2, 3), torch.ones(2, 1, 1, 3), out, torch.tensor([0, -1]), 2.0)
        assert out[0].item() == 6 and (out[1].item() != 0) is adapts


def test_upstream_still_takes_adapters_of_which_nothing_applies(tmp_path: Path) -> None:
    """tests/test_adapter.py has the other kinds of adapters that do not fit."""
    patches.apply_patches()
    config = tiny_config()
    directory = rename_modules(write_adapter(tmp_path / "a", adapter_pairs(config)), lambda name: f"model.{name}")
    request = LoRARequest("wrong", 1, str(directory))
    manager = MagicMock(supported_lora_modules=["qkv_proj", "o_proj"], moe_ep_load_spec=None)
    manager.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    manager.model = SimpleNamespace(config=config)
    worker = SimpleNamespace(_adapter_manager=manager, _lora_model_cls=LoRAModel, vocab_size=config.vocab_size)
    worker.max_position_embeddings, worker.lora_config = None, LoRAConfig(max_lora_rank=8, lora_dtype=torch.float32)
    load = WorkerLoRAManager._load_adapter
    assert upstream(load)(worker, request).loras
    with pytest.raises(ValueError, match=r"adapter wrong \(.*\): none of its"):
        load(worker, request)


def test_upstream_still_hands_any_adapter_to_the_engine(tmp_path: Path) -> None:
    patches.check_adapters_of_requests()
    config = tiny_config()
    directory = rename_modules(write_adapter(tmp_path / "a", adapter_pairs(config)), lambda name: f"model.{name}")
    request = LoRARequest("far", 1, str(directory))
    processor = MagicMock(lora_config=LoRAConfig(max_lora_rank=8), tokenizer=None)
    processor.model_config.hf_config = config
    validate = InputProcessor._validate_lora
    upstream(validate)(processor, request)
    with pytest.raises(ValueError, match="adapter far: .*: none of its"):
        validate(processor, request)
    validate(processor, LoRARequest("near", 2, str(write_adapter(tmp_path / "b", adapter_pairs(config)))))
    validate(processor, LoRARequest("on the hub", 3, "somebody/adapter"))
    processor.model_config.hf_config = None  # another model
    validate(processor, request)


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, bool], list[str]]:
    """Sets whether the CPU has AMX and the kernel grants its use; returns the list that notes each request."""

    def machine(has_tiles: bool, granted: bool) -> list[str]:
        requests: list[str] = []

        def ask() -> bool:
            requests.append("asked")
            return granted

        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
        monkeypatch.setattr(torch.cpu, "_init_amx", ask)
        return requests

    return machine


def attention() -> str:
    return cpu_attn._get_attn_isa(torch.bfloat16, 128, 128)


def test_upstream_still_chooses_amx_without_permission(amx: Callable[[bool, bool], list[str]]) -> None:
    requests = amx(True, True)
    assert attention() == "amx"
    assert not requests


@pytest.mark.parametrize(("granted", "chosen"), [(True, "amx"), (False, "vec")])
def test_amx_is_used_with_permission_only(granted: bool, chosen: str, amx: Callable[[bool, bool], list[str]]) -> None:
    requests = amx(True, granted)
    patches.ask_for_amx()
    assert requests == ["asked"]
    assert attention() == chosen


def test_nobody_asks_for_amx_on_other_cpus(amx: Callable[[bool, bool], list[str]]) -> None:
    requests = amx(False, False)
    patches.ask_for_amx()
    assert not requests


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="this CPU has AMX: the kernel grants it")
def test_an_engine_does_without_amx_where_the_kernel_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own request, which fails on this CPU whatever is believed of it."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(model, "apply_patches", patches.ask_for_amx)
    golden = load_golden("cla2_top1")
    with engine(golden.path, dtype="bfloat16") as llm:
        assert len(score(llm, [golden.items[0].prompt], max_tokens=2)) == 1


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
def test_an_engine_has_the_permission() -> None:
    """ARCH_GET_XCOMP_PERM in a process of its own, which nothing else has asked in: bit 18 is the tiles' data."""
    code = (
        "import ctypes\n"
        "from engine import engine\n"
        f"with engine({str(load_golden('cla2_top1').path)!r}, dtype='bfloat16') as llm:\n"
        "    mask = ctypes.c_ulong()\n"
        "    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))\n"
        "    print('granted', mask.value >> 18 & 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "granted 1" in done.stdout, done.stderr


def test_upstream_still_answers_without_reasoning_content() -> None:
    for message in (ChatMessage(role="assistant", reasoning="Hm"), DeltaMessage(reasoning="Hm")):
        assert "reasoning_content" not in message.model_dump()


def test_stock_tool_grammars_still_let_arguments_run_on() -> None:
    """No patch, but hunyuan_vllm/tool_calls.py has the same end: vLLM's own parser would do then."""
    tools = [{"type": "function", "function": {"name": "now"}}]
    request = ChatCompletionRequest(messages=[], tools=tools, tool_choice="required")
    options = {"reasoning": False, "strict_level": ToolStrictLevel.PARAMETER}
    tag = get_model_structural_tag("hermes", request.tools, request.tool_choice, **options)
    assert {(call.content.max_whitespace_cnt, call.content.json_schema) for call in tag.format.tags} == {(None, True)}


def test_patches_apply_once() -> None:
    patches.apply_patches()
    once = (UnquantizedFusedMoEMethod.process_weights_after_loading, unquantized.backend_to_kernel_cls)
    patches.apply_patches()
    assert (UnquantizedFusedMoEMethod.process_weights_after_loading, unquantized.backend_to_kernel_cls) == once


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], SimpleNamespace]]:
    """A request whose grammar does not get compiled: its `niceness` meanwhile, and what the scheduler reads of it."""
    end = threading.Event()
    monkeypatch.setattr(structured_output, "cached_tokenizer_from_config", lambda **_: None)

    def start() -> SimpleNamespace:
        niceness: Queue[int] = Queue()

        def compile_grammar(*_: object, **__: object) -> None:
            niceness.put(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            end.wait(60)

        config = MagicMock()
        config.scheduler_config.max_num_seqs, config.model_config.skip_tokenizer_init = 1, False
        config.model_config.hf_config = tiny_config()
        options = config.structured_outputs_config
        options.reasoning_parser_plugin = options.reasoning_parser = ""
        manager = structured_output.StructuredOutputManager(config)
        manager.backend = SimpleNamespace(compile_grammar=compile_grammar)
        asked = StructuredOutputRequest(StructuredOutputsParams(regex="a"))
        manager.grammar_init(SimpleNamespace(structured_output_request=asked, sampling_params=None, request_id="1"))
        return SimpleNamespace(niceness=niceness.get(timeout=60), asked=asked)

    yield start
    end.set()


def unpatch_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (structured_output.StructuredOutputManager, "_create_grammar"),
        (StructuredOutputRequest, "_check_grammar_completion"),
    ):
        monkeypatch.setattr(owner, name, upstream(getattr(owner, name)))


def test_upstream_still_compiles_grammars_at_the_engines_priority_without_end(
    compiling: Callable[[], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpatch_compilation(monkeypatch)
    monkeypatch.setattr(patches, "COMPILATION_LIMIT", 0.0)
    request = compiling()
    assert request.niceness == os.getpriority(os.PRIO_PROCESS, 0)
    assert request.asked.grammar is None


def test_a_grammar_is_compiled_behind_everything_else_and_not_for_ever(
    compiling: Callable[[], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    patches.limit_compilation()
    request = compiling()
    assert request.niceness == max(own, patches.COMPILATION_NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own, "only the thread that compiles"
    assert not request.asked.is_grammar_ready
    monkeypatch.setattr(patches, "COMPILATION_LIMIT", 0.0)
    assert isinstance(request.asked.grammar, TimeoutError)


def test_the_process_of_an_engine_limits_compilation() -> None:
    """It registers the plugin, but configures nothing, and where workers compute builds no model."""
    code = (
        "import vllm.v1.engine.core\nfrom vllm.plugins import load_general_plugins\nload_general_plugins()\n"
        "from vllm.v1.structured_output import StructuredOutputManager as manager\n"
        "print(hasattr(manager._create_grammar, '__wrapped__'))"
    )
    result = forked_programs.run([sys.executable, "-c", code])
    assert result.stdout.split()[-1:] == ["True"], result.stderr


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], object]:
    """Have vLLM load a compiled function of Inductor's from its cache; None where it compiles anew."""
    monkeypatch.delattr(BundledAOTAutogradSerializableCallable, "finalize_loading", raising=False)
    function = BundledAOTAutogradSerializableCallable.__new__(BundledAOTAutogradSerializableCallable)
    function.compiled_fn = lambda: None
    compiled = SimpleNamespace(
        _artifacts=SimpleNamespace(compiled_fn=function),
        source_info=lambda: SimpleNamespace(inlined_sources=[]),
        disable_guard_check=lambda: None,
    )
    monkeypatch.setattr(torch.compiler, "load_compiled_function", lambda *args, **kwargs: compiled)
    config = VllmConfig()
    network = SimpleNamespace(
        vllm_config=config, compilation_config=config.compilation_config, _is_encoder=False, forward=lambda: None
    )
    (tmp_path / "model").touch()
    return lambda: decorators._try_load_aot_compiled_fn(network, str(tmp_path / "model"))


def test_upstream_still_cannot_load_what_inductor_compiled(loaded: Callable[[], object]) -> None:
    assert loaded() is None


def test_what_inductor_compiled_is_loaded(loaded: Callable[[], object]) -> None:
    patches.load_what_inductor_compiled()
    assert loaded() is not None


@pytest.mark.skipif(not current_platform.is_cpu(), reason="compiled code is loaded without guards on CPUs only")
@pytest.mark.parametrize("switch", ["HUNYUAN_VLLM_CLA_SHARING", "HUNYUAN_VLLM_NATIVE_KERNELS"])
def test_another_network_has_compiled_code_of_its_own(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for value in "1", "0", "1":
        monkeypatch.setenv(switch, value)
        keys.append(EngineArgs(model=str(demo.path())).create_engine_config().compute_hash())
    assert keys[0] == keys[2] != keys[1]
