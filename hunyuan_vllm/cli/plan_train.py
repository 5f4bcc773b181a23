"""`hunyuan-vllm plan --train`: the plan of a fine-tuning, shown or as JSON."""

from __future__ import annotations

import json

from rich.console import Console

from hunyuan_vllm.plan.training import TrainingMemory
from hunyuan_vllm.plan.training_report import TrainingRequest, make_setup, show_training, to_json

__all__ = ["plan_training"]


def plan_training(request: TrainingRequest, console: Console, as_json: bool) -> bool:
    """Print the plan; whether it fits.

    Raises:
        UserError: a name is unknown, or two options contradict each other.
    """
    setup = make_setup(request)
    if as_json:
        print(json.dumps(to_json(setup), indent=1))
    else:
        show_training(setup, console)
    return TrainingMemory(setup).fits
