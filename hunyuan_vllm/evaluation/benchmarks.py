"""How each benchmark is asked: shots, and whether as a chat. What the published table does not say is assumed here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["PUBLISHED", "TASKS_FOLDER", "Setting", "setting"]

TASKS_FOLDER: Final = Path(__file__).with_name("tasks")


@dataclass(frozen=True)
class Setting:
    """How a task is asked.

    Attributes:
        shots: solved examples before each question; None for what the task itself says.
        chat: in the model's chat format, rather than as plain text.
        published: percent right of the published Instruct model, (BF16, FP8).
    """

    shots: int | None = None
    chat: bool = False
    published: tuple[float, float] | None = None


# The table gives scores and no settings; these are the ones each benchmark is usually reported with.
PUBLISHED: Final = {
    "arc_challenge_letters": Setting(25, published=(94.6, 94.2)),
    "ceval-valid": Setting(5, published=(88.6, 89.2)),
    "cmmlu": Setting(5, published=(90.4, 89.8)),
    "mmlu": Setting(5, published=(89.9, 88.9)),
}
OTHERS: Final = {
    "arc_challenge": Setting(25),
    "arc_challenge_chat": Setting(0, chat=True),
    "hunyuan_demo": Setting(0, chat=True),
    "hunyuan_demo_choice": Setting(0, chat=True),
}


def setting(task: str) -> Setting:
    """The setting of a task of lm-evaluation-harness; without entry, the task's own shots as plain text."""
    return PUBLISHED.get(task) or OTHERS.get(task) or Setting()
