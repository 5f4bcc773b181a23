"""Progress of a training run: a bar and log lines"""

import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import duration


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

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self._line(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            parts = [f"step {state.global_step}/{state.max_steps}", f"loss {float(logs['loss']):.4f}"]
            if "balance_loss" in logs:
                parts.append(f"balance loss {logs['balance_loss']:.3f}")
            parts.append(f"learning rate {float(logs['learning_rate']):.2e}")
            parts += [f"{logs['tokens_per_second']:,.0f} tokens/s", self._left(state)]
            self._line("  ".join(parts))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._line(f"saved {args.output_dir}/checkpoint-{state.global_step}")

    def close(self) -> None:
        """Restore the terminal, also after a failed run."""
        self._bar.close()

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first
        seconds = (time.monotonic() - self._started) / max(done, 1) * (state.max_steps - state.global_step)
        return f"{duration(seconds)} left"
