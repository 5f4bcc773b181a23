"""The loss of a run as a picture: of each log entry, of the held-out data, and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hunyuan_vllm.util.files import replacing

__all__ = ["save_curve"]


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
