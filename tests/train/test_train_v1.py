"""Fine-tuning Hunyuan V1: gradients against transformers' own classes, and results in the source's spelling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked_runs import Run, flags, log_of, train
from golden_data import FLOAT32_TOLERANCE, GOLDEN, reference_answers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hunyuan_vllm import demo
from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.cli import app
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Layout
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.tokenizer import load_tokenizer
from hunyuan_vllm.train.merge import SAVE_DTYPES, Adapter, Merge
from hunyuan_vllm.train.messages import Conversation
from hunyuan_vllm.train.tokens import IGNORED, encode

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


def make_base(directory: Path, golden: str, dtype: str = "bfloat16") -> Path:
    """A random network whose config is a golden's file, with the demo model's tokenizer."""
    fields = json.loads((GOLDEN / golden / "config.json").read_text())
    fields |= dict(vocab_size=2048, bos_token_id=1801, eos_token_id=1803, pad_token_id=1804)
    fields |= {name: dtype for name in ("torch_dtype", "dtype") if name in fields}
    torch.manual_seed(0)
    HunYuanForCausalLM(HunYuanConfig(**fields)).to(getattr(torch, dtype)).save_pretrained(directory)
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


# What Hunyuan-A13B's train.sh gives beside the paths and the number of steps.
PUBLISHED = """--do_train --overwrite_output_dir --per_device_train_batch_size 1 --gradient_accumulation_steps 1
    --gradient_checkpointing --lr_scheduler_type cosine_with_min_lr --logging_steps 1 --learning_rate 1e-3 --min_lr 1e-4
    --warmup_ratio 0.01 --save_strategy steps --save_safetensors False --hidden_size 4096 --intermediate_size 3072
    --model_max_length 4096 --max_seq_length 4096 --moe_topk 8 --num_experts 64 --num_attention_heads 32
    --num_key_value_heads 8 --num_layers 32 --cla_share_factor 2 --use_mixed_mlp_moe --num_shared_expert 1
    --use_qk_norm""".split()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(("golden", "lora"), [("v1_a13b", True), ("v1_7b", False)], ids=["A13B, LoRA", "7B, full"])
def test_the_engine_has_the_loss_of_training(golden: str, lora: bool, tmp_path: Path) -> None:
    """By the published command, merged if it is an adapter, on a conversation that was held out."""
    base, result, held_out = make_base(tmp_path / "base", golden, "float32"), tmp_path / "final", tmp_path / "x.jsonl"
    conversation = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good morning!"}]}
    held_out.write_text(json.dumps(conversation) + "\n")
    more = ["--use_lora", "--lora_rank", "64", "--lora_alpha", "128", "--lora_dropout", "0.1"] if lora else []
    done = run(base, tmp_path / "out", *PUBLISHED, "--eval_data_file", str(held_out), *more)
    assert done.statuses == [0], done.said
    assert "--num_shared_expert, --use_cla" not in done.said and "changes nothing: the checkpoint sets" in done.said
    if lora:
        merge = ["merge-lora", "--base_model_path", base, "--adapter_model_path", tmp_path / "out" / "final"]
        merged = CliRunner().invoke(app, [*map(str, merge), "--output_path", str(result), "--save_dtype", "fp32"])
        assert merged.exit_code == 0, merged.output
    else:
        result = tmp_path / "out" / "final"

    example = encode(Conversation(**conversation), load_tokenizer(result), default_system="")
    learned = torch.tensor([label != IGNORED for label in example.labels[1:]])
    from engine import engine, greatest_difference, random_prompts, score  # vLLM, which is not to be forked

    expected = reference_answers(result, [*random_prompts(2048, (5, 40)), example.input_ids])
    with engine(result) as llm:
        found = score(llm, [item.prompt for item in expected.items], max_tokens=24)
    assert greatest_difference(found, expected) <= FLOAT32_TOLERANCE
    loss = -torch.tensor(found[-1].prompt_logprobs)[learned].mean().item()
    assert log_of(tmp_path / "out", 3, "eval_loss") == [pytest.approx(loss, abs=FLOAT32_TOLERANCE)]
