"""What is refused before GPUs are rented; vLLM's own rules are asked where it has them."""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from checkpoints import published_json, tiny_config
from scenarios import planned, published
from vllm.config import ModelConfig
from vllm.config.parallel import ParallelConfig
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from hunyuan_vllm.plan.fit import check_fit, notes, problems
from hunyuan_vllm.plan.hardware import FLASHINFER_HEADS, backend_refusal, choose_backend, find_gpu, known_gpus
from hunyuan_vllm.plugin import register


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (dict(gpus=3, tensor=3), "tensor_parallel_size=3 does not divide this network .* use one of [1, 2, 4, 8, 16]"),
        (dict(gpus=8, tensor=16), "16 ranks (tensor 16 × pipeline 1) need 16 GPUs, and there are 8"),
        (dict(tensor=1, pipeline=33, gpus=64), "pipeline_parallel_size=33 would start .* use at most 32 stages"),
        (
            dict(gpus=8, tensor=8, dcp=2),
            "decode_context_parallel_size=2 is not possible with 8 ranks and 8 KV heads: use one of [1]",
        ),
        (dict(dcp=4), "decode_context_parallel_size=4 is not possible with 16 ranks and 8 KV heads: use one of [1, 2]"),
        (dict(max_model_len=262144), "--max-model-len 262144 is beyond .* use at most 131072"),
        (dict(gpu="V100"), "bf16 needs compute capability 8.0, and V100-32G has compute capability 7.0"),
        (dict(gpu="B200", scheme="int8-w8a8"), "int8-w8a8 kernels only below compute capability 10.0, and B200 has"),
        (
            dict(gpu="A100", kv="fp8"),
            "no attention backend .* FLASHINFER does not support head_dim 80; .*: use --kv auto",
        ),
        (dict(gpu="L20", kv="fp8", dcp=2), "no attention backend .* TRITON_ATTN cannot share a sequence's cache"),
    ],
)
def test_what_cannot_work(values: dict[str, Any], problem: str) -> None:
    found = problems(planned(**values))
    pieces = problem.split(".*")
    assert any(all(piece.strip() in text for piece in pieces) for text in found), found
    fit = check_fit(planned(**values))
    assert not fit.fits and fit.problems == found and not fit.budgets


@pytest.mark.parametrize("gpu", [gpu.name for gpu in known_gpus() if gpu.name != "V100-32G"])
def test_the_published_model_runs_on_every_gpu_from_ampere_on(gpu: str) -> None:
    for scheme in ("bf16", "int8", "fp8"):
        assert problems(planned(gpu, scheme=scheme)) == []


@pytest.mark.parametrize("heads", [(80, 8), (16, 2), (12, 4)])
def test_context_parallel_sizes_are_those_vllm_allows(heads: tuple[int, int], tmp_path: Path) -> None:
    queries, kv_heads = heads
    config = tiny_config(num_attention_heads=queries, num_key_value_heads=kv_heads, head_dim=8, intermediate_size=960)
    (tmp_path / "config.json").write_text(json.dumps(published_json(config)))
    register()
    model_config = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True)

    def allowed(tensor: int, dcp: int) -> bool:
        try:
            parallel = ParallelConfig(
                tensor_parallel_size=tensor, decode_context_parallel_size=dcp, distributed_executor_backend="mp"
            )
            model_config.verify_with_parallel_config(parallel)
        except ValueError:
            return False
        return True

    for tensor in (2, 4, 8, 16):
        if queries % tensor:
            continue
        for dcp in (1, 2, 3, 4, 8):
            scenario = planned(config=config, gpus=tensor, tensor=tensor, dcp=dcp)
            refused = any("decode_context_parallel_size" in problem for problem in problems(scenario))
            assert refused != allowed(tensor, dcp), (tensor, dcp)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 84, 96, 128, 256])
def test_head_sizes_are_those_of_vllms_backends(head_dim: int) -> None:
    for name, backend in (("FLASH_ATTN", FlashAttentionBackend), ("TRITON_ATTN", TritonAttentionBackend)):
        ours = backend_refusal(name, (9, 0), head_dim, False, 1)
        assert (ours is None) == backend.supports_head_size(head_dim)


def test_flashinfers_head_sizes_are_vllms() -> None:
    """Read from its source: it does not import without FlashInfer."""
    spec = find_spec("vllm.v1.attention.backends.flashinfer")
    assert spec is not None and spec.origin is not None
    functions = [
        node
        for node in ast.walk(ast.parse(Path(spec.origin).read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes"
    ]
    (returned,) = [node for node in ast.walk(functions[0]) if isinstance(node, ast.Return)]
    assert returned.value is not None and tuple(ast.literal_eval(returned.value)) == FLASHINFER_HEADS


def test_who_shares_a_sequence_between_ranks() -> None:
    for backend in (FlashAttentionBackend, TritonAttentionBackend, FlexAttentionBackend):
        refused = backend_refusal(backend.get_name(), (9, 0), 128, False, 2)
        assert (refused is None) == backend.supports_dcp()


@pytest.mark.parametrize(
    ("gpu", "fp8_cache", "dcp", "backend"),
    [
        ("H100", False, 1, "FLASH_ATTN"),
        ("H20", True, 2, "FLASH_ATTN"),
        ("A100", False, 2, "FLASH_ATTN"),
        ("A100", True, 1, None),
        ("L40S", True, 1, "TRITON_ATTN"),
        ("L40S", True, 2, None),
        ("B200", True, 2, "FLASH_ATTN"),
    ],
)
def test_the_backend_for_head_dim_80(gpu: str, fp8_cache: bool, dcp: int, backend: str | None) -> None:
    assert choose_backend(find_gpu(gpu).capability, 80, fp8_cache, dcp)[0] == backend


def test_a_head_size_that_flashinfer_has_helps_an_a100() -> None:
    assert choose_backend(find_gpu("A100").capability, 128, True, 1)[0] == "FLASHINFER"


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (dict(gpus=3, tensor=1, pipeline=3), "would start a stage at layer 21, .* VLLM_PP_LAYER_PARTITION=22,22,20"),
        (dict(gpus=12, tensor=8), "4 of 12 GPUs stay idle"),
        (dict(gpus=16, tensor=8), "2 engines of 8 GPUs each"),
        (dict(), "each of the 8 KV heads is on 2 of 16 ranks: --dcp 2"),
        (dict(), "span 2 nodes"),
        (dict(gpu="B200", gpus=8, tensor=8), "attention runs on FLASH_ATTN: FLASHINFER does not support head_dim 80"),
        (dict(gpu="A100", scheme="fp8"), "A100-80G has no FP8 units"),
        (
            dict(gpus=8, tensor=8, scheme="int8"),
            "kernels pad matrices with [800, 2288] columns per rank to Marlin's tiles",
        ),
        (dict(scheme="fp8"), "kernels pad matrices with [1144] columns per rank to multiples of 16"),
    ],
)
def test_notes(values: dict[str, Any], note: str) -> None:
    found = notes(planned(**values))
    assert any(all(piece.strip() in text for piece in note.split(".*")) for text in found), found


def test_nothing_to_note_about_a_plain_set_up() -> None:
    assert notes(planned("H100", gpus=8, tensor=8)) == []
    assert published().head_dim == 80
