"""Merge a LoRA adapter into its checkpoint, one tensor in memory at a time"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hunyuan_vllm.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    MODULE,
    AdapterConfig,
    absent,
    read_adapter_config,
    read_shapes,
)
from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout, expected_tensors
from hunyuan_vllm.quantize.formats import Spec, in_blocks
from hunyuan_vllm.quantize.source import Source, Unit
from hunyuan_vllm.quantize.writer import REMEDY, Shard, Workspace, check_bits, plan_shards, reading_back
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress

SAVE_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Fields of PEFT's LoraConfig under which an adapter is not W + scale · B·A.
NOT_PLAIN = (
    "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "layer_replication", "megatron_config", "modules_to_save",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config", "monteclora_config",
    "velora_config", "use_bdlora",
)  # fmt: skip
# Initialisations that change the network's own weights, which the adapter then belongs to.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_mergeable(config: AdapterConfig, file: Path) -> None:
    """Refuse an adapter that is not W + scale · B·A."""
    for field in NOT_PLAIN:
        if value := (config.model_extra or {}).get(field):
            raise UserError(f"{file}: {field} is {value!r}: only plain LoRA, W + scale·B·A, can be merged")
    if config.bias != "none":
        raise UserError(f"{file}: bias is {config.bias!r}: the network has no bias to add it to")
    start = str(config.init_lora_weights).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights is {start!r}, which changed the network's own weights: save the adapter "
            "converted to a plain one (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )


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
    """An adapter's directory. Only headers are read until a pair is asked for.

    Attributes:
        changes: canonical name of each weight that it changes, and how.
    """

    def __init__(self, directory: Path, config: HunYuanConfig) -> None:
        self.directory = directory
        self._config = read_adapter_config(directory)
        check_mergeable(self._config, directory / ADAPTER_CONFIG)
        self._file = directory / ADAPTER_FILE
        if not self._file.exists():
            other = next((file.name for file in sorted(directory.glob("adapter_model.*"))), None)
            found = f"only {other}: save it as safetensors (PEFT: safe_serialization=True)" if other else "no weights"
            raise UserError(f"{directory} has no {ADAPTER_FILE}, {found}")
        shapes = read_shapes(self._file)
        expected = expected_tensors(config)
        self.changes = dict(self._changes(shapes, config, expected))
        if not self.changes:
            raise UserError(f"{self._file} holds no LoRA matrix")

    def delta(self, name: str) -> tuple[Tensor, Tensor]:
        """scale · B `[out, rank]` and A `[rank, in]` of a weight, in float32."""
        change = self.changes[name]
        try:
            with safe_open(self._file, framework="pt") as tensors:
                a, b = (tensors.get_tensor(half).float() for half in (change.a, change.b))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file} can no longer be read: {error}") from None
        for half, tensor in ((change.a, a), (change.b, b)):
            if not torch.isfinite(tensor).all():
                raise UserError(f"{half!r} in {self._file} holds NaN or infinite values: the training has diverged")
        return b * change.scale, a

    def fingerprint(self) -> str:
        """Changes when the adapter does."""
        digest = hashlib.sha256((self.directory / ADAPTER_CONFIG).read_bytes())
        with self._file.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _changes(
        self, shapes: dict[str, tuple[int, ...]], config: HunYuanConfig, expected: dict[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Change]]:
        halves: dict[str, dict[str, str]] = {}
        for name in shapes:
            match = MODULE.match(name)
            if match is None:
                raise UserError(f"{self._file}: {name!r} is not A or B of a linear layer, and cannot be merged")
            halves.setdefault(match["module"], {})[match["half"]] = name
        for module, pair in halves.items():
            if len(pair) == 1:
                (present,) = pair
                other = "B" if present == "A" else "A"
                raise UserError(f"{self._file}: {module} has an {present} and no {other}: the file is incomplete")
            weight = f"{module}.weight"
            if module == "model.embed_tokens" or (module == "lm_head" and weight not in expected):
                raise UserError(f"{self._file}: {module}: an adapter of the embedding is not merged: train it without")
            if len(expected.get(weight, ())) != 2:
                raise UserError(f"{self._file}: {absent(module, config)}")
            a, b, rank = shapes[pair["A"]], shapes[pair["B"]], self._config.rank(module)
            if (a, b) != ((rank, expected[weight][1]), (expected[weight][0], rank)):
                raise UserError(
                    f"{self._file}: {module} has A {list(a)} and B {list(b)}, which do not fit rank {rank} of "
                    f"{ADAPTER_CONFIG} and this network's weight {list(expected[weight])}: the files do not belong "
                    "together, or the adapter was trained on another model"
                )
            yield weight, Change(pair["A"], pair["B"], self._config.scale(module))


class Merge:
    """One run of the command.

    Every file is read back, compared bit by bit with its tensors computed again, and only then renamed. A run that was
    killed continues after the last complete file and produces the same bytes.

    Args:
        source: the checkpoint, in any spelling that layout.py reads; what is written has the published names.
        save_dtype: of all tensors but the routers, which keep a wider type of their own.

    Attributes:
        nbytes: bytes of tensors that are written.
    """

    def __init__(
        self,
        source: Source,
        adapter: Adapter,
        target: Path,
        save_dtype: torch.dtype,
        shard_bytes: int = 5 * 10**9,
        progress: Progress | None = None,
    ) -> None:
        self._source, self._adapter, self._target, self._dtype = source, adapter, target, save_dtype
        self._progress = progress or Progress(Console(quiet=True))
        units = (Unit((name,), quantised=False) for name in source.shapes)
        self._shards = plan_shards(((unit, [self._spec(*unit.names)]) for unit in units), shard_bytes)
        self._shard_bytes = shard_bytes
        self.nbytes = sum(shard.nbytes for shard in self._shards)

    def run(self) -> None:
        """Merge."""
        source, target = self._source, self._target
        if target.resolve() in (source.directory.resolve(), self._adapter.directory.resolve()):
            raise UserError(f"--output_path {target} is an input: name another directory")
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        with Workspace(target, self._record()) as workspace:
            workspace.need_room(source, self._shards, 0, "merging", "an --output_path")
            if workspace.resumed:
                self._progress.say(f"continuing with the finished files in {workspace.directory}")
            workspace.write_checkpoint(source, self._shards, self._merged, self._verify, self._progress, "merging")
            field = "dtype" if "dtype" in source.json else "torch_dtype"
            config = {**source.json, field: str(self._dtype).removeprefix("torch.")}
            workspace.write_json(workspace.checkpoint / "config.json", config)
            try:
                check_headers(workspace.checkpoint, Layout(source.config))
            except CheckpointError as error:
                raise UserError(f"{error}: {REMEDY}") from None
            workspace.finish()

    def _merged(self, unit: Unit) -> list[tuple[str, Tensor]]:
        return [(name, self.tensor(name)) for name in unit.names]

    def _verify(self, file: Path, shard: Shard, verified: Callable[[Unit], None]) -> None:
        with reading_back(file, shard) as tensors:
            for unit in shard.units:
                for name, wanted in self._merged(unit):
                    check_bits(file, name, tensors.get_tensor(name), wanted)
                verified(unit)

    def tensor(self, name: str) -> Tensor:
        wide, dtype = self._source.read(name), self._spec(name).dtype
        if name not in self._adapter.changes:
            written = wide.to(dtype)
        else:
            b, a = self._adapter.delta(name)
            written = torch.empty(wide.shape, dtype=dtype)

            def block(rows: slice) -> None:
                written[rows] = torch.addmm(wide[rows].float(), b[rows], a).to(dtype)

            in_blocks(wide, block)
        if dtype == torch.float16 and not torch.isfinite(written).all():
            raise UserError(f"{name!r} has values beyond 65,504, the maximum of fp16: use --save_dtype bf16")
        return written

    def _spec(self, name: str) -> Spec:
        dtype = self._dtype
        if name.endswith(".gate.wg.weight"):  # rounding it would change routes
            dtype = torch.promote_types(dtype, self._source.dtype(name))
        return Spec(name, dtype, self._source.shapes[name])

    def _record(self) -> dict[str, Any]:
        """What a run must have in common with the one it continues."""
        return {
            "a --base_model_path of contents": self._source.fingerprint()[:12],
            "an --adapter_model_path of contents": self._adapter.fingerprint()[:12],
            "--save_dtype": str(self._dtype).removeprefix("torch."),
            "shards of bytes": self._shard_bytes,
        }
