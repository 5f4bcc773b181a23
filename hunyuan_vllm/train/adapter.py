"""A LoRA adapter on disk, checked against the network it is for"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hunyuan_vllm.adapter import ADAPTER_CONFIG, ADAPTER_FILE, MODULE, absent, read_adapter_json
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.util.errors import UserError

# Fields of PEFT's LoraConfig that, where they are set, make of an adapter something that is not W + scale · B·A.
NOT_PLAIN = {
    "use_dora": "DoRA rescales whole columns",
    "use_qalora": "QALoRA groups the inputs",
    "lora_bias": "its B has a bias, for which the network has no place",
    "fan_in_fan_out": "its matrices are transposed",
    "layer_replication": "it repeats layers of the network",
    "megatron_config": "its matrices are cut for tensor parallelism",
    "modules_to_save": "it holds whole modules besides",
    "trainable_token_indices": "it holds rows of the embedding besides",
    "target_parameters": "it acts on parameters, not on modules",
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it chooses among several adapters, token by token",
    "monteclora_config": "its weights are random",
    "velora_config": "it is no plain adapter",
    "use_bdlora": "its matrices are block-diagonal",
}
# Initialisations that change the network's own weights: an adapter saved without conversion belongs to those.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterConfig(BaseModel):
    """What PEFT wrote, as far as it decides what an adapter computes.

    Attributes:
        r: rank.
        lora_alpha: numerator of the scale.
        rank_pattern, alpha_pattern: exceptions, by the end of a module's name or a regular expression for it.
        use_rslora: the scale is alpha / √r instead of alpha / r.
    """

    model_config = ConfigDict(extra="allow")

    peft_type: str
    r: int = Field(gt=0)
    lora_alpha: float
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True

    def rank(self, module: str) -> int:
        return self._exception(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What B·A is multiplied with."""
        rank, alpha = self.rank(module), self._exception(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def _exception(pattern: Mapping[str, Any], module: str, usual: Any) -> Any:
        """As PEFT looks it up: the first pattern that is the module's name or an end of it."""
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), usual)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config in an adapter's folder.

    Raises:
        UserError: there is none, it is not LoRA's, or of a kind that cannot be merged.
    """
    file = folder / ADAPTER_CONFIG
    given = read_adapter_json(folder)
    try:
        config = AdapterConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{file}: {field}: {first['msg']}") from None
    if config.peft_type != "LORA":
        raise UserError(f"{file}: peft_type is {config.peft_type!r}: only LORA is merged")
    for field, reason in NOT_PLAIN.items():
        if given.get(field):
            raise UserError(f"{file}: {field} is {given[field]!r}: {reason}, which cannot be merged into one weight")
    if config.bias != "none":
        raise UserError(f"{file}: bias is {config.bias!r}: it holds biases, for which the network has no place")
    start = str(config.init_lora_weights).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights is {start!r}, which changed the network's own weights: save the adapter "
            "converted to a plain one (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one weight: scale · B·A.

    Attributes:
        a: name in the adapter's file of A, `[rank, in]`.
        b: the same of B, `[out, rank]`.
    """

    a: str
    b: str
    scale: float


class Adapter:
    """An adapter's folder. Only headers are read until a pair is asked for.

    Args:
        folder: as PEFT saves it.
        config: the network it is to be merged into.

    Attributes:
        changes: canonical name of each weight that it changes, and how.

    Raises:
        UserError: it is for another network, damaged, or of a kind that cannot be merged; the message names the tensor.
    """

    def __init__(self, folder: Path, config: HunYuanConfig) -> None:
        self.folder = folder
        self._settings = read_adapter_config(folder)
        self._file = folder / ADAPTER_FILE
        if not self._file.exists():
            other = next((file.name for file in sorted(folder.glob("adapter_model.*"))), None)
            found = f"only {other}: save it as safetensors (PEFT: safe_serialization=True)" if other else "no weights"
            raise UserError(f"{folder} has no {ADAPTER_FILE}, {found}")
        shapes = self._shapes()
        expected = expected_tensors(config)
        self.changes = dict(self._changes(shapes, config, expected))
        if not self.changes:
            raise UserError(f"{self._file} holds no LoRA matrix")

    def delta(self, name: str) -> tuple[Tensor, Tensor]:
        """scale · B `[out, rank]` and A `[rank, in]` of a weight, in float32.

        Raises:
            UserError: they hold NaN or infinite values, or cannot be read any more.
        """
        change = self.changes[name]
        try:
            with safe_open(self._file, framework="pt") as tensors:
                a, b = (tensors.get_tensor(half).float() for half in (change.a, change.b))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file} cannot be read any more: {error}") from None
        for half, tensor in ((change.a, a), (change.b, b)):
            if not torch.isfinite(tensor).all():
                raise UserError(f"{half!r} in {self._file} holds NaN or infinite values: the training has diverged")
        return b * change.scale, a

    def fingerprint(self) -> str:
        """Changes when the adapter does."""
        digest = hashlib.sha256((self.folder / ADAPTER_CONFIG).read_bytes())
        with self._file.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        try:
            with safe_open(self._file, framework="pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file} is cut short or not a safetensors file ({error}): copy it again") from None

    def _changes(
        self, shapes: dict[str, tuple[int, ...]], config: HunYuanConfig, expected: dict[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Change]]:
        halves: dict[str, dict[str, str]] = {}
        for name in shapes:
            match = MODULE.match(name)
            if match is None:
                raise UserError(f"{self._file}: {name!r} is no A or B of a linear layer, and cannot be merged")
            halves.setdefault(match["module"], {})[match["half"]] = name
        for module, pair in halves.items():
            if len(pair) == 1:
                (present,) = pair
                absent = "B" if present == "A" else "A"
                raise UserError(f"{self._file}: {module} has an {present} and no {absent}: the file is incomplete")
            weight = f"{module}.weight"
            if weight not in expected or len(expected[weight]) != 2 or module == "model.embed_tokens":
                raise UserError(f"{self._file}: {_no_base(module, config)}")
            self._check_shapes(module, shapes[pair["A"]], shapes[pair["B"]], expected[weight])
            yield weight, Change(pair["A"], pair["B"], self._settings.scale(module))

    def _check_shapes(self, module: str, a: tuple[int, ...], b: tuple[int, ...], weight: tuple[int, ...]) -> None:
        rank = self._settings.rank(module)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(
                f"{self._file}: A of {module} is {list(a)} and B is {list(b)}: no product of the two exists"
            )
        if a[0] != rank:
            raise UserError(
                f"{self._file}: {module} has rank {a[0]}, and {ADAPTER_CONFIG} says {rank}: they are of two trainings"
            )
        if (b[0], a[1]) != weight:
            raise UserError(
                f"{self._file}: {module} is an adapter of a weight {[b[0], a[1]]}, and this network's is "
                f"{list(weight)}: it was trained on another model"
            )


def _no_base(module: str, config: HunYuanConfig) -> str:
    """Why a module has no weight to be merged into."""
    if module == "lm_head":
        return (
            "lm_head: this network's head is its embedding, and an adapter of it cannot be merged into one of the two"
        )
    if module == "model.embed_tokens":
        return "model.embed_tokens: an adapter of the embedding is not merged"
    return absent(module, config)
