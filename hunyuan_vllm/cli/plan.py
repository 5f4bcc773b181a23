"""`hunyuan-vllm plan`: whether a model fits on some GPUs, what to expect there, what to change"""

import json
from typing import Any, Literal

import typer
from rich.console import Console

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.text import GIB

LIMITS = "vLLM's limits"
WORKLOAD = "The requests that rates are given for"
MACHINE = "The machines"
OUTPUT = "Output"
TRAINING = "Fine-tuning (--train)"
TRAINING_OPTIONS = {
    "train", "zero_stage", "offload", "seq_length", "checkpointing", "lora_rank", "host_memory",
}  # fmt: skip
COMMON_OPTIONS = {"model", "gpu", "gpus", "gpus_per_node", "as_json", "list_gpus", "list_models"}


def plan(
    context: typer.Context,
    model: str = typer.Option(
        "hunyuan-large", help="Checkpoint directory, config.json, published model (--list-models) or demo."
    ),
    gpu: str = typer.Option("H20", metavar="NAME|FILE.json", help="Type of GPU (--list-gpus)."),
    gpus: int | None = typer.Option(None, min=1, help="Total GPUs; default: the fewest that fit."),
    tp: int | None = typer.Option(
        None, "--tp", "--tensor-parallel-size", min=1, help="Tensor-parallel ranks; default: all GPUs of a stage."
    ),
    pp: int = typer.Option(1, "--pp", "--pipeline-parallel-size", min=1, help="Pipeline stages."),
    dcp: int = typer.Option(
        1, "--dcp", "--decode-context-parallel-size", min=1, help="Ranks that share a sequence's cache."
    ),
    scheme: str | None = typer.Option(
        None, metavar="bf16|int8|int8-w8a8|fp8", help="Quantisation scheme; default: the checkpoint's, else bf16."
    ),
    kv: Literal["auto", "fp8"] = typer.Option("auto", "--kv", "--kv-cache-dtype", help="Type of the KV cache."),
    max_model_len: int | None = typer.Option(None, min=1, help="Longest sequence; default: the model's."),
    gpu_memory_utilization: float = typer.Option(
        0.92, min=0.1, max=1, rich_help_panel=LIMITS, help="Share of the GPU's memory for vLLM."
    ),
    max_num_batched_tokens: int | None = typer.Option(
        None, min=1, rich_help_panel=LIMITS, help="Tokens of a step; default: vLLM's for this GPU."
    ),
    max_num_seqs: int | None = typer.Option(
        None, min=1, rich_help_panel=LIMITS, help="Sequences of a step; default: vLLM's for this GPU."
    ),
    enforce_eager: bool = typer.Option(False, "--enforce-eager", rich_help_panel=LIMITS, help="No CUDA graphs."),
    input_len: int | None = typer.Option(
        None, min=1, rich_help_panel=WORKLOAD, help="Prompt tokens; default: 2048, or what the length allows."
    ),
    output_len: int | None = typer.Option(
        None, min=1, rich_help_panel=WORKLOAD, help="Answer tokens; default: 256, or an eighth of the length."
    ),
    train: Literal["full", "lora"] | None = typer.Option(
        None, rich_help_panel=TRAINING, help="Plan fine-tuning, not a server."
    ),
    zero_stage: int | None = typer.Option(
        None, min=0, max=3, rich_help_panel=TRAINING, help="ZeRO stage; default: the fastest that fits."
    ),
    offload: Literal["none", "optimizer", "all"] | None = typer.Option(
        None, rich_help_panel=TRAINING, help="Offload to host memory; default: as needed."
    ),
    seq_length: int = typer.Option(
        2048, "--seq-length", "--max_seq_length", min=1, rich_help_panel=TRAINING, help="Tokens per GPU and iteration."
    ),
    checkpointing: bool = typer.Option(
        True, rich_help_panel=TRAINING, help="Recompute layers in the backward pass to save memory."
    ),
    lora_rank: int = typer.Option(64, min=1, rich_help_panel=TRAINING, help="Rank of the adapters."),
    host_memory: float = typer.Option(2048, min=1, rich_help_panel=TRAINING, help="GiB of each host's memory."),
    gpus_per_node: int = typer.Option(8, min=1, rich_help_panel=MACHINE, help="GPUs of a machine."),
    network: float = typer.Option(400, min=1, rich_help_panel=MACHINE, help="Gbit/s per GPU to other machines."),
    as_json: bool = typer.Option(False, "--json", rich_help_panel=OUTPUT, help="Print the plan as JSON."),
    list_gpus: bool = typer.Option(False, "--list-gpus", rich_help_panel=OUTPUT, help="Show the known GPUs."),
    list_models: bool = typer.Option(
        False, "--list-models", rich_help_panel=OUTPUT, help="Show the published models and the GPUs that they need."
    ),
) -> None:
    """Say whether a model fits on some GPUs, what to expect there, and what to change if it does not fit.

    Needs no GPU, and only the checkpoint's config.json.

    \b
    Examples:
      hunyuan-vllm plan --gpu H20
          the published 389B model in BF16: how many H20 does it need?
      hunyuan-vllm plan --model hunyuan-a13b --gpu H20 --max-model-len 262144
          A13B with its longest context
      hunyuan-vllm plan --gpu H20 --gpus 16 --tp 16 --dcp 2 --max-model-len 131072
          two machines, each KV head held once
      hunyuan-vllm plan --gpu H100 --gpus 8 --scheme int8 --kv fp8
          one machine, weights quantised at load time
      hunyuan-vllm plan --model /models/my-hunyuan --gpu A100-80G --gpus 16 --pp 2
      hunyuan-vllm plan --gpu H200 --gpus 8 --json | jq .kv_cache.tokens
      hunyuan-vllm plan --train lora --gpu H20
          fine-tuning: memory by ZeRO stage and offload
      hunyuan-vllm plan --train full --gpu H800 --gpus 64 --seq-length 8192

    \b
    Exit status: 0 it fits, 1 it does not fit or cannot run, 2 bad input.
    """
    from hunyuan_vllm.plan import report, training_report
    from hunyuan_vllm.plan.fit import check_fit
    from hunyuan_vllm.plan.plan import make_scenario
    from hunyuan_vllm.plan.training import TrainingMemory

    console = Console(highlight=False)
    given = {name for name in context.params if _was_given(context, name)}
    if train is None:
        _refuse(given & TRAINING_OPTIONS, "is an option of fine-tuning: add --train full or --train lora")
    else:
        _refuse(given - COMMON_OPTIONS - TRAINING_OPTIONS, "is an option of a server: leave it out with --train")
    if list_models:
        return report.show_models(console)
    if list_gpus:
        return report.show_gpus(console)
    if train:
        setup = training_report.make_setup(
            model, gpu, gpus, train, zero_stage, offload, rank=lora_rank, length=seq_length,
            checkpointing=checkpointing, per_node=gpus_per_node, host=host_memory * GIB,
        )  # fmt: skip
        if as_json:
            _print_json(training_report.to_json(setup))
        else:
            training_report.show_training(setup, console)
        raise typer.Exit(0 if TrainingMemory(setup).fits else 1)
    scenario = make_scenario(
        model, gpu, gpus, tp, pp, scheme, max_model_len, max_num_batched_tokens, max_num_seqs,
        input_len, output_len, dcp=dcp, kv=kv, utilization=gpu_memory_utilization, eager=enforce_eager,
        per_node=gpus_per_node, node_link=network * 1e9 / 8,
    )  # fmt: skip
    fit = check_fit(scenario)
    if as_json:
        _print_json(report.to_json(fit))
    else:
        report.show_plan(fit, console)
    raise typer.Exit(0 if fit.fits else 1)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=1))


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse(names: set[str], why: str) -> None:
    if names:
        raise UserError(f"--{min(names).replace('_', '-')} {why}")
