"""FP8 weights, activations and caches in the real engine, against a few lines of arithmetic on the reference model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from engine import FP8_CACHE, Scored, engine, needs_fp8_cache, random_prompts, score
from fp8_reference import fp8_answers, write_fp8
from golden_data import FLOAT32_TOLERANCE, Golden, load_golden, reference_answers
from torch import Tensor
from torch.nn.functional import linear
from vllm import LLM

from hunyuan_vllm import cla_cache
from hunyuan_vllm.cla_cache import CLAAttention, _set_scale
from hunyuan_vllm.quant import cpu_fp8
from hunyuan_vllm.quant.fp8 import HunYuanFp8Config
from hunyuan_vllm.quant.fp8_layers import CPUFp8LinearMethod

pytestmark = pytest.mark.engine

# Engine and reference agree to the last bits of float32, until one of them rounds a number that lies between two E4M3
# values the other way, which happens about once in 10⁵; whatever follows such a token then differs visibly. So what is
# compared is how many tokens agree, over many short prompts: 93 to 99% of them do, and none to 5% with a mistake.
PROMPTS = random_prompts(320, [8] * 48)
AGREES = 0.85
MISTAKEN = 0.25


def agreement(results: list[Scored], answers: Golden) -> float:
    """The share of the prompts' tokens whose log-probability is the reference's."""
    ours = torch.tensor([result.prompt_logprobs for result in results])
    return ((ours - logprobs(answers)).abs() <= FLOAT32_TOLERANCE).float().mean().item()


def logprobs(answers: Golden) -> Tensor:
    """`[prompts, tokens]`."""
    return torch.tensor([item.prompt_logprobs for item in answers.items])


def check(source: Path, directory: Path, cache: bool, **options) -> None:
    """`cache`: with an FP8 cache too, where the CPU has one."""
    cache = cache and FP8_CACHE
    answers = fp8_answers(source, directory, PROMPTS, cache=cache)
    with engine(directory, kv_cache_dtype="fp8" if cache else "auto", **options) as llm:
        assert agreement(score(llm, PROMPTS), answers) > AGREES


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("cla2_top1", False),
        ("cla2_dense", False),
        ("cla2_top2", True),
        ("cla4_top1", True),
        ("nocla_tied", True),
    ],
)
def test_golden_checkpoints(name: str, cache: bool, tmp_path: Path) -> None:
    source = load_golden(name).path
    check(source, write_fp8(source, tmp_path / "fp8", PROMPTS), cache)


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"enforce_eager": False}], ids=["ranks", "compiled"])
def test_two_ranks_and_compiled(options: dict, tmp_path: Path) -> None:
    """Row-parallel ranks round their shares with the same scales, and the compiler rounds no less than we do."""
    source = load_golden("cla2_top2").path
    check(source, write_fp8(source, tmp_path / "fp8", PROMPTS), True, **options)


def test_biases_ignored_layers_and_keys_without_a_norm(tmp_path: Path) -> None:
    config = tiny_config(
        use_qk_norm=False, attention_bias=True, mlp_bias=True, num_shared_expert=2, num_experts=[4, 1, 3, 4], moe_topk=2
    )
    source = write_checkpoint(tmp_path / "source", config)

    def add_scales(tensors: dict[str, Tensor]) -> None:
        for owner in (0, 2):
            tensors[f"model.layers.{owner}.self_attn.k_scale"] = torch.tensor(0.011 + owner / 1000)
            tensors[f"model.layers.{owner}.self_attn.v_scale"] = torch.tensor(0.007 + owner / 1000)

    ignored = ["model.layers.1.self_attn.o_proj", "model.layers.2.mlp.shared_mlp.down_proj"]
    ignored += [f"model.layers.3.mlp.experts.{e}.{part}_proj" for e in range(4) for part in ("gate", "up", "down")]
    directory = write_fp8(source, tmp_path / "fp8", PROMPTS, ignored=ignored, change=add_scales)
    check(source, directory, True)


def test_bfloat16(tmp_path: Path) -> None:
    """Its own rounding decides ties in every layer; still it is nearer to FP8's exact answers than to unquantised
    ones."""
    source = load_golden("cla2_top1").path
    directory = write_fp8(source, tmp_path / "fp8", PROMPTS)
    fp8, unquantised = (
        logprobs(fp8_answers(source, directory, PROMPTS)),
        logprobs(reference_answers(source, PROMPTS, 1)),
    )
    with engine(directory, dtype="bfloat16") as llm:
        ours = torch.tensor([result.prompt_logprobs for result in score(llm, PROMPTS)])
    assert (ours - fp8).abs().mean() < 0.5 * (unquantised - fp8).abs().mean()


# One engine into which the same checkpoint is loaded again and again, each time with a mistake.

SQUARE = tiny_config(intermediate_size=128)  # a transposed expert keeps its shape
Load = Callable[[HunYuanFp8Config, str, Tensor], Iterable[tuple[str, Tensor]]]


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Golden]]:
    """The engine, and what it should answer. Every layer has KV scales, of which only owners' V scales count."""
    directory = tmp_path_factory.mktemp("square")
    source = write_checkpoint(directory / "source", SQUARE)

    def add_scales(tensors: dict[str, Tensor]) -> None:
        for layer in range(4):
            tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(1.0)
            tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([0.007, 0.03, 0.011, 0.05][layer])

    fp8 = write_fp8(source, directory / "fp8", PROMPTS, change=add_scales)
    with engine(fp8, kv_cache_dtype="fp8" if FP8_CACHE else "auto") as llm:
        yield llm, fp8_answers(source, fp8, PROMPTS, cache=FP8_CACHE)


def agreement_after_reload(square: tuple[LLM, Golden]) -> float:
    llm, answers = square
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    return agreement(score(llm, PROMPTS), answers)


def test_no_mistake(square: tuple[LLM, Golden]) -> None:
    llm, answers = square
    assert agreement(score(llm, PROMPTS), answers) > AGREES
    assert agreement_after_reload(square) > AGREES


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (".weight_scale", ".input_scale"),
        (".gate_proj.weight_scale", ".up_proj.weight_scale"),
        (".gate_proj.weight_scale", ".down_proj.weight_scale"),
        (".up_proj.input_scale", ".down_proj.input_scale"),
    ],
    ids=["weight_input", "gate_up", "w1_w2", "inputs_of_w1_w2"],
)
def test_swapped_scales(one: str, other: str, square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    load = HunYuanFp8Config.load
    swap = {one: other, other: one}

    def swapped(self: HunYuanFp8Config, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        for end, instead in swap.items():
            if name.endswith(end):
                return load(self, name.removesuffix(end) + instead, tensor)
        return load(self, name, tensor)

    monkeypatch.setattr(HunYuanFp8Config, "load", swapped)
    assert agreement_after_reload(square) < MISTAKEN


def test_transposed_experts(square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    load = HunYuanFp8Config.load

    def transposed(self: HunYuanFp8Config, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        return load(self, name, tensor.t() if ".experts." in name and tensor.dim() == 2 else tensor)

    monkeypatch.setattr(HunYuanFp8Config, "load", transposed)
    assert agreement_after_reload(square) < MISTAKEN


@needs_fp8_cache
def test_reader_with_its_own_scale(square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    process = CLAAttention.process_weights_after_loading

    def own(self: CLAAttention, act_dtype: torch.dtype) -> None:
        process(self, act_dtype)
        if self.kv_sharing_target_layer_name:
            _set_scale(self, "v", self.quant_config.cache_scales.v(self.group_owner + 1))

    monkeypatch.setattr(CLAAttention, "process_weights_after_loading", own)
    assert agreement_after_reload(square) < MISTAKEN


@needs_fp8_cache
def test_the_checkpoints_scale_used_for_normalised_keys(
    square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hunyuan_vllm.cla_cache.normalised_key_scale", lambda head_dim: 1.0)
    assert agreement_after_reload(square) < MISTAKEN


def test_unquantised_cross_q_proj(square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    apply = CPUFp8LinearMethod.apply

    def exact(self: CPUFp8LinearMethod, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if layer.prefix.endswith(".q_proj"):
            return linear(x, layer.weight) * layer.weight_scale
        return apply(self, layer, x, bias)

    monkeypatch.setattr(CPUFp8LinearMethod, "apply", exact)
    assert agreement_after_reload(square) < MISTAKEN


def test_no_saturation(square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    """Input scales are half of what would fit, so that some inputs are beyond 448."""
    quantize = cpu_fp8.quantize_per_tensor

    def unbounded(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = quantize(x, scale)
        return torch.where((x / scale).abs() > 448, x / scale, values.float()), scale

    monkeypatch.setattr(cpu_fp8, "quantize_per_tensor", unbounded)
    assert agreement_after_reload(square) < MISTAKEN


@needs_fp8_cache
def test_cache_without_rounding_to_nearest(square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's CPU kernel does by itself."""
    monkeypatch.setattr(cla_cache, "to_be_truncated", lambda x, scale: x)
    assert agreement_after_reload(square) < MISTAKEN


def test_a_scale_that_is_none_is_named_while_loading(tmp_path: Path) -> None:
    source = load_golden("cla2_top1").path
    name = "model.layers.2.mlp.experts.1.up_proj.weight_scale"
    directory = write_fp8(
        source, tmp_path / "fp8", PROMPTS, change=lambda tensors: tensors.update({name: -tensors[name]})
    )
    with pytest.raises(ValueError, match=f"'{name}' is -.*: a scale is a positive number"), engine(directory):
        pass
