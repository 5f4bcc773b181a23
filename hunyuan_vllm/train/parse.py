"""The command line of fine-tuning: its flags, what was given of them, and the demo run where no model is named."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn

from transformers import HfArgumentParser
from transformers import TrainingArguments as TheirArguments

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.train.arguments import SHAPE, WITHOUT_EFFECT, DataArguments, ModelArguments, TrainingArguments

__all__ = ["Arguments", "parse"]

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
      one process of many: train/train.sh starts them, on one node or several
  python -m hunyuan_vllm.train ... --resume_from_checkpoint last
      go on from the newest checkpoint in --output_dir

All of transformers' TrainingArguments are flags too; --help-all lists them. docs/train.md explains the whole way.
Exit status: 0 trained, 2 a mistake in what was asked for, 3 the disk gave out (what was saved before is whole),
130 stopped.
"""


@dataclass
class Arguments:
    """What a run was told, by dataclass; `given` are the names of the flags that the user wrote."""

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

    Raises:
        UserError: a flag is unknown, or a value of no use.
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
        raise UserError(_unknown(unknown[0], parser))
    return Arguments(model, data, training, given, demo)


def _demo(given: frozenset[str]) -> list[str]:
    from hunyuan_vllm import demo

    defaults = ["--model_name_or_path", str(Path(demo.__file__).parent), *DEMO]
    if not given & {"train_data_file", "use_dummy_data"}:
        file = DEMO_DATA / "train.jsonl"
        if not file.is_file():
            raise UserError("name --train_data_file: the shipped data come with a checkout, and this is none")
        defaults += ["--train_data_file", str(file)]
    return defaults


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    names = [option for action in parser._actions for option in action.option_strings[:1]]
    near = get_close_matches(word.partition("=")[0], names, n=1, cutoff=0.8)
    return f"there is no flag {word}" + (f": is {near[0]} meant?" if near else " (--help lists them)")


def _show_help(parser: argparse.ArgumentParser, everything: bool) -> NoReturn:
    """Ours and the published flags; all of transformers' besides where `everything` is wanted."""
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
        elif action.dest in _their_help() and action.dest not in TrainingArguments.__annotations__:
            action.help = str(action.help).split(". ")[0].replace("%", "%%").rstrip(".") + "."
        action.option_strings = action.option_strings[:1]  # not the same with dashes
        if action.const is True:
            action.nargs = 0
        action.metavar = {int: "N", float: "X"}.get(action.type, "VALUE")  # type: ignore[call-overload]
    parser.print_help()
    sys.exit(0)


def _their_help() -> set[str]:
    return {one.name for one in fields(TheirArguments)}
