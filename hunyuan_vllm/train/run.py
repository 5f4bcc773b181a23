"""A run of fine-tuning, from flags to a directory that can be served

Libraries are imported in `train`, after the environment that they read is set.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from hunyuan_vllm.util.errors import UserError

EXTRA: Final = ("accelerate", "peft", "tensorboard")


def need_extra(deepspeed: bool = False) -> None:
    """Check that the libraries of fine-tuning are installed."""
    wanted = (*EXTRA, "deepspeed") if deepspeed else EXTRA
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise UserError(
            f"fine-tuning needs {', '.join(missing)}: sh deploy/setup_env.sh --train, "
            "or pip install 'hunyuan-vllm[train]'"
        )


def need_writable(output: Path) -> None:
    """Create the output directory and check that it is writable."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(
            f"--output_dir {output} cannot be written to ({error.strerror}): name another directory"
        ) from None


FINAL: Final = "final"


def main(argv: Sequence[str]) -> int:
    """Train as the flags say; returns the exit status. A user's mistake is one line on standard error."""
    from hunyuan_vllm.train.checkpoints import DiskError
    from hunyuan_vllm.train.distributed import is_first, leave_processes, wait_for_first

    try:
        train(argv)
        leave_processes()
    except UserError as error:
        if not is_first() and not isinstance(error, DiskError):
            wait_for_first()
        print(f"hunyuan-vllm: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(
            "hunyuan-vllm: stopped; --resume_from_checkpoint last resumes from the newest checkpoint", file=sys.stderr
        )
        return 130
    return 0


def train(argv: Sequence[str]) -> None:
    from hunyuan_vllm.train.distributed import is_first, prepare

    file = flag_value(argv, "deepspeed")
    need_extra(deepspeed=file is not None)

    import torch

    from hunyuan_vllm.train.distributed import read_deepspeed_config, without_offload

    config, changes = without_offload(read_deepspeed_config(file)) if file else (None, [])
    prepare(deepspeed=file is not None)

    from hunyuan_vllm.train.arguments import ignored, parse
    from hunyuan_vllm.train.model import BaseCheckpoint

    console = Console(stderr=True, quiet=not is_first())

    def say(text: str) -> None:
        console.print(f"hunyuan-vllm: {text}", markup=False, highlight=False, soft_wrap=True)

    arguments = parse(argv, config)
    if arguments.demo:
        say("no --model_name_or_path is given: LoRA on the demo model")
        if "OMP_NUM_THREADS" not in os.environ:
            # A second thread adds little to matrices this small, and costs much on a busy machine.
            torch.set_num_threads(1)
    for line in (*changes, *ignored(arguments, config)):
        say(line)
    base = BaseCheckpoint.find(arguments)
    if is_first():
        need_writable(Path(arguments.training.output_dir))
    _run(arguments, base, console, say)


def _run(arguments: Any, base: Any, console: Console, say: Callable[[str], None]) -> None:
    import torch
    from transformers import set_seed

    from hunyuan_vllm.serving_command import adapter_command, checkpoint_command
    from hunyuan_vllm.train.model import count_parameters
    from hunyuan_vllm.train.trainer import Display, build_trainer, save_result

    training, output = arguments.training, Path(arguments.training.output_dir)
    set_seed(training.seed)
    display = Display(console)
    trainer = build_trainer(arguments, base, display, say)
    trained, all_of_them = count_parameters(trainer.model)
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    say(f"{trained:,} of {all_of_them:,} parameters are trained, {rows} rows per step")
    if base.resume is not None:
        say(f"resuming from {base.resume}")
    with closing(display):
        trainer.train(resume_from_checkpoint=str(base.resume) if base.resume else None)
    kind = save_result(trainer, output / FINAL, base.served_dtype)
    if trainer.is_world_process_zero():
        say(f"done: {output / FINAL} ({kind})")
        flags, command = arguments.model, checkpoint_command(output / FINAL)
        if flags.use_lora and base.directory is not None:
            gpu = torch.cuda.is_available()
            modules = flags.lora_target_modules
            command = adapter_command(output / FINAL, base.directory, flags.lora_rank, modules, gpu=gpu)
        say(f"serve it: {command}")


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """The last value of a flag, before the flags are parsed: imports depend on it."""
    found = None
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") != f"__{name}":
            continue
        if equals:
            found = value
        elif place + 1 < len(argv):
            found = argv[place + 1]
    return found
