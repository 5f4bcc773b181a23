"""The flags of fine-tuning"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
import transformers
from transformers import HfArgumentParser
from transformers import TrainingArguments as TheirArguments

from hunyuan_vllm.adapter import ATTENTION
from hunyuan_vllm.util.errors import UserError

SHAPE: Final[tuple[str, ...]] = (
    "hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings", "model_max_length", "vocab_size", "layer_norm_eps", "num_experts", "moe_topk",
    "use_mixed_mlp_moe", "num_shared_expert", "use_cla", "cla_share_factor", "use_qk_norm", "tie_word_embeddings",
)  # fmt: skip
"""Flags for the shape of a new network."""

WITHOUT_EFFECT: Final = {
    "do_train": "this command only trains",
    "overwrite_output_dir": "output_dir is never overwritten: checkpoints have their own names",
    "save_safetensors": "weights are always saved as safetensors",
    "type_vocab_size": "the network has no token types",
    "complex_data": "it names a data format that was not published",
    "cache_dir": "nothing is downloaded",
}
"""Flags of published commands that change nothing, with the reason."""


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """What is trained. The defaults of LoRA and of the network's shape are those of the published script."""

    model_name_or_path: str | None = _flag(None, "Directory of the checkpoint to start from.")
    tokenizer_name_or_path: str | None = _flag(None, "Directory of the tokenizer; default: the checkpoint's.")
    use_lora: bool = _flag(False, "Train low-rank adapters and leave the checkpoint's weights as they are.")
    lora_rank: int = _flag(64, "Rank of the adapters.")
    lora_alpha: int = _flag(8, "The adapters' output is scaled by lora_alpha / lora_rank.")
    lora_dropout: float = _flag(0.0, "Dropout before the adapters.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(ATTENTION), metadata={"help": "Modules that get an adapter."}
    )
    train_attention_params_only: bool = _flag(False, "Train attention only (without LoRA).")
    make_moe_param_leaf_module: bool = _flag(
        False, "Under ZeRO-3, gather all experts of a layer at once: fewer messages, and their memory."
    )
    use_flash_attn: bool = _flag(False, "On GPUs, prefer PyTorch's flash-attention kernels.")
    aux_loss_coef: float = _flag(0.0, "Weight of the load-balancing loss; 0: none.")
    hidden_size: int = _flag(2048, "Of a new network.")
    num_layers: int = _flag(24, "Of a new network.")
    num_attention_heads: int = _flag(16, "Of a new network.")
    num_key_value_heads: int = _flag(16, "Of a new network.")
    intermediate_size: int = _flag(8192, "Of a new network: width of an expert.")
    max_position_embeddings: int = _flag(2048, "Of a new network: longest context; also --model_max_length.")
    vocab_size: int | None = _flag(None, "Of a new network; default: the tokenizer's, up to a multiple of 128.")
    layer_norm_eps: float = _flag(1e-5, "Of a new network.")
    num_experts: int = _flag(8, "Of a new network; 1: dense layers.")
    moe_topk: int = _flag(4, "Of a new network: experts per token.")
    use_mixed_mlp_moe: bool = _flag(False, "Of a new network: a shared expert for every token.")
    num_shared_expert: int = _flag(1, "Of a new network: width of the shared expert, in experts.")
    use_cla: bool = _flag(False, "Of a new network: layers share K and V (cross-layer attention).")
    cla_share_factor: int = _flag(2, "Of a new network: how many layers share.")
    use_qk_norm: bool = _flag(False, "Of a new network: norms on queries and keys.")
    tie_word_embeddings: bool = _flag(True, "Of a new network: the head is the embedding.")
    type_vocab_size: int = _flag(1, "Without effect.")


@dataclass
class DataArguments:
    train_data_file: str | None = _flag(None, "JSONL, one conversation per line.")
    eval_data_file: str | None = _flag(None, "Held-out data in the same format, whose loss is logged (--eval_steps).")
    max_seq_length: int = _flag(2048, "Longer conversations are cut; also the length of a packed row.")
    packing: bool = _flag(
        False, "Pack several conversations into a row, separated by the attention mask, instead of padding."
    )
    train_on_all: bool = _flag(False, "Learn system and user messages too.")
    default_system: str | None = _flag(
        None, 'System message of conversations that have none; "": none. Default: of the published training.'
    )
    use_dummy_data: bool = _flag(False, "Random tokens instead of a file, to measure speed and memory.")
    complex_data: str | None = _flag(None, "Without effect.")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained: transformers' arguments, some with other defaults."""

    output_dir: str = _flag("train_output", "Directory for checkpoints, logs, and the result in final/.")
    min_lr: float | None = _flag(None, "Learning rate at the end of the cosine; default: a tenth of --learning_rate.")
    lr_scheduler_type: str = _flag("cosine_with_min_lr", "Learning-rate schedule.")
    warmup_ratio: float = _flag(0.0, "Share of the steps used for warm-up.")
    logging_steps: float = _flag(5, "Steps between two lines of the log.")
    save_steps: float = _flag(100, "Steps between two checkpoints.")
    model_max_length: int | None = _flag(None, "As --max_position_embeddings, of a new network.")
    logging_dir: str | None = _flag(None, "Directory for TensorBoard's files; default: runs/ in --output_dir.")
    report_to: str = _flag("tensorboard", "tensorboard, or none.")
    overwrite_output_dir: bool = _flag(False, "Without effect.")
    save_safetensors: bool = _flag(True, "Without effect.")
    cache_dir: str | None = _flag(None, "Without effect.")

    def __post_init__(self) -> None:
        this: Any = self  # the type checker does not know transformers' fields
        this.use_cpu = this.use_cpu or not torch.cuda.is_available()
        # Non-reentrant: the one that frozen weights and shared K and V need.
        if this.gradient_checkpointing and this.gradient_checkpointing_kwargs is None:
            this.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if self.lr_scheduler_type == "cosine_with_min_lr" and this.lr_scheduler_kwargs is None:
            # As a ratio: for min_lr transformers needs the optimiser's learning rate, which DeepSpeed's does not have.
            least, largest = self.min_lr, this.learning_rate
            if least is not None and least > largest:
                raise ValueError(f"--min_lr {least} is more than --learning_rate {largest}")
            this.lr_scheduler_kwargs = {"min_lr_rate": 0.1 if least is None or not largest else least / largest}
        if self.report_to not in ("tensorboard", "none"):
            raise ValueError(f"--report_to {self.report_to}: use tensorboard or none")
        if self.warmup_ratio and not this.warmup_steps:
            this.warmup_steps = self.warmup_ratio
        this.remove_unused_columns = False  # the data set is not transformers'
        this.disable_tqdm = True  # progress.py replaces it
        super().__post_init__()


ROOT: Final = Path(__file__).parents[2]
DEMO_DATA: Final = ROOT / "train" / "data"
DEMO: Final = (
    "--use_lora", "--lora_rank", "16", "--lora_alpha", "32", "--per_device_train_batch_size", "16",
    "--learning_rate", "2e-3", "--max_steps", "500", "--warmup_ratio", "0.05", "--logging_steps", "10",
)  # fmt: skip
DESCRIPTION: Final = """\
Fine-tune a Hunyuan model: all weights, attention only, or LoRA adapters.

examples:
  python -m hunyuan_vllm.train
      LoRA on the demo model with the shipped data: about two minutes on two cores
  python -m hunyuan_vllm.train --model_name_or_path /models/hunyuan-large --train_data_file chats.jsonl \\
      --output_dir out --bf16 --deepspeed train/ds_zero3_offload.json --gradient_checkpointing \\
      --use_lora --lora_rank 64 --lora_alpha 128 --learning_rate 1e-5 --min_lr 1e-6 --max_steps 200
      one of many processes, which train/train.sh starts on one or several nodes
  python -m hunyuan_vllm.train ... --resume_from_checkpoint last
      resume from the newest checkpoint in --output_dir

All of transformers' TrainingArguments are flags too; --help-all lists them. See docs/train.md.
Exit status: 0 trained, 2 invalid input, 3 a disk error (earlier checkpoints are complete),
130 stopped.
"""


@dataclass
class Arguments:
    """The flags of a run; `given` are the names of those that the user wrote."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    given: frozenset[str]
    demo: bool


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def parse(argv: Sequence[str], deepspeed: dict[str, Any] | None = None) -> Arguments:
    """Read the flags. `--help` prints and exits.

    Args:
        deepspeed: the config to use instead of what `--deepspeed` names.
    """
    given = frozenset(
        word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--") and len(word) > 2
    )
    parser = _Parser(
        (ModelArguments, DataArguments, TrainingArguments),
        prog="hunyuan-vllm train", description=DESCRIPTION, allow_abbrev=False, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [flags]",
    )  # fmt: skip
    if given & {"help", "help_all"} or "-h" in argv:
        _show_help(parser, everything="help_all" in given)
    demo = not given & {"model_name_or_path", "resume_from_checkpoint", *SHAPE}
    try:
        defaults = _demo(given) if demo else []
        config = ["--deepspeed", json.dumps(deepspeed)] if deepspeed else []
        model, data, training, unknown = parser.parse_args_into_dataclasses(
            [*defaults, *argv, *config], return_remaining_strings=True
        )
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())) from None
    if unknown:
        names = [option for action in parser._actions for option in action.option_strings[:1]]
        near = get_close_matches(unknown[0].partition("=")[0], names, n=1, cutoff=0.8)
        hint = f": did you mean {near[0]}?" if near else " (--help lists them)"
        raise UserError(f"unknown flag {unknown[0]}{hint}")
    return Arguments(model, data, training, given, demo)


def _demo(given: frozenset[str]) -> list[str]:
    from hunyuan_vllm import demo

    defaults = ["--model_name_or_path", str(Path(demo.__file__).parent), *DEMO]
    if not given & {"train_data_file", "use_dummy_data"}:
        file = DEMO_DATA / "train.jsonl"
        if not file.is_file():
            raise UserError("give --train_data_file: the shipped data come only with a checkout of the repository")
        defaults += ["--train_data_file", str(file)]
    return defaults


def _show_help(parser: argparse.ArgumentParser, everything: bool) -> NoReturn:
    """Print this project's and the published flags; with `everything`, all of transformers' too."""
    theirs = {one.name for one in fields(TheirArguments)} - set(TrainingArguments.__annotations__)
    own = {one.name for kind in (ModelArguments, DataArguments) for one in fields(kind)}
    own |= set(TrainingArguments.__annotations__) | {
        "deepspeed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
        "learning_rate", "gradient_checkpointing", "bf16", "seed", "save_total_limit", "resume_from_checkpoint",
        "eval_steps", "weight_decay", "max_grad_norm",
    }  # fmt: skip
    for action in parser._actions:
        hidden = action.dest not in own or action.dest in WITHOUT_EFFECT or action.option_strings[0].startswith("--no_")
        if hidden and not everything:
            action.help = argparse.SUPPRESS
        elif action.dest in theirs:
            action.help = str(action.help).split(". ")[0].replace("%", "%%").rstrip(".") + "."
        action.option_strings = action.option_strings[:1]  # without the spelling with dashes
        if action.const is True:
            action.nargs = 0
        action.metavar = {int: "N", float: "X"}.get(action.type, "VALUE")  # type: ignore[call-overload]
    parser.print_help()
    sys.exit(0)


LORA: Final[tuple[str, ...]] = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")


def ignored(arguments: Arguments, deepspeed: dict[str, Any] | None = None) -> list[str]:
    """A line for each flag that changes nothing in this run; `deepspeed` is its config."""
    given = arguments.given
    reasons: dict[tuple[str, ...], str] = {(name,): why for name, why in WITHOUT_EFFECT.items()}
    if given & {"model_name_or_path", "resume_from_checkpoint"}:
        reasons[SHAPE] = "the checkpoint sets the network's shape"
    if not arguments.model.use_lora:
        reasons[LORA] = "--use_lora is not given"
    if not deepspeed or deepspeed["zero_optimization"]["stage"] != 3:
        reasons["make_moe_param_leaf_module",] = "it is for ZeRO-3, and --deepspeed names no such config"
    if not torch.cuda.is_available():
        reasons["use_flash_attn",] = "there is no GPU"
    lines = []
    for names, why in reasons.items():
        if found := [f"--{name}" for name in names if name in given]:
            lines.append(f"{', '.join(found)} changes nothing: {why}")
    return lines
