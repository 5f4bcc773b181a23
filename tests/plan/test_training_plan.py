"""The training planner against what PyTorch and PEFT hold, and against the published minima."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from checkpoints import tiny_config
from typer.testing import CliRunner

from hunyuan_vllm.adapter import ATTENTION
from hunyuan_vllm.cli import app
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.plan import training
from hunyuan_vllm.plan.hardware import find_gpu
from hunyuan_vllm.plan.model import open_planned
from hunyuan_vllm.plan.training import Parameters, TrainingMemory, TrainingSetup, fewest
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.text import GIB

TOKENS = 64
SHAPES: dict[str, dict[str, Any]] = {
    "published shape": {},
    "without CLA": {"use_cla": False},
    "CLA over three": {"num_hidden_layers": 5, "cla_share_factor": 3},
    "two experts a token": {"moe_topk": 2},
    "dense": {"num_experts": 1},
    "no shared expert": {"use_mixed_mlp_moe": False},
    "no qk-norm": {"use_qk_norm": False},
    "tied": {"tie_word_embeddings": True},
}


def model_of(config: HunYuanConfig) -> HunYuanForCausalLM:
    return HunYuanForCausalLM(config).bfloat16().train()


def setup_of(config: HunYuanConfig, **changes: Any) -> TrainingSetup:
    return TrainingSetup("tiny", config, find_gpu("H20"), **{"gpus": 1, "mode": "full", **changes})


def bytes_of(memory: TrainingMemory, name: str) -> float:
    return sum(item.nbytes for item in (*memory.gpu, *memory.host) if item.name == name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_weights_gradients_and_optimizer_to_the_byte(shape: dict[str, Any]) -> None:
    """As DeepSpeed holds them: Adam on float32 copies of bfloat16 weights."""
    config = tiny_config(**shape)
    model = model_of(config)
    model(torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss.backward()
    parameters = list(model.parameters())
    copies = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer = torch.optim.AdamW(copies)
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    memory = TrainingMemory(setup_of(config, stage=0))
    assert bytes_of(memory, "weights") == sum(parameter.nbytes for parameter in parameters)
    assert bytes_of(memory, "gradients") == sum(parameter.grad.nbytes for parameter in parameters)
    assert bytes_of(memory, "optimizer") == moments + sum(copy.nbytes for copy in copies)
    assert memory.parameters.trained == memory.parameters.total == sum(p.numel() for p in parameters)
    assert memory.parameters.largest == max(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("targets", [ATTENTION, ("v_proj", "down_proj")])
def test_lora_counts_are_pefts(targets: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = tiny_config()
    settings = peft.LoraConfig(r=5, target_modules=list(targets))
    trained, total = peft.get_peft_model(HunYuanForCausalLM(config), settings).get_nb_trainable_parameters()
    found = Parameters.of(config, "lora", 5, targets)
    assert (found.trained, found.total) == (trained, total)


def test_what_each_stage_divides() -> None:
    config = open_planned("hunyuan-large").config
    names = ("weights", "gradients", "optimizer")
    whole = [bytes_of(TrainingMemory(setup_of(config, gpus=64, stage=0)), name) for name in names]
    for stage, divided in ((1, (1, 1, 64)), (2, (1, 64, 64)), (3, (64, 64, 64))):
        memory = TrainingMemory(setup_of(config, gpus=64, stage=stage))
        assert [bytes_of(memory, name) for name in names] == [a / b for a, b in zip(whole, divided, strict=True)]
    offloaded = TrainingMemory(setup_of(config, gpus=64, stage=3, offload="all"))
    assert not {item.name for item in offloaded.gpu} & set(names)
    assert bytes_of(offloaded, "optimizer") == whole[2] / 8  # of a node with 8 of the 64 GPUs


def kept(config: HunYuanConfig, checkpointing: bool) -> int:
    """Bytes that autograd keeps between forward and backward pass, the loss and the weights left out."""
    model = model_of(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            seen[place] = tensor
        return tensor

    ids = torch.randint(3, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_activations_to_the_byte(shape: dict[str, Any]) -> None:
    config = tiny_config(**shape)
    once = training.input_bytes(config) + training.head_bytes(config, 0) - 2 * config.hidden_size
    for checkpointing in (False, True):
        of_layer = training.checkpoint_bytes if checkpointing else training.layer_bytes
        each = sum(of_layer(config, layer) for layer in range(config.num_hidden_layers))
        assert kept(config, checkpointing) == TOKENS * (each + once)


def published(**changes: Any) -> TrainingSetup:
    model = open_planned("hunyuan-large")
    given = {"gpus": 32, "mode": "full", "offload": "all", "host": 2048 * GIB, **changes}
    return TrainingSetup(model.name, model.config, find_gpu("H20"), **given)


def test_the_published_minima() -> None:
    assert fewest(published()).gpus == 32
    assert TrainingMemory(published(gpus=24)).host_bytes > 2048 * GIB
    assert not TrainingMemory(published(offload="none")).fits
    assert TrainingMemory(published(mode="lora", gpus=8)).fits
    assert not TrainingMemory(published(mode="lora", gpus=8, offload="none")).fits


def test_longer_sequences_and_no_checkpointing_take_more() -> None:
    base = TrainingMemory(published()).gpu_bytes
    assert TrainingMemory(published(length=8192)).gpu_bytes > base
    assert TrainingMemory(published(checkpointing=False)).gpu_bytes > 2 * base


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["plan", *arguments])


def test_the_command() -> None:
    result = run("--train", "full", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and document["fits"]
    assert (document["gpus"], document["zero_stage"], document["offload"]) == (32, 3, "optimizer")
    result = run("--train", "full", "--gpus", "16")
    assert result.exit_code == 1 and "It does not fit: each host needs 3,680 GiB and has 2,048" in result.stdout
    result = run("--train", "lora", "--gpus", "8", "--model", "demo")
    assert result.exit_code == 0 and "LoRA of rank 64 · 8 × H20 · no ZeRO" in result.stdout
    # V1's files have the length of pretraining; training, too, goes up to the documented one.
    result = run("--train", "lora", "--model", "hunyuan-7b", "--seq-length", "65536", "--json")
    assert json.loads(result.stdout)["tokens_a_gpu"] == 65536


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train", "lora", "--tp", "2"], "--tp is an option of a server: leave it out with --train"),
        (["--offload", "all"], "--offload is an option of fine-tuning: add --train full"),
        (["--train", "full", "--offload", "all", "--zero-stage", "2"], "it needs stage 3"),
        (
            ["--train", "full", "--seq-length", "200000"],
            "--seq-length 200000: the model's longest context is 131072 tokens",
        ),
    ],
)
def test_mistakes(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, UserError) and said in str(result.exception)
