"""Int8 in the real engine, against a few lines of arithmetic on the reference model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ALPHA, RANK, adapter_pairs, write_adapter
from checkpoints import random_tensors, tiny_config, write_checkpoint
from engine import Scored, engine, greatest_difference, random_prompts, score
from golden_data import FLOAT32_TOLERANCE, Golden, answers_of, load_golden
from int8_reference import int8_answers, int8_model, write_int8
from torch import Tensor
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

from hunyuan_vllm.model import HunYuanForCausalLM
from hunyuan_vllm.native import operators
from hunyuan_vllm.quant.formats import PACKED, PLAIN
from hunyuan_vllm.quant.int8 import Int8Config
from hunyuan_vllm.quant.int8_layers import Int8LinearMethod

pytestmark = pytest.mark.engine

# With int8 activations, engine and reference agree to the last bits of float32 until one of them rounds a number that
# lies between two levels the other way; whatever follows such a token differs visibly. So what is compared is how many
# tokens agree, over many short prompts.
SHORT = random_prompts(320, [8] * 48)
AGREES = 0.8  # 0.89 to 0.99 of them do
SEEN = 0.01  # a mistake moves some log-probability by this at least


def agreement(results: list[Scored], answers: Golden) -> float:
    """The share of the prompts' tokens whose log-probability is the reference's."""
    ours = torch.tensor([result.prompt_logprobs for result in results])
    return ((ours - logprobs(answers)).abs() <= FLOAT32_TOLERANCE).float().mean().item()


def logprobs(answers: Golden) -> Tensor:
    """`[prompts, tokens]`."""
    return torch.tensor([item.prompt_logprobs for item in answers.items])


def stored(name: str, form: str | None, directory: Path) -> Path:
    """A golden checkpoint, quantised already if `form` says how."""
    source = load_golden(name).path
    return write_int8(source, directory / "int8", form) if form else source


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("cla2_top1", None),
        ("cla2_top2", PACKED),
        ("cla4_top1", None),
        ("nocla_tied", PACKED),
        ("cla2_dense", None),
        ("v1_a13b", None),
        ("v1_7b", PACKED),
    ],
)
def test_int8_of_golden_checkpoints(name: str, form: str | None, tmp_path: Path) -> None:
    golden = load_golden(name)
    prompts = [item.prompt for item in golden.items]
    quantization = None if form else "hunyuan_int8"  # a checkpoint that is quantised says so itself
    with engine(stored(name, form, tmp_path), quantization=quantization) as llm:
        results = score(llm, prompts, max_tokens=8)
    assert greatest_difference(results, int8_answers(golden.path, prompts)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("name", "form", "ranks"),
    [
        ("cla2_top2", None, 2),
        ("cla4_top1", PLAIN, 1),
        ("nocla_tied", None, 1),
        ("cla2_dense", None, 1),
        ("v1_a13b", None, 1),
        ("v1_7b", PLAIN, 1),
    ],
)
def test_w8a8_of_golden_checkpoints(name: str, form: str | None, ranks: int, tmp_path: Path) -> None:
    quantization = None if form else "hunyuan_int8_w8a8"
    with engine(stored(name, form, tmp_path), quantization=quantization, tensor_parallel_size=ranks) as llm:
        results = score(llm, SHORT)
    answers = int8_answers(load_golden(name).path, SHORT, 1, activations=True, ranks=ranks)
    assert agreement(results, answers) > AGREES


def joined(model: HunYuanForCausalLM) -> list[bool]:
    """Whether each layer's experts compute its shared MLP too."""
    return [layer.mlp.experts.routed_experts.quant_method.shared_mlp is not None for layer in model.model.layers]


@pytest.mark.parametrize(("activations", "ranks"), [(False, 1), (True, 2)], ids=["int8", "w8a8"])
def test_compiled_in_bfloat16(activations: bool, ranks: int, tmp_path: Path) -> None:
    """As it serves. Its rounding decides for one level or the other, so the reference in bfloat16 is as far off."""
    directory = write_checkpoint(tmp_path / "model", tiny_config(num_hidden_layers=2, hidden_size=256))
    reference = int8_model(directory, activations=activations, ranks=ranks)
    exact = logprobs(answers_of(reference, directory, SHORT, 1))
    inherent = (logprobs(answers_of(reference.bfloat16(), directory, SHORT, 1)) - exact).abs().mean()
    quantization = "hunyuan_int8_w8a8" if activations else "hunyuan_int8"
    options = {"dtype": "bfloat16", "quantization": quantization, "tensor_parallel_size": ranks}
    with engine(directory, enforce_eager=False, **options) as llm:
        if ranks == 1:
            assert llm.apply_model(joined) == [[operators.available()] * 2]
        ours = torch.tensor([result.prompt_logprobs for result in score(llm, SHORT)])
    assert (ours - exact).abs().mean() <= 1.2 * inherent


def test_biases_fused_spellings_and_mixed_layers(tmp_path: Path) -> None:
    config = tiny_config(attention_bias=True, num_experts=[4, 1, 3, 4], moe_topk=[2, 1, 2, 1])
    plain = write_checkpoint(tmp_path / "plain", config)
    spelled = write_checkpoint(tmp_path / "spelled", config, fused=True, stray=True)
    with engine(spelled, quantization="hunyuan_int8") as llm:
        results = score(llm, SHORT)
    assert greatest_difference(results, int8_answers(plain, SHORT, 1)) <= FLOAT32_TOLERANCE


def test_lora(tmp_path: Path) -> None:
    """An adapter's products are added to those with int8 weights."""
    config = tiny_config()
    directory = write_checkpoint(tmp_path / "model", config)
    pairs = adapter_pairs(config)
    merged = int8_model(directory)
    for name, (a, b) in pairs.items():
        merged.get_parameter(name).data += b @ a * (ALPHA / RANK)
    request = LoRARequest("adapter", 1, str(write_adapter(tmp_path / "adapter", pairs)))
    (prompt,) = random_prompts(config.vocab_size, [50])
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True, detokenize=False)
    with engine(directory, quantization="hunyuan_int8", enable_lora=True, max_lora_rank=8, max_loras=1) as llm:
        prompts = [TokensPrompt(prompt_token_ids=prompt)]
        (output,) = llm.generate(prompts, params, lora_request=request, use_tqdm=False)
    (answer,) = answers_of(merged, directory, [prompt], 8).items
    tokens = list(output.outputs[0].token_ids)
    logprobs = [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
    assert tokens == answer.greedy
    assert max(abs(a - b) for a, b in zip(logprobs, answer.greedy_logprobs, strict=True)) <= FLOAT32_TOLERANCE


# One engine that begins with dummy weights, and into which a checkpoint is loaded again and again: vLLM's own reload in
# place, soundly once and then each time with a mistake.

SQUARE = tiny_config(intermediate_size=128)  # a transposed expert keeps its shape
Load = Callable[[Int8Config, str, Tensor], Iterable[tuple[str, Tensor]]]


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Golden]]:
    """The engine, and what it should answer."""
    directory = write_checkpoint(tmp_path_factory.mktemp("square") / "model", SQUARE)
    with engine(directory, quantization="hunyuan_int8", load_format="dummy") as llm:
        yield llm, int8_answers(directory, SHORT, 1)


def difference_after_reload(square: tuple[LLM, Golden]) -> float:
    llm, answers = square
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": random_tensors(SQUARE, seed=0)})
    llm.reset_prefix_cache()
    return greatest_difference(score(llm, SHORT), answers)


def test_dummy_weights_and_reload_in_place(square: tuple[LLM, Golden]) -> None:
    llm, _ = square
    assert all(math.isfinite(logprob) for result in score(llm, SHORT) for logprob in result.prompt_logprobs)
    assert difference_after_reload(square) <= FLOAT32_TOLERANCE


def mistaken(monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Load, str, Tensor], Any]) -> None:
    """`mistake(load, name, tensor)` takes the place of `load(name, tensor)`."""
    load = Int8Config.load
    monkeypatch.setattr(Int8Config, "load", lambda self, name, tensor: mistake(partial(load, self), name, tensor))


def test_swapped_scales_of_gate_and_up(square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(load: Load, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        for loaded, value in load(name, tensor):
            if loaded.endswith("_scale") and ".experts." in loaded:
                one, other = ("gate_proj", "up_proj") if "gate_proj" in loaded else ("up_proj", "gate_proj")
                loaded = loaded.replace(one, other)
            yield loaded, value

    mistaken(monkeypatch, swapped)
    assert difference_after_reload(square) > SEEN


def test_transposed_experts(square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    mistaken(monkeypatch, lambda load, name, tensor: load(name, tensor.t() if ".experts." in name else tensor))
    assert difference_after_reload(square) > SEEN


def test_one_scale_for_a_whole_tensor(square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    def per_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = (weight.float().abs().amax() / 127).expand(len(weight), 1)
        return (weight / scale).round().to(torch.int8), scale

    monkeypatch.setattr("hunyuan_vllm.quant.int8.quantize_per_channel", per_tensor)
    assert difference_after_reload(square) > SEEN


def test_unquantised_cross_q_proj(square: tuple[LLM, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = square
    exact = {name: tensor.float() for name, tensor in random_tensors(SQUARE, seed=0) if name.endswith("q_proj.weight")}
    apply = Int8LinearMethod.apply

    def unquantised(self: Int8LinearMethod, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = exact.get(f"{layer.prefix}.weight")  # an owner's is called qkv_proj
        return apply(self, layer, x, bias) if weight is None else x @ weight.t()

    monkeypatch.setattr(Int8LinearMethod, "apply", unquantised)
    assert difference_after_reload(square) > SEEN
