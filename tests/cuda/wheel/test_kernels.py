"""Which kernels of vLLM's wheel each scheme gets, on which GPU and how many of them; and that each layer builds."""

from collections.abc import Callable

import pytest
from networks import NETWORKS, built
from torch import nn
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

BY_CAPABILITY = {"8.0 (A100)": (8, 0), "9.0 (H100, H20)": (9, 0), "10.0 (B200)": (10, 0)}
INT8_ENDS = "refused: vLLM's int8 kernels support compute capability up to 9.0"
# Scheme, GPUs; kernels of linear layers and of experts: of the V1 family, with any number of ranks.
V1_ROWS = [
    ("bf16", "8.0 (A100)", "torch", "Triton"),
    ("bf16", "9.0 (H100, H20)", "torch", "Triton"),
    ("bf16", "10.0 (B200)", "torch", "TrtLlmBf16ExpertsMonolithic"),
    ("int8", "8.0 (A100)", "Marlin", "Marlin"),
    ("int8", "9.0 (H100, H20)", "Machete", "Marlin"),
    ("int8", "10.0 (B200)", "Marlin", "Marlin"),
    ("int8-w8a8", "8.0 (A100)", "CutlassInt8", "Triton"),
    ("int8-w8a8", "9.0 (H100, H20)", "CutlassInt8", "Triton"),
    ("int8-w8a8", "10.0 (B200)", INT8_ENDS, ""),
    ("fp8", "8.0 (A100)", "MarlinFP8", "Marlin"),
    ("fp8", "9.0 (H100, H20)", "CutlassFP8", "FlashInfer"),
    ("fp8", "10.0 (B200)", "down_proj, o_proj: FlashInferFP8; gate_up_proj, qkv_proj: CutlassFP8",
     "TrtLlmFp8ExpertsMonolithic"),
    ("gptq-int4", "8.0 (A100)", "Marlin", "Marlin"),
    ("gptq-int4", "9.0 (H100, H20)", "Machete", "HummingIndexed"),
    ("gptq-int4", "10.0 (B200)", "Marlin", "Marlin"),
]  # fmt: skip
# Network, scheme, GPUs; ranks; kernels of linear layers ("part: kernel" where parts differ); of experts.
ROWS = [
    ("Hunyuan-Large", "bf16", "8.0 (A100)", (8, 16), "torch", "Triton"),
    ("Hunyuan-Large", "bf16", "9.0 (H100, H20)", (8, 16), "torch", "Triton"),
    ("Hunyuan-Large", "bf16", "10.0 (B200)", (8, 16), "torch", "FlashInfer"),
    ("Hunyuan-Large", "int8", "8.0 (A100)", (8, 16), "Marlin", "Marlin"),
    ("Hunyuan-Large", "int8", "9.0 (H100, H20)", (8, 16), "Humming", "Marlin"),
    ("Hunyuan-Large", "int8", "10.0 (B200)", (8, 16), "Marlin", "Marlin"),
    ("Hunyuan-Large", "int8-w8a8", "8.0 (A100)", (8, 16), "CutlassInt8", "Triton"),
    ("Hunyuan-Large", "int8-w8a8", "9.0 (H100, H20)", (8, 16), "CutlassInt8", "Triton"),
    ("Hunyuan-Large", "int8-w8a8", "10.0 (B200)", (8, 16), INT8_ENDS, ""),
    ("Hunyuan-Large", "fp8", "8.0 (A100)", (8, 16), "MarlinFP8", "Marlin"),  # no FP8 arithmetic: FP8 weights alone
    ("Hunyuan-Large", "fp8", "9.0 (H100, H20)", (8, 16), "CutlassFP8", "FlashInfer"),
    ("Hunyuan-Large", "fp8", "10.0 (B200)", (8,),
     "down_proj, o_proj, q_proj: FlashInferFP8; gate_up_proj, qkv_proj: CutlassFP8", "FlashInfer"),
    ("Hunyuan-Large", "fp8", "10.0 (B200)", (16,),
     "down_proj, gate_up_proj, qkv_proj: CutlassFP8; o_proj, q_proj: FlashInferFP8", "FlashInfer"),
    *((network, scheme, gpu, (1, 2, 4, 8), linears, experts if network == "Hunyuan-A13B" else "")
      for network in ("Hunyuan-A13B", "Hunyuan-7B") for scheme, gpu, linears, experts in V1_ROWS),
]  # fmt: skip
CASES = [(*row[:3], ranks, *row[4:]) for row in ROWS for ranks in row[3]]


@pytest.mark.parametrize(("network", "scheme", "gpu", "ranks", "linears", "experts"), CASES)
def test_kernels(
    network: str, scheme: str, gpu: str, ranks: int, linears: str, experts: str, table: Callable[..., None]
) -> None:
    try:
        with built(NETWORKS[network], BY_CAPABILITY[gpu], scheme, tensor_parallel=ranks) as model:
            found = *linear_kernels(model), attention(model)
            assert all(parameter.numel() for parameter in model.parameters())
    except ValueError as error:
        assert linears.startswith("refused: ") and linears.removeprefix("refused: ") in str(error)
        table(network, scheme, gpu, ranks, linears)
        return
    table(network, scheme, gpu, ranks, *found)
    head_dim = NETWORKS[network].head_dim
    assert found == (linears, experts, "FlashInfer" if gpu[:2] == "10" and head_dim == 128 else "FlashAttention")


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("network", ["Hunyuan-Large", "Hunyuan-A13B"])
def test_expert_parallel(network: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank has whole experts, as many as it is due."""
    # For a line in the log 0.32 reads the values of the map, which tensors without memory have not.
    monkeypatch.setattr(ExpertMapManager, "get_compressed_map_string", lambda self: "")
    ranks, config = 8, NETWORKS[network]
    with built(config, (9, 0), scheme, tensor_parallel=ranks, enable_expert_parallel=True) as model:
        for experts in model.moe_layers:
            held = {name: parameter.shape for name, parameter in experts.routed_experts.named_parameters()}
            assert {shape[0] for shape in held.values()} == {config.num_experts // ranks}
            packed = 4 if scheme == "int8" else 1  # weights in a word
            assert held["w2_weight_packed" if scheme == "int8" else "w2_weight"][1:] == (
                config.hidden_size, config.intermediate_at(0) // packed,
            )  # fmt: skip


def linear_kernels(model: nn.Module) -> tuple[str, str]:
    """Those of linear layers, and those of experts."""
    by_kernel: dict[str, set[str]] = {}
    experts = set()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        owners = (getattr(module, "scheme", None), "kernel"), (method, "fp8_linear"), (method, "kernel")
        kernel = next(filter(None, (getattr(owner, name, None) for owner, name in owners)), None)
        if chosen := getattr(method, "experts_cls", None):
            experts.add(chosen.__name__.removesuffix("Experts"))
        elif name.endswith("_proj"):
            kind = "torch" if kernel is None else type(kernel).__name__
            for ending in ("LinearKernel", "ScaledMM"):
                kind = kind.removesuffix(ending)
            by_kernel.setdefault(kind, set()).add(name.rpartition(".")[2])
    if len(by_kernel) == 1:
        return next(iter(by_kernel)), ", ".join(sorted(experts))
    parts = sorted(f"{', '.join(sorted(names))}: {kind}" for kind, names in by_kernel.items())
    return "; ".join(parts), ", ".join(sorted(experts))


def attention(model: nn.Module) -> str:
    kinds = {type(module.impl).__name__.removesuffix("Impl") for module in model.modules() if hasattr(module, "impl")}
    return ", ".join(sorted(kinds))
