"""CPU forms, in torch, of the few operators between vLLM's Triton kernels: the wheel for CUDA has none."""

import torch
from torch import Tensor
from vllm.platforms import current_platform

E4M3 = torch.float8_e4m3fn
_libraries: list[torch.library.Library] = []


def register() -> None:
    """Make them known to torch, once."""
    if _libraries:
        return
    current_platform.import_kernels()
    for namespace, operators in (
        ("_C", (silu_and_mul, static_scaled_fp8_quant, dynamic_scaled_int8_quant)),
        ("_moe_C", (moe_align_block_size, moe_sum)),
    ):
        library = torch.library.Library(namespace, "IMPL")
        for operator in operators:
            library.impl(operator.__name__, operator, "CPU")
        _libraries.append(library)


def silu_and_mul(result: Tensor, input: Tensor) -> None:
    gate, up = input.float().chunk(2, dim=-1)
    result.copy_(torch.nn.functional.silu(gate) * up)


def static_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor, group_shape: list[int] | None = None) -> None:
    limit = torch.finfo(E4M3).max
    result.copy_((input.float() / scale).clamp(-limit, limit).to(E4M3))


def dynamic_scaled_int8_quant(result: Tensor, input: Tensor, scale: Tensor, azp: Tensor | None) -> None:
    scale.copy_(input.float().abs().amax(dim=-1, keepdim=True) / 127)
    result.copy_((input.float() / scale).round())


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    expert_map: Tensor | None = None,
    scatter_idx: Tensor | None = None,
) -> None:
    """Rows by expert; each expert's are filled up to whole blocks with a row that does not exist."""
    ids = topk_ids.flatten()
    sorted_token_ids.fill_(len(ids))
    block = 0
    for expert in range(num_experts):
        rows = (ids == expert).nonzero().flatten()
        blocks = -(-len(rows) // block_size)
        sorted_token_ids[block * block_size :][: len(rows)] = rows
        experts_ids[block : block + blocks] = expert
        block += blocks
    num_tokens_post_pad.fill_(block * block_size)


def moe_sum(input: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    output.copy_(input.float().sum(dim=1))
