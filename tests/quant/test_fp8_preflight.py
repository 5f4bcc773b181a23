"""FP8 checkpoints and caches that cannot work are refused while vLLM reads its options: no engine is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from vllm.engine.arg_utils import EngineArgs

from hunyuan_vllm.plugin import register

STATIC = {"quant_method": "fp8", "activation_scheme": "static"}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    register()


def configured(directory: Path, described: dict[str, Any] | None = None, *, network: Any = None, **options: Any) -> Any:
    """vLLM's configuration for a checkpoint, which is unquantised whatever its config says."""
    write_checkpoint(directory, network or tiny_config())
    fields = json.loads((directory / "config.json").read_text())
    if described:
        fields["quantization_config"] = described
    (directory / "config.json").write_text(json.dumps(fields))
    return EngineArgs(model=str(directory), skip_tokenizer_init=True, **options).create_engine_config()


@pytest.mark.parametrize(
    ("described", "options", "message"),
    [
        (
            STATIC | {"activation_scheme": "dynamic"},
            {},
            "activations scaled while computing: vLLM loads it on GPUs only; for a CPU, convert",
        ),
        (
            STATIC | {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
            {},
            "outputs of k_proj, and the checkpoint (FP8 weights, a scale for each block of 128 × 128) keeps",
        ),
        (STATIC, {}, "down_proj.weight' is BF16 where config.json promises F8_E4M3"),
        (
            None,
            dict(quantization="hunyuan_fp8"),
            "needs an FP8 checkpoint, and this one is not quantised: make one with",
        ),
        (
            None,
            dict(kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=["2"]),
            "gives layer 3 another cache type than layer 2, whose cache it reads",
        ),
    ],
    ids=["dynamic", "block", "bf16", "asked_for", "skipped_owner"],
)
def test_refused(described: dict | None, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        configured(tmp_path / "model", described, **options)
    assert message in str(raised.value)


def test_a_whole_group_may_keep_a_wide_cache(tmp_path: Path) -> None:
    configured(tmp_path / "model", kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=["2", "3"])


@pytest.mark.parametrize(("head_dim", "works"), [(32, True), (64, True), (80, False), (112, False), (128, True)])
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_head_sizes_of_fp8_caches_on_cpus(head_dim: int, works: bool, dtype: str, tmp_path: Path) -> None:
    network = tiny_config(head_dim=head_dim)
    if works:
        configured(tmp_path / "model", network=network, kv_cache_dtype=dtype)
        return
    with pytest.raises(
        ValueError, match=rf"kv_cache_dtype='{dtype}': .* network's is {head_dim}: use kv_cache_dtype='auto'"
    ):
        configured(tmp_path / "model", network=network, kv_cache_dtype=dtype)


def test_cpus_without_avx512(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ValueError, match="needs a CPU with AVX-512, and this one has none"):
        configured(tmp_path / "model", kv_cache_dtype="fp8")
