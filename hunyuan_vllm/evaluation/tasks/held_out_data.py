"""The data of the lm-evaluation-harness tasks beside it: the demo model's held-out questions."""

import json
from pathlib import Path
from typing import Any


def load(**_: Any) -> dict[str, Any]:
    """The questions as the split `test`."""
    from datasets import Dataset

    lines = Path(__file__).with_name("held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
