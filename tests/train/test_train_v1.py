"""Fine-tuning Hunyuan V1: gradients against transformers' own classes, and results in the source's spelling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked_runs import Run, flags, train
from golden_data import FLOAT32_TOLERANCE, GOLDEN, reference_answers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hunyuan_vllm import demo
from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Layout
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.train.merge import SAVE_DTYPES, Adapter, Merge

KINDS = {"A13B": "v1_a13b", "A13B by transformers": "v1_moe_tf", "7B": "v1_7b", "1.8B by transformers": "v1_1_8b"}


def separate_experts(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' names and fused experts as the published names."""
    separate = {}
    for name, gradient in gradients.items():
        prefix, _, last = name.rpartition(".experts.")
        if last == "gate_up_proj":
            for expert, both in enumerate(gradient):
                gate, up = both.chunk(2)
                separate[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                separate[f"{prefix}.experts.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            separate |= {f"{prefix}.experts.{e}.down_proj.weight": one for e, one in enumerate(gradient)}
        else:
            separate[name] = gradient
    return separate


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    logits = model.train()(tokens).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["v1_moe_tf", "v1_7b", "v1_1_8b"])
def test_gradients_equal_those_of_transformers(name: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, dtype=torch.float32, attn_implementation="eager", attention_dropout=0
    )
    ours = HunYuanForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    tokens = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    expected, found = separate_experts(gradients(theirs, tokens)), gradients(ours, tokens)
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[parameter], rtol=1e-3, atol=2e-6, msg=lambda m, p=parameter: p + m
        )


def make_base(directory: Path, golden: str) -> Path:
    """A random network whose config is a golden's file, with the demo model's tokenizer."""
    fields = json.loads((GOLDEN / golden / "config.json").read_text())
    fields |= dict(vocab_size=2048, bos_token_id=1801, eos_token_id=1803, pad_token_id=1804)
    torch.manual_seed(0)
    HunYuanForCausalLM(HunYuanConfig(**fields)).bfloat16().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(fields))
    for name in ("hy.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(Path(demo.__file__).with_name(name), directory)
    return directory


def assert_served_as(directory: Path, base: Path) -> None:
    """A checkpoint of the base's network, in the base's spelling."""
    written, expected = (json.loads((one / "config.json").read_text()) for one in (directory, base))
    assert written | {"auto_map": None} == expected | {"auto_map": None}
    config = HunYuanConfig.from_pretrained(directory)
    assert check_headers(directory, Layout(config))
    assert config.is_v1


def run(base: Path, output: Path, *more: str) -> Run:
    command = flags(base, output, "--max_steps", "3", "--save_steps", "3", *more, rows=2)
    return train(command, output.with_name("log"))


@pytest.mark.slow
@pytest.mark.parametrize("golden", KINDS.values(), ids=KINDS)
class TestRuns:
    def test_full(self, golden: str, tmp_path: Path) -> None:
        base = make_base(tmp_path / "base", golden)
        done = run(base, tmp_path / "out")
        assert done.statuses == [0], done.said
        assert_served_as(tmp_path / "out" / "final", base)
        resumed = run(base, tmp_path / "out", "--resume_from_checkpoint", "last", "--max_steps", "4")
        assert resumed.statuses == [0], resumed.said

    def test_lora_and_its_merge(self, golden: str, tmp_path: Path) -> None:
        base = make_base(tmp_path / "base", golden)
        done = run(base, tmp_path / "out", "--use_lora", "--lora_rank", "4", "--lora_alpha", "8", "--bf16",
                   "--packing", "--max_seq_length", "600")  # fmt: skip
        assert done.statuses == [0], done.said
        source = Source(base)
        adapter = Adapter(tmp_path / "out" / "final", source.config)
        assert len(adapter.changes) == 4 * source.config.num_hidden_layers  # no layer shares K and V
        Merge(source, adapter, tmp_path / "merged", SAVE_DTYPES["bf16"]).run()
        assert_served_as(tmp_path / "merged", base)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("golden", ["v1_a13b", "v1_7b"])
def test_a_trained_checkpoint_is_served(golden: str, tmp_path: Path) -> None:
    done = run(make_base(tmp_path / "base", golden), tmp_path / "out")
    assert done.statuses == [0], done.said
    result = tmp_path / "out" / "final"
    from engine import engine, greatest_difference, random_prompts, score  # vLLM, which is not to be forked

    expected = reference_answers(result, random_prompts(2048, (5, 40)))
    with engine(result) as llm:
        found = score(llm, [item.prompt for item in expected.items], max_tokens=24)
    assert greatest_difference(found, expected) <= FLOAT32_TOLERANCE
