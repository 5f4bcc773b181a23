"""The values of quantisation scales: every one is read, since they are few and a bad one ruins its whole weight."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from hunyuan_vllm.check.config_file import ConfigFile
from hunyuan_vllm.check.shards import StoredTensor
from hunyuan_vllm.check.tensors import Used
from hunyuan_vllm.findings import Section
from hunyuan_vllm.layout import FLOATS, expected_tensors
from hunyuan_vllm.quant.formats import is_scale

__all__ = ["check_scales", "read_values"]

READERS = 8
ODD_FACTOR = 1000  # a scale this many times its likes' median is hardly a scale of the same kind of weight
AGAIN = "convert the BF16 checkpoint again with hunyuan-vllm quantize, or download the checkpoint again"


def check_scales(used: Used, config: ConfigFile, section: Section) -> None:
    """Read the scales and the packed weights' shapes, and judge them."""
    stored = [tensor for tensor in used if is_scale(tensor.name) and tensor.dtype in FLOATS]
    with ThreadPoolExecutor(READERS) as pool:
        values = dict(zip(stored, pool.map(read_values, stored), strict=True))
    wrong = [text for tensor, value in values.items() if (text := _wrong(tensor.name, value))]
    if wrong:
        section.problem("scales", f"{len(wrong):,} hold values that are no scale", AGAIN, wrong)
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for tensor, value in values.items():
        if not _wrong(tensor.name, value):
            kinds[re.sub(r"\d+", "*", tensor.name)][tensor.name] = float(np.median(value))
    if odd := [text for group in kinds.values() for text in _odd(group)]:
        text = (
            f"{len(odd):,} are {ODD_FACTOR:,} times larger or smaller than the same scale of other layers and experts"
        )
        section.warning("scales", text, f"compare their weights with the BF16 checkpoint's; or {AGAIN}", odd)
    _check_shapes(used, config, section)
    if values and not wrong:
        least = min(float(value.min()) for value in values.values())
        most = max(float(value.max()) for value in values.values())
        section.ok("scales", f"{len(values):,} tensors, from {least:.2g} to {most:.2g}")


def read_values(tensor: StoredTensor) -> np.ndarray:
    """The values of a small tensor, in float32 if it is of floats, flat."""
    raw = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.start)
    if tensor.dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype in ("I32", "I64"):
        return raw.view(np.int32 if tensor.dtype == "I32" else np.int64)
    return raw.view(np.float16 if tensor.dtype == "F16" else np.float32).astype(np.float32)


def _wrong(name: str, values: np.ndarray) -> str:
    bad = values[~(np.isfinite(values) & (values > 0))]
    if not bad.size:
        return ""
    count = "" if values.size == 1 else f", one of {bad.size:,} in {values.size:,}"
    return f"{name} is {bad[0]:g}{count}"


def _odd(group: dict[str, float]) -> Iterable[str]:
    middle = median(group.values())
    for name, value in group.items():
        if not middle / ODD_FACTOR <= value <= middle * ODD_FACTOR:
            yield f"{name} is {value:.3g}, usually {middle:.3g}"


def _check_shapes(used: Used, config: ConfigFile, section: Section) -> None:
    assert config.network is not None
    shapes = expected_tensors(config.network)
    wrong = []
    for tensor in used:
        stem, _, kind = tensor.name.rpartition(".")
        if kind == "weight_shape" and tensor.dtype in ("I32", "I64"):
            says, is_ = read_values(tensor).tolist(), list(shapes[f"{stem}.weight"])
            if says != is_:
                wrong.append(f"{tensor.name} says {says}, the weight is {is_}")
    if wrong:
        section.problem("weight_shape", f"{len(wrong):,} contradict config.json", AGAIN, wrong)
