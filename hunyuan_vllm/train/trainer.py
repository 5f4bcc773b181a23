"""The Trainer of a run: transformers' own with token counts, the balance loss and safe checkpoints; and its display"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from hunyuan_vllm.train.arguments import Arguments
from hunyuan_vllm.train.checkpoints import STAGING, move_into_place, remove_old, saving
from hunyuan_vllm.train.collate import DummyDataset, pack_batch, pad_batch
from hunyuan_vllm.train.dataset import ConversationDataset, Encoding, PackedDataset
from hunyuan_vllm.train.distributed import join_processes
from hunyuan_vllm.train.export import as_published, copy_served_files, write_config
from hunyuan_vllm.train.messages import published_system
from hunyuan_vllm.train.model import BaseCheckpoint, make_moe_leaves
from hunyuan_vllm.train.moe_balance import ExpertLoad, balance_loss
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import duration

TENSOR_CORES = 8  # row lengths are padded to a multiple of this on GPUs
MAX_SHARD = "5GB"


class HunYuanTrainer(transformers.Trainer):
    """transformers' Trainer with what this network needs.

    Args:
        finish: called with a directory of weights and their type before it is complete: adds the files that serving
            needs.
        arguments: `transformers.Trainer`'s.

    Attributes:
        served_dtype: type that a full model is saved in; None for the one it is trained in, for resuming.
    """

    def __init__(
        self,
        *,
        aux_loss_coef: float = 0.0,
        finish: Callable[[Path, torch.dtype], None],
        around: Callable[[], AbstractContextManager[Any]],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.aux_loss_coef, self._finish, self._around = aux_loss_coef, finish, around
        self.served_dtype: torch.dtype | None = None
        self.expert_load = ExpertLoad(self.model.config)
        self._saving_in: str | None = None
        self._reset_counts()

    def _reset_counts(self) -> None:
        """Reset the counts since the last log line: tokens, seconds, balance loss, steps."""
        self._tokens = 0
        self._since: float | None = None
        self._balance, self._steps = torch.zeros(()), 0.0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy, summed here and divided by the learned tokens of the whole batch; and the balance loss."""
        if model.training:
            self._since = self._since or time.monotonic()
        inputs, real = without_padding_mask(inputs)
        with self._around():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            parts = self.current_gradient_accumulation_steps
            self._tokens += inputs["input_ids"].numel() if real is None else int(real.sum())
            self._steps += 1 / parts
            if self.expert_load.topk:
                self.expert_load.add(outputs.router_logits, real)
            if self.expert_load.topk and self.aux_loss_coef:
                balance = balance_loss(outputs.router_logits, self.expert_load.topk, real)
                # DDP and ZeRO average over processes; this averages over the parts of a step.
                loss = loss + self.aux_loss_coef * balance / parts
                self._balance = self._balance.to(loss.device) + balance.detach() / parts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens a second (without padding, over all processes), and the balance loss where it is asked for."""
        if "loss" in logs and self._since is not None:
            seconds = time.monotonic() - self._since
            tokens, balance = self._over_processes(self._tokens, self._balance.item() / self._steps)
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            if self.aux_loss_coef:
                logs["balance_loss"] = round(balance / self.args.world_size, 4)
            if (largest := self.expert_load.take_max()) is not None:
                logs["expert_load_max"] = round(largest, 4)
            self._reset_counts()
        super().log(logs, start_time)

    def evaluate(self, *arguments: Any, **named: Any) -> Any:
        """transformers' own; its time is no part of the tokens a second."""
        started = time.monotonic()
        try:
            return super().evaluate(*arguments, **named)
        finally:
            self._add_pause(started)

    def _add_pause(self, started: float) -> None:
        if self._since is not None:
            self._since += time.monotonic() - started

    def _over_processes(self, *numbers: float) -> list[float]:
        summed = torch.tensor(numbers, dtype=torch.float64 if self.args.device.type == "cpu" else torch.float32)
        if self.args.world_size > 1:
            summed = summed.to(self.args.device)
            torch.distributed.all_reduce(summed)
        return summed.tolist()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write to a staging directory, rename it when it is complete, and only then delete older checkpoints.

        Raises:
            DiskError: it could not be written; older checkpoints are unchanged.
        """
        output, step = Path(self.args.output_dir), self.state.global_step
        final = output / f"checkpoint-{step}"
        staged = output / STAGING / final.name
        started = time.monotonic()
        with saving(f"the checkpoint of step {step}", output):
            self._saving_in = str(staged.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in = None
            self._wait()
            if self.args.should_save:
                move_into_place(staged, final)
                remove_old(output, self.args.save_total_limit)
            self._wait()
            # A node with a disk of its own has its processes' parts in its own staging directory.
            if self.is_local_process_zero() and staged.exists():
                move_into_place(staged, final)
        self._add_pause(started)

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_in or super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the weights, in the published layout or as a PEFT adapter, and what `finish` adds."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if not hasattr(self.model, "peft_config"):
            state_dict = as_published(state_dict or self.model.state_dict(), self.model.config, self.served_dtype)
        self.model.save_pretrained(directory, state_dict=state_dict, max_shard_size=MAX_SHARD)
        self._finish(directory, self.served_dtype or self.model.dtype)

    def _wait(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()


def without_padding_mask(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The inputs without a padding mask, and which tokens, [rows · tokens], are not padding.

    Padding is on the right, where the causal mask hides it, so attention needs no mask and can use its fastest kernel.
    The mask of a packed batch stays; padding in it sees itself only.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs, None
    if mask.dim() == 2:
        return {name: value for name, value in inputs.items() if name != "attention_mask"}, mask.flatten().bool()
    related = mask[:, 0].sum(-1) + mask[:, 0].sum(-2)  # itself twice, and each token that it sees or that sees it
    return inputs, (related > 2).flatten()


SHOWN = {  # of the logged values
    "loss": "loss {:.4f}", "balance_loss": "balance loss {:.3f}", "learning_rate": "learning rate {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s", "eval_loss": "held-out loss {:.4f}",
}  # fmt: skip


class Display(TrainerCallback):
    """Shows loss, learning rate, tokens a second and the time left; only the first of several processes prints."""

    def __init__(self, console: Console) -> None:
        self._console, self._progress = console, Progress(console)
        self._bar = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero and self._console.is_terminal:
            stage = self._progress.stage("training", state.max_steps, state.global_step, unit="steps")
            self._bar.enter_context(stage)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and self._console.is_terminal:
            self._progress.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        parts = [text.format(float(logs[name])) for name, text in SHOWN.items() if name in logs]
        if state.is_world_process_zero and parts:
            seconds = (time.monotonic() - self._started) / max(state.global_step - self._first, 1)
            left = duration(seconds * (state.max_steps - state.global_step))
            self._line("  ".join([f"step {state.global_step}/{state.max_steps}", *parts, f"{left} left"]))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._line(f"saved {args.output_dir}/checkpoint-{state.global_step}")

    def close(self) -> None:
        """Restore the terminal, also after a failed run."""
        self._bar.close()

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def build_trainer(
    arguments: Arguments, base: BaseCheckpoint, display: Display, say: Callable[[str], None]
) -> HunYuanTrainer:
    training, flags = arguments.training, arguments.model
    collator, train_data, held_out = _data(arguments, base, say)
    if held_out is not None and "eval_strategy" not in arguments.given:
        training.eval_strategy = type(training.eval_strategy)("steps")
        training.eval_steps = training.eval_steps or training.save_steps
    if training.deepspeed_plugin:
        join_processes()
    model = base.load_model(arguments)
    if flags.make_moe_param_leaf_module and training.deepspeed_plugin and training.deepspeed_plugin.zero_stage == 3:
        make_moe_leaves(model)

    board = None
    if "tensorboard" in training.report_to:
        board = TensorBoardCallback()
        board.logging_dir = training.logging_dir or str(Path(training.output_dir) / "runs")
    training.prediction_loss_only = True  # otherwise the logits of all held-out tokens are kept
    training.report_to = []  # type: ignore[assignment]  # the Trainer's own would choose another directory

    def finish(directory: Path, dtype: torch.dtype) -> None:
        if not flags.use_lora:
            write_config(directory, base.directory, dtype, base.served_dtype)
            copy_served_files(directory, base.tokenizer_directory, base.directory)

    trainer = HunYuanTrainer(
        model=model,
        args=training,
        train_dataset=train_data,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=[display, *([board] if board else [])],
        aux_loss_coef=flags.aux_loss_coef,
        finish=finish,
        around=_flash if flags.use_flash_attn and torch.cuda.is_available() else nullcontext,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _data(arguments: Arguments, base: BaseCheckpoint, say: Callable[[str], None]) -> tuple[Any, Any, Any]:
    """Collator, training data, held-out data."""
    data, limit, longest = arguments.data, arguments.data.max_seq_length, base.config.longest_context
    if limit > longest:
        if "max_seq_length" in arguments.given:
            raise UserError(f"--max_seq_length {limit}: the model's longest context is {longest} tokens")
        limit = longest
    pad = base.tokenizer.pad_token_id
    multiple = TENSOR_CORES if torch.cuda.is_available() else 1
    padding = partial(pad_batch, pad=pad, multiple=multiple)
    if data.use_dummy_data:
        return padding, DummyDataset(base.config.vocab_size, limit), None
    if data.train_data_file is None:
        raise UserError("give --train_data_file, JSONL with one conversation per line (or --use_dummy_data)")
    system = published_system(base.config) if data.default_system is None else data.default_system
    encoding = Encoding(base.tokenizer, limit, data.train_on_all, system)
    held_out = ConversationDataset(Path(data.eval_data_file), encoding) if data.eval_data_file else None
    train_data = ConversationDataset(Path(data.train_data_file), encoding)
    say(f"{data.train_data_file}: {len(train_data):,} conversations, {sum(train_data.lengths):,} tokens")
    if not data.packing:
        return padding, train_data, held_out
    packed = PackedDataset(train_data, arguments.training.seed)
    say(f"packed into {len(packed):,} rows of {limit} tokens, {packed.filled:.0%} full")
    packed_held_out = PackedDataset(held_out, arguments.training.seed) if held_out is not None else None
    return partial(pack_batch, pad=pad, multiple=multiple), packed, packed_held_out


def _flash() -> AbstractContextManager[Any]:
    """Prefer flash-attention kernels, which take rows without a mask (not packed), then the next fastest."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def save_result(trainer: HunYuanTrainer, directory: Path, dtype: torch.dtype) -> str:
    """Save the trained weights to `directory`, completely or not at all; returns "an adapter" or "a checkpoint".

    Every process must call this: under ZeRO-3 each holds a part. A full model is saved in `dtype`, routers in float32.
    """
    staged = directory.parent / STAGING / directory.name
    is_adapter = hasattr(trainer.model, "peft_config")
    with saving("the result", directory.parent):
        trainer.served_dtype = dtype
        trainer.save_model(str(staged))
        trainer.served_dtype = None
        if trainer.args.should_save:
            move_into_place(staged, directory)
    return "an adapter" if is_adapter else "a checkpoint"
