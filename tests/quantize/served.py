"""What a converted checkpoint should compute, in a few lines on the reference model, without the package's own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.reference import HunYuanForCausalLM

__all__ = ["served"]


def served(directory: Path, fp8_cache: bool = False) -> HunYuanForCausalLM:
    """A converted checkpoint in float32: its weights as they are stored, inputs rounded as kernels round them, and with
    `fp8_cache` what its cache holds rounded by its scales too."""
    config = HunYuanConfig.from_pretrained(directory)
    scheme = config.quantization_config
    del config.quantization_config
    tensors = load_file(directory / "model.safetensors")
    model = HunYuanForCausalLM(config).float().eval()
    model.load_state_dict({n: t.float() for n, t in tensors.items() if not n.endswith("_scale")}, strict=False)
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or not name.endswith("_proj"):
            continue
        scale = tensors[f"{name}.weight_scale"]
        if f"{name}.weight_packed" in tensors:
            linear.weight.data = (tensors[f"{name}.weight_packed"].view(torch.uint8).float() - 128) * scale
            continue
        linear.weight.data = tensors[f"{name}.weight"].float() * scale
        if scheme["quant_method"] == "fp8":
            linear.register_forward_pre_hook(round_to_fp8(tensors[f"{name}.input_scale"]))
        else:
            linear.register_forward_pre_hook(round_to_int8)
    if config.tie_word_embeddings:
        model.lm_head.weight.data = tensors["model.embed_tokens.weight"].float()
    if fp8_cache:
        round_cache(model, tensors)
    return model


def round_cache(model: HunYuanForCausalLM, tensors: dict[str, Tensor]) -> None:
    for number, layer in enumerate(model.model.layers):
        owner = f"model.layers.{model.config.kv_owner(number)}.self_attn"
        layer.self_attn.key_layernorm = RoundedKey(layer.self_attn.key_layernorm, tensors[f"{owner}.k_scale"])
        if not layer.self_attn.is_cross:
            round_value = round_to_fp8(tensors[f"{owner}.v_scale"])
            layer.self_attn.v_proj.register_forward_hook(lambda _, __, v, each=round_value: each(_, (v,)))


class RoundedKey(nn.Module):
    """The cache holds keys before the norm's weight."""

    def __init__(self, norm: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.norm, self.round = norm, round_to_fp8(scale)

    def forward(self, k: Tensor) -> Tensor:
        unit = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + self.norm.eps)
        return self.round(None, (unit,)) * self.norm.weight


def round_to_fp8(scale: Tensor) -> Callable:
    return lambda _, given: (given[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def round_to_int8(_: nn.Module, given: tuple[Tensor]) -> Tensor:
    step = given[0].abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (given[0] / step).round() * step
