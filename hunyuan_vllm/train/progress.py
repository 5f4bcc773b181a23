"""How a training run is: progress, log lines, loss curve"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from hunyuan_vllm.util.files import replacing
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import duration


class Display(TrainerCallback):
    """Shows loss, learning rate, tokens a second and the time left; of several processes the first one speaks."""

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
        """Leave the terminal as it was, however the run has ended."""
        self._bar.close()

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first
        seconds = (time.monotonic() - self._started) / max(done, 1) * (state.max_steps - state.global_step)
        return f"{duration(seconds)} left"


def close_displays(callbacks: Iterable[Any]) -> None:
    """Close those of `callbacks` that are displays."""
    for callback in callbacks:
        if isinstance(callback, Display):
            callback.close()


def save_curve(history: Sequence[dict[str, Any]], file: Path) -> bool:
    """Draw the log history of a `TrainerState` to a PNG; False where it holds no loss yet."""
    from matplotlib.figure import Figure

    losses = [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]
    held_out = [(entry["step"], float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]
    rates = [(entry["step"], float(entry["learning_rate"])) for entry in history if "learning_rate" in entry]
    if not losses:
        return False
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*losses, strict=True), color="tab:blue", label="loss")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held-out loss")
    axes.set(xlabel="step", ylabel="cross entropy (nats a token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    if rates:
        other = axes.twinx()
        other.plot(*zip(*rates, strict=True), color="tab:gray", linewidth=0.8)
        other.set_ylabel("learning rate", color="tab:gray")
        other.set_ylim(bottom=0)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True
