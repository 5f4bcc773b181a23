"""What FP8 checkpoints and caches should compute, in a few lines on the reference model, without the package's code.

E4M3 is written out here as arithmetic: nothing is cast to an 8-bit type except to be stored.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from checkpoints import rewrite
from golden_data import Golden, answers_of
from safetensors.torch import load_file
from torch import Tensor, nn

from hunyuan_vllm.reference import HunYuanForCausalLM

__all__ = ["e4m3", "fp8_answers", "fp8_model", "round_cache", "write_fp8"]


def e4m3(x: Tensor) -> Tensor:
    """The nearest number with 3 bits behind the leading one, an exponent of -6 at least, and no more than 448."""
    _, exponent = torch.frexp(x)  # x = m · 2^exponent, 1/2 ≤ |m| < 1
    step = torch.exp2((exponent - 4).clamp_min(-9).float())
    return ((x / step).round() * step).clamp(-448, 448)


def rounded(x: Tensor, scale: Tensor | float) -> Tensor:
    return e4m3(x / scale) * scale


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith("_proj")}


def write_fp8(
    source: Path,
    directory: Path,
    prompts: Sequence[list[int]],
    *,
    ignored: Sequence[str] = (),
    clip: float = 0.5,
    change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
) -> Path:
    """Write the FP8 form of a checkpoint, each tensor with its own scale.

    Args:
        prompts: what the inputs' greatest values are measured on.
        ignored: linears that stay as they are.
        clip: input scales are this part of what nothing would saturate at, so that saturation shows.
        change: applied to the tensors at the end.
    """
    model = HunYuanForCausalLM.from_pretrained(source, dtype=torch.float32)
    greatest: dict[str, float] = defaultdict(float)
    for name, linear in projections(model).items():

        def watch(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            greatest[name] = max(greatest[name], inputs[0].abs().max().item() if inputs[0].numel() else 0.0)

        linear.register_forward_pre_hook(watch)
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.tensor([prompt]))

    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in projections(model):
            if name in ignored:
                continue
            weight = tensors[f"{name}.weight"].float()
            scale = weight.abs().max() / 448
            tensors[f"{name}.weight"] = e4m3(weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = scale
            tensors[f"{name}.input_scale"] = torch.tensor(clip * (greatest[name] or 1.0) / 448)
        change(tensors)

    directory.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (directory / file.name).write_bytes(file.read_bytes())
    rewrite(directory, quantise)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", *ignored],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def fp8_model(source: Path, directory: Path) -> HunYuanForCausalLM:
    """The reference model with the weights that `directory`'s stand for, and inputs rounded as GPU kernels do.

    Args:
        source: the checkpoint that `directory` was made from.
    """
    model = HunYuanForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = load_file(directory / "model.safetensors")
    inputs = {name: tensors[f"{name}.input_scale"] for name in projections(model) if f"{name}.input_scale" in tensors}
    for name, linear in projections(model).items():
        if name not in inputs:
            continue
        linear.weight.data = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        scale = torch.stack([inputs[other] for other in inputs if _one_input(name, other)]).max()
        if ".experts." in name and name.endswith("down_proj"):
            # One scale for all experts' inner activations, each counted in its gate's scale rather than its up's.
            ratios = {other: _up_to_gate(tensors, other) for other in inputs if _one_input(name, other)}
            scale = torch.stack([inputs[other] / ratio for other, ratio in ratios.items()]).max() * ratios[name]
        linear.register_forward_pre_hook(lambda _, args, scale=scale: rounded(args[0], scale))
    return model


def _one_input(name: str, other: str) -> bool:
    """Whether two linears share the scale of their inputs: fused ones, and the same of all experts of a layer."""

    def kind(linear: str) -> tuple[str, str]:
        module, _, projection = linear.rpartition(".")
        if ".experts." in module:
            module = module.rpartition(".")[0]
        return module, "in" if projection[0] in "qkvgu" else projection

    return kind(name) == kind(other)


def _up_to_gate(tensors: dict[str, Tensor], down_proj: str) -> Tensor:
    expert = down_proj.rpartition(".")[0]
    return tensors[f"{expert}.up_proj.weight_scale"] / tensors[f"{expert}.gate_proj.weight_scale"]


def round_cache(model: HunYuanForCausalLM, scales: Mapping[str, Tensor]) -> None:
    """Round what a cache holds, K and V, before any layer uses them.

    Args:
        scales: by the names they have in a checkpoint; of owners alone, of V alone where keys are normalised. Else 1.
    """
    one = torch.tensor(1.0)
    for number, layer in enumerate(model.model.layers):
        attn, owner = layer.self_attn, f"model.layers.{model.config.kv_owner(number)}.self_attn."
        bound = torch.tensor(model.config.head_dim**0.5 / 448)
        scale = bound if model.config.use_qk_norm else scales.get(f"{owner}k_scale", one)
        attn.key_layernorm = _RoundedKey(attn.key_layernorm, scale)
        if not attn.is_cross:
            scale = scales.get(f"{owner}v_scale", one)
            attn.v_proj.register_forward_hook(lambda _, __, v, scale=scale: rounded(v, scale))


class _RoundedKey(nn.Module):
    def __init__(self, norm: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, k: Tensor) -> Tensor:
        if isinstance(self.norm, nn.Identity):
            return rounded(k, self.scale)
        unit = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + self.norm.eps)
        return rounded(unit, self.scale) * self.norm.weight


def fp8_answers(
    source: Path, directory: Path, prompts: Sequence[list[int]], max_new_tokens: int = 1, cache: bool = False
) -> Golden:
    """The answers of `fp8_model`; with `cache`, of its FP8 cache too."""
    model = fp8_model(source, directory)
    if cache:
        round_cache(model, load_file(directory / "model.safetensors"))
    return answers_of(model, directory, prompts, max_new_tokens)
