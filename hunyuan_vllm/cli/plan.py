"""`hunyuan-vllm plan`: does it fit, what does one get, what to change; before GPUs are rented."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer
from rich.console import Console

from hunyuan_vllm.util.errors import UserError

__all__ = ["plan"]

LIMITS = "vLLM's limits"
WORKLOAD = "The requests that rates are given for"
MACHINE = "The machines"
OUTPUT = "Output"
TRAINING = "Fine-tuning (--train)"
SHARED = {
    "context",
    "model",
    "gpu",
    "gpus",
    "gpus_per_node",
    "network",
    "assume",
    "as_json",
    "assumptions",
    "list_gpus",
}


def plan(
    context: typer.Context,
    model: str = typer.Option("hunyuan-large", help="Checkpoint folder, config.json, hunyuan-large or demo."),
    gpu: str = typer.Option("H20", metavar="NAME|FILE.json", help="Kind of GPU (--list-gpus)."),
    gpus: int | None = typer.Option(None, min=1, help="GPUs in all; default: the fewest that fit."),
    tp: int | None = typer.Option(None, "--tp", "--tensor-parallel-size", min=1, help="Default: all GPUs a stage."),
    pp: int = typer.Option(1, "--pp", "--pipeline-parallel-size", min=1, help="Pipeline stages."),
    dcp: int = typer.Option(
        1, "--dcp", "--decode-context-parallel-size", min=1, help="Ranks that share a sequence's cache."
    ),
    scheme: str | None = typer.Option(
        None, metavar="bf16|int8|int8-w8a8|fp8", help="Default: the checkpoint's, else bf16."
    ),
    kv: str = typer.Option("auto", "--kv", "--kv-cache-dtype", metavar="auto|fp8", help="Type of the KV cache."),
    max_model_len: int | None = typer.Option(None, min=1, help="Longest sequence; default: the model's."),
    gpu_memory_utilization: float = typer.Option(0.92, min=0.1, max=1, rich_help_panel=LIMITS, help="vLLM's share."),
    max_num_batched_tokens: int | None = typer.Option(
        None, min=1, rich_help_panel=LIMITS, help="Tokens of a step; default: vLLM's for this GPU."
    ),
    max_num_seqs: int | None = typer.Option(
        None, min=1, rich_help_panel=LIMITS, help="Sequences of a step; default: vLLM's for this GPU."
    ),
    enforce_eager: bool = typer.Option(False, "--enforce-eager", rich_help_panel=LIMITS, help="No CUDA graphs."),
    input_len: int | None = typer.Option(
        None, min=1, rich_help_panel=WORKLOAD, help="Tokens in; default: 2048, or what the length allows."
    ),
    output_len: int | None = typer.Option(
        None, min=1, rich_help_panel=WORKLOAD, help="Tokens out; default: 256, or an eighth of the length."
    ),
    train: str | None = typer.Option(
        None, metavar="full|lora", rich_help_panel=TRAINING, help="Plan fine-tuning, not a server."
    ),
    zero_stage: int | None = typer.Option(
        None, min=0, max=3, rich_help_panel=TRAINING, help="Default: the quickest that fits."
    ),
    offload: str | None = typer.Option(
        None, metavar="none|optimizer|all", rich_help_panel=TRAINING, help="To the hosts; default: what is needed."
    ),
    seq_length: int = typer.Option(
        2048, "--seq-length", "--max_seq_length", min=1, rich_help_panel=TRAINING, help="Tokens of a sequence."
    ),
    micro_batch: int = typer.Option(1, min=1, rich_help_panel=TRAINING, help="Sequences a GPU and iteration."),
    checkpointing: bool = typer.Option(
        True, rich_help_panel=TRAINING, help="Compute layers again in the backward pass, to keep less."
    ),
    moe_leaf: bool = typer.Option(
        True, rich_help_panel=TRAINING, help="ZeRO-3 gathers a layer's experts at once (--make_moe_param_leaf_module)."
    ),
    lora_rank: int = typer.Option(64, min=1, rich_help_panel=TRAINING, help="Rank of the adapters."),
    lora_targets: str = typer.Option(
        "q_proj,k_proj,v_proj,o_proj", rich_help_panel=TRAINING, help="Modules with an adapter, commas between."
    ),
    host_memory: float = typer.Option(2048, min=1, rich_help_panel=TRAINING, help="GiB of each host's memory."),
    gpus_per_node: int = typer.Option(8, min=1, rich_help_panel=MACHINE, help="GPUs that one machine has."),
    network: float = typer.Option(400, min=1, rich_help_panel=MACHINE, help="Gbit/s of each GPU to other machines."),
    assume: list[str] = typer.Option([], metavar="NAME=VALUE", help="Replace an assumption; may be repeated."),
    as_json: bool = typer.Option(False, "--json", rich_help_panel=OUTPUT, help="The numbers, for a script."),
    chart: bool = typer.Option(False, "--chart", rich_help_panel=OUTPUT, help="Bars of both curves."),
    png: Path | None = typer.Option(None, rich_help_panel=OUTPUT, help="Both curves as a picture."),
    assumptions: bool = typer.Option(
        False, "--assumptions", rich_help_panel=OUTPUT, help="Show what is assumed, and why."
    ),
    list_gpus: bool = typer.Option(False, "--list-gpus", rich_help_panel=OUTPUT, help="Show the known GPUs."),
) -> None:
    """Say whether a model fits on some GPUs, what it can do there, and what to change if not.

    Needs no GPU, and of the checkpoint only its config.json.

    \b
    Examples:
      hunyuan-vllm plan --gpu H20
          the published 389B model in BF16: how many H20 does it need?
      hunyuan-vllm plan --gpu H20 --gpus 16 --tp 16 --dcp 2 --max-model-len 131072
          two machines, and each KV head held once
      hunyuan-vllm plan --gpu H100 --gpus 8 --scheme int8 --kv fp8 --chart
          one machine, weights quantised while they load
      hunyuan-vllm plan --model /models/my-hunyuan --gpu A100-80G --gpus 16 --pp 2
      hunyuan-vllm plan --gpu H200 --gpus 8 --json | jq .kv_cache.tokens
      hunyuan-vllm plan --train lora --gpu H20
          fine-tuning: memory by ZeRO stage and offload, time of an iteration
      hunyuan-vllm plan --train full --gpu H800 --gpus 64 --seq-length 8192

    \b
    Exit status: 0 it fits, 1 it does not fit or cannot work, 2 bad input.
    """
    from hunyuan_vllm.plan.document import to_json
    from hunyuan_vllm.plan.plan import make_plan
    from hunyuan_vllm.plan.report import save_png, show_assumptions, show_gpus, show_plan
    from hunyuan_vllm.plan.request import Request, make_scenario
    from hunyuan_vllm.plan.scenario import Assumptions

    console = Console(highlight=False)
    given = {name for name in context.params if _was_given(context, name)}
    if train is not None:
        from hunyuan_vllm.plan.training_setup import TrainingAssumptions

        _refuse(given - SHARED - set(_training_options()), "belongs to a server's plan: leave it out with --train")
        assumed_training = TrainingAssumptions().changed(assume)
        if assumptions:
            return show_assumptions(assumed_training, console)
        if not list_gpus:
            from hunyuan_vllm.cli.plan_train import plan_training
            from hunyuan_vllm.plan.training_report import TrainingRequest

            asked = TrainingRequest(
                model, gpu, gpus, train, lora_rank, lora_targets, zero_stage, offload, seq_length, micro_batch,
                checkpointing, moe_leaf, gpus_per_node, network * 1e9 / 8, host_memory, assumed_training,
            )  # fmt: skip
            raise typer.Exit(0 if plan_training(asked, console, as_json) else 1)
    _refuse(given & set(_training_options()), "belongs to a plan of fine-tuning: add --train full or --train lora")
    assumed = Assumptions().changed(assume)
    if list_gpus:
        return show_gpus(console)
    if assumptions:
        return show_assumptions(assumed, console)
    if kv not in ("auto", "fp8"):
        raise UserError(f"--kv {kv} is not known: use auto or fp8")
    request = Request(
        model=model,
        gpu=gpu,
        gpus=gpus,
        tensor=tp,
        pipeline=pp,
        dcp=dcp,
        scheme=scheme,
        kv=kv,
        max_model_len=max_model_len,
        utilization=gpu_memory_utilization,
        batched_tokens=max_num_batched_tokens,
        sequences=max_num_seqs,
        eager=enforce_eager,
        input_len=input_len,
        output_len=output_len,
        per_node=gpus_per_node,
        node_link=network * 1e9 / 8,
        assumptions=assumed,
    )
    scenario, quantised = make_scenario(request)
    made = make_plan(scenario, quantised)
    if png is not None and made.verdict.fits:
        save_png(made, png)
    elif png is not None:
        print(f"hunyuan-vllm: {png} is not drawn: there are no curves where nothing fits", file=sys.stderr)
    if as_json:
        print(json.dumps(to_json(made), indent=1))
    else:
        show_plan(made, console, chart)
    raise typer.Exit(0 if made.verdict.fits else 1)


def _training_options() -> tuple[str, ...]:
    return (
        "train", "zero_stage", "offload", "seq_length", "micro_batch", "checkpointing", "moe_leaf", "lora_rank",
        "lora_targets", "host_memory",
    )  # fmt: skip


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse(names: set[str], why: str) -> None:
    if names:
        raise UserError(f"--{min(names).replace('_', '-')} {why}")
