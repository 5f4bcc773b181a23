"""Puts a run together: data, collator, model, Trainer, result"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.trainer_callback import PrinterCallback

from hunyuan_vllm.train.arguments import Arguments
from hunyuan_vllm.train.checkpoints import STAGING, name_whole, saving
from hunyuan_vllm.train.collate import DummyDataset, PackingCollator, PaddingCollator
from hunyuan_vllm.train.dataset import ConversationDataset, Encoding, PackedDataset
from hunyuan_vllm.train.export import copy_served_files, set_dtype, write_origin
from hunyuan_vllm.train.model import make_moe_leaves
from hunyuan_vllm.train.processes import join_processes
from hunyuan_vllm.train.progress import Display
from hunyuan_vllm.train.start import Start
from hunyuan_vllm.train.trainer import Board, HunYuanTrainer
from hunyuan_vllm.util.errors import UserError


def save_result(trainer: HunYuanTrainer, folder: Path, dtype: torch.dtype) -> str:
    """Save the trained weights to `folder`, which gets its name when it is whole; says in words what it is.

    Every process must call this: under ZeRO-3 each holds a part. A full model is saved in `dtype`, routers in float32.

    Raises:
        DiskError: it could not be written.
    """
    beside = folder.parent / STAGING / folder.name
    is_adapter = hasattr(trainer.model, "peft_config")
    with saving("the result", folder.parent):
        trainer.served_dtype = dtype
        trainer.save_model(str(beside))
        trainer.served_dtype = None
        if trainer.args.should_save:
            if not is_adapter:
                set_dtype(beside, dtype)
            name_whole(beside, folder)
    return "an adapter" if is_adapter else "a checkpoint"


TENSOR_CORES = 8  # rows a multiple of so many tokens long suit them


def assemble(arguments: Arguments, start: Start, console: Console, say: Callable[[str], None]) -> HunYuanTrainer:
    """A trainer that is ready to `train()`.

    Raises:
        UserError: the data are of no use, or the checkpoint is not.
    """
    training, flags = arguments.training, arguments.model
    collator, train_data, held_out = _data(arguments, start, say)
    if held_out is not None and "eval_strategy" not in arguments.given:
        training.eval_strategy = type(training.eval_strategy)("steps")
        training.eval_steps = training.eval_steps or training.save_steps
    if training.deepspeed_plugin:
        join_processes()
    model = start.model(arguments)
    if flags.make_moe_param_leaf_module and training.deepspeed_plugin and training.deepspeed_plugin.zero_stage == 3:
        make_moe_leaves(model)

    board = None
    if "tensorboard" in training.report_to:
        board = Board(training.logging_dir or str(Path(training.output_dir) / "runs"))
    training.prediction_loss_only = True  # the logits of all held-out tokens would fill any memory
    training.report_to = []  # type: ignore[assignment]  # the board is ours

    def finish(folder: Path) -> None:
        if not flags.use_lora:
            copy_served_files(folder, start.tokenizer_folder, start.base)
            write_origin(folder, start.origin, start.served_dtype)

    trainer = HunYuanTrainer(
        model=model,
        args=training,
        train_dataset=train_data,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=[Display(console), *([board] if board else [])],
        aux_loss_coef=flags.aux_loss_coef,
        finish=finish,
        around=_flash if flags.use_flash_attn and torch.cuda.is_available() else nullcontext,
    )
    trainer.remove_callback(PrinterCallback)
    if board:
        board.watch(trainer)
    return trainer


def _data(arguments: Arguments, start: Start, say: Callable[[str], None]) -> tuple[Any, Any, Any]:
    """Collator, training data, held-out data."""
    data, limit, known = arguments.data, arguments.data.max_seq_length, start.config.max_position_embeddings
    if limit > known and "max_seq_length" in arguments.given:
        raise UserError(f"--max_seq_length {limit}: this network knows {known} positions")
    limit = min(limit, known)
    pad = start.tokenizer.pad_token_id
    multiple = TENSOR_CORES if torch.cuda.is_available() else 1
    padding = PaddingCollator(pad, multiple)
    if data.use_dummy_data:
        return padding, DummyDataset(start.config.vocab_size, limit), None
    if data.train_data_file is None:
        raise UserError("name --train_data_file, JSONL with one conversation a line (or --use_dummy_data)")
    encoding = Encoding(start.tokenizer, limit, data.train_on_all, data.default_system)
    held_out = ConversationDataset(Path(data.eval_data_file), encoding) if data.eval_data_file else None
    train_data = ConversationDataset(Path(data.train_data_file), encoding)
    say(f"{data.train_data_file}: {len(train_data):,} conversations, {sum(train_data.lengths):,} tokens")
    if not data.packing:
        return padding, train_data, held_out
    packed = PackedDataset(train_data, limit, arguments.training.seed)
    say(f"packed into {len(packed):,} rows of {limit} tokens, {packed.filled:.0%} full")
    packed_held_out = PackedDataset(held_out, limit, arguments.training.seed) if held_out is not None else None
    return PackingCollator(pad, multiple), packed, packed_held_out


def _flash() -> AbstractContextManager[Any]:
    """Attention by flash kernels where they can (no mask: rows that are not packed), else by the next best."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
