"""The report of `hunyuan-vllm data check`: counts, lengths, bad lines and one sample"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from hunyuan_vllm.train.dataset import Encoding, Scan
from hunyuan_vllm.train.tokens import IGNORED, Example
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.jsonl import parse_line

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Sample:
    """One conversation as it is trained on.

    Attributes:
        parts: its text in runs: (text, whether its tokens are learned).
    """

    line: int
    example: Example
    parts: list[tuple[str, bool]]


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Shortest, quantiles (the nearest length from above) and longest of `lengths`, which are not empty."""
    ordered = sorted(lengths)
    found = {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in PERCENTILES}
    return {"shortest": ordered[0], **found, "longest": ordered[-1]}


def read_sample(path: Path, found: Scan, encoding: Encoding, line: int | None = None) -> Sample | None:
    """The conversation of line `line`, or the first one that can be trained on; None where there is none."""
    if line is None:
        place = next((place for place, learned in enumerate(found.learned) if learned), None)
        if place is None:
            return None
    else:
        try:
            place = found.numbers.index(line)
        except ValueError:
            raise UserError(f"--sample {line}: no conversation is in that line of {path}") from None
    with path.open("rb") as file:
        file.seek(found.offsets[place])
        read = parse_line(found.numbers[place], file.readline())
    assert read is not None
    example = encoding.cut(encoding(read))
    return Sample(found.numbers[place], example, list(_runs(example, encoding.tokenizer)))


def _runs(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    marked = zip(example.input_ids, (label != IGNORED for label in example.labels), strict=True)
    for learned, run in groupby(marked, key=lambda pair: pair[1]):
        yield tokenizer.decode([token for token, _ in run]), learned


def as_json(path: Path, found: Scan, sample: Sample | None) -> dict[str, Any]:
    limit = found.max_seq_length
    return {
        "file": str(path),
        "conversations": len(found),
        "forms": dict(found.forms.most_common()),
        "bad_lines": found.bad_count,
        "bad": [{"line": bad.number, "cause": bad.cause} for bad in found.bad],
        "max_seq_length": limit,
        "tokens": sum(found.lengths),
        "tokens_after_truncation": sum(min(length, limit or length) for length in found.lengths),
        "learned_tokens": sum(found.learned),
        "lengths": percentiles(found.lengths) if len(found) else None,
        "truncated": found.truncated,
        "without_answer": found.without_answer,
        "sample": sample
        and {
            "line": sample.line,
            "tokens": len(sample.example),
            "truncated": sample.example.truncated,
            "parts": [{"text": text, "learned": learned} for text, learned in sample.parts],
        },
    }
