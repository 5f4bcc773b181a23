"""The BF16 checkpoint that is read: what it holds, one tensor at a time under its canonical name, and its units:
tensors that are read together, because the engine fuses them under one scale.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hunyuan_vllm.checkpoint import INDEX_FILE, missing_weights, read_config, shard_files, used_tensors
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import FUSED, CheckpointError, Layout, expected_tensors
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.layouts import is_quantised
from hunyuan_vllm.util.errors import UserError

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_FUSED = {parts[0]: parts for parts in FUSED.values() if parts[0] != "up_proj"}  # by the first that is met
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class Place(NamedTuple):
    """Where a canonical tensor lies: in a file, under the file's own name, as one part of it."""

    file: Path
    stored: str
    dtype: torch.dtype


class Source:
    """A checkpoint directory, checked from its headers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.json, self.config = read_bf16_config(directory)
        self.shapes = expected_tensors(self.config)
        self._layout = Layout(self.config)
        try:
            used = used_tensors(directory, self._layout)
        except CheckpointError as error:
            raise UserError(str(error)) from None
        if not used:
            raise UserError(f"{directory} {': '.join(missing_weights(directory))}")
        self._places: dict[str, Place] = {}
        for tensor, names in used.items():
            self._places.update(dict.fromkeys(names, Place(tensor.file, tensor.name, DTYPES[tensor.dtype])))

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def nbytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        """A canonical tensor, mapped from its file where it is stored alone."""
        place = self._places[name]
        try:
            with safe_open(place.file, framework="pt") as tensors:
                parts = dict(self._layout.split(place.stored, tensors.get_tensor(place.stored)))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{place.file} cannot be read any more: {error}") from None
        tensor = parts[name]
        if not all(map(math.isfinite, tensor.aminmax())):  # NaN is the least and the greatest
            raise UserError(f"checkpoint tensor {name!r} in {place.file} holds NaN or infinite values")
        return tensor

    def fingerprint(self) -> str:
        """Changes when the config or a weight file does (by size and time of change)."""
        digest = hashlib.sha256(json.dumps(self.json, sort_keys=True).encode())
        for file in shard_files(self.directory):
            state = file.stat()
            digest.update(f"{file.name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def other_files(self) -> list[Path]:
        """What is copied as it is: everything at the top of the directory but the weights, their index, the config, and
        the hashes of these files."""
        skipped = {"config.json", INDEX_FILE, "SHA256SUMS"}
        return sorted(
            file
            for file in self.directory.iterdir()
            if file.is_file()
            and file.name not in skipped
            and not file.name.startswith(".")
            and not file.name.endswith((*WEIGHT_FILES, ".index.json", ".py"))
        )


def read_bf16_config(path: Path) -> tuple[dict[str, Any], HunYuanConfig]:
    """As `read_config`, of a checkpoint that is not quantised."""
    fields, _ = read_config(path)
    if method := fields.get("quantization_config"):
        name = method.get("quant_method", "") if isinstance(method, dict) else method
        raise UserError(f"{path} is already quantised ({name}): give the BF16 checkpoint")
    return fields, HunYuanConfig(**fields)


@dataclass(frozen=True)
class Unit:
    """Canonical names of the tensors that are converted together: all weights of one fused projection, or one tensor
    that stays as it is."""

    names: tuple[str, ...]
    quantised: bool

    @property
    def owned_cache(self) -> str | None:
        """The attention whose cache holds what it projects; None unless it projects to K and V."""
        end = ".v_proj.weight"
        return next((name.removesuffix(end) for name in self.names if name.endswith(end)), None)


def units(config: Network) -> Iterator[Unit]:
    """Every tensor of the network, in its order, each in one unit."""
    expected = expected_tensors(config)
    done: set[str] = set()
    for name in expected:
        if name in done:
            continue
        if not is_quantised(name):
            yield Unit((name,), quantised=False)
            continue
        stem, projection = name.removesuffix(".weight").rsplit(".", 1)
        fused = tuple(f"{stem}.{part}.weight" for part in _FUSED.get(projection, (projection,)))
        names = tuple(part for part in fused if part in expected)
        done.update(names)
        yield Unit(names, quantised=True)


def layer_of(name: str) -> int | None:
    """The decoder layer a canonical name belongs to."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def place(name: str) -> tuple[int, str]:
    """Layer of a canonical name of a decoder layer, and its name within that layer."""
    match = _LAYER.match(name)
    assert match is not None, name
    return int(match[1]), name[match.end() :]


def input_of(weight: str) -> str:
    """What the inputs of a weight's projection are known by: the projection whose inputs they are, without layer, and
    one name for all experts of a layer, which the engine runs under one input scale.

    `self_attn.q_proj`, `self_attn.o_proj`, `mlp.experts.gate_proj`, `mlp.shared_mlp.down_proj`, …
    """
    name = _LAYER.sub("", weight).removesuffix(".weight")
    name = re.sub(r"\.experts\.\d+\.", ".experts.", name)
    name = re.sub(r"\.[kv]_proj$", ".q_proj", name)
    return name.replace(".up_proj", ".gate_proj")


def kept_linears(config: Network) -> list[str]:
    """The linear layers that are not quantised: the head, and each router."""
    routers = [name.removesuffix(".weight") for name in expected_tensors(config) if name.endswith(".gate.wg.weight")]
    return ["lm_head", *routers]
