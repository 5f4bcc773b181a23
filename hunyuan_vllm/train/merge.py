"""Merge a LoRA adapter into its checkpoint, one tensor in memory at a time"""

import hashlib
from collections.abc import Iterator
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
from hunyuan_vllm.checkpoint import INDEX_FILE, check_headers
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout, expected_tensors
from hunyuan_vllm.quantize.formats import Spec, in_blocks
from hunyuan_vllm.quantize.source import Source, Unit
from hunyuan_vllm.quantize.writer import (
    REMEDY,
    Shard,
    ShardWriter,
    Workspace,
    check_bits,
    index_of,
    plan_shards,
    reading_back,
)
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress

SAVE_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Fields of PEFT's LoraConfig under which an adapter is not W + scale · B·A.
NOT_PLAIN = {
    "use_dora": "DoRA rescales whole columns",
    "use_qalora": "QALoRA groups the inputs",
    "lora_bias": "its B has a bias, which the network cannot hold",
    "fan_in_fan_out": "its matrices are transposed",
    "layer_replication": "it repeats layers of the network",
    "megatron_config": "its matrices are split for tensor parallelism",
    "modules_to_save": "it holds whole modules besides",
    "trainable_token_indices": "it holds rows of the embedding besides",
    "target_parameters": "it acts on parameters, not on modules",
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it chooses among several adapters, token by token",
    "monteclora_config": "its weights are random",
    "velora_config": "it is not a plain adapter",
    "use_bdlora": "its matrices are block-diagonal",
}
# Initialisations that change the network's own weights, which the adapter then belongs to.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_mergeable(config: AdapterConfig, file: Path) -> None:
    """Refuse an adapter that is not W + scale · B·A."""
    for field, reason in NOT_PLAIN.items():
        if value := (config.model_extra or {}).get(field):
            raise UserError(f"{file}: {field} is {value!r}: {reason}, which cannot be merged into one weight")
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
                absent = "B" if present == "A" else "A"
                raise UserError(f"{self._file}: {module} has an {present} and no {absent}: the file is incomplete")
            weight = f"{module}.weight"
            if weight not in expected or len(expected[weight]) != 2 or module == "model.embed_tokens":
                raise UserError(f"{self._file}: {_no_base(module, config)}")
            self._check_shapes(module, shapes[pair["A"]], shapes[pair["B"]], expected[weight])
            yield weight, Change(pair["A"], pair["B"], self._config.scale(module))

    def _check_shapes(self, module: str, a: tuple[int, ...], b: tuple[int, ...], weight: tuple[int, ...]) -> None:
        rank = self._config.rank(module)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(
                f"{self._file}: A of {module} is {list(a)} and B is {list(b)}: no product of the two exists"
            )
        if a[0] != rank:
            raise UserError(
                f"{self._file}: {module} has rank {a[0]}, and {ADAPTER_CONFIG} says {rank}: they do not belong together"
            )
        if (b[0], a[1]) != weight:
            raise UserError(
                f"{self._file}: {module} is an adapter of a weight {[b[0], a[1]]}, and this network's is "
                f"{list(weight)}: it was trained on another model"
            )


def _no_base(module: str, config: HunYuanConfig) -> str:
    """Why a module has no weight to be merged into."""
    if module == "lm_head":
        return "lm_head: this network's head is its embedding, and an adapter of only one of the two cannot be merged"
    if module == "model.embed_tokens":
        return "model.embed_tokens: an adapter of the embedding is not merged"
    return absent(module, config)


class Merge:
    """One run of the command.

    Every file is read back, compared bit by bit with its tensors computed again, and only then renamed. A run that was
    killed continues after the last complete file and produces the same bytes.

    Args:
        source: the checkpoint, in any spelling that layout.py reads; what is written has the published names.
        save_dtype: of all tensors but the routers, which keep a wider type of their own.
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

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that are written."""
        return sum(shard.nbytes for shard in self._shards)

    def run(self) -> None:
        """Merge."""
        if self._target.resolve() in (self._source.directory.resolve(), self._adapter.directory.resolve()):
            raise UserError(f"--output_path {self._target} is an input: name another directory")
        if self._target.is_dir() and not any(self._target.iterdir()):
            self._target.rmdir()
        with Workspace(self._target, self._record()) as workspace:
            left = workspace.unwritten(self._shards)
            unwritten = sum(shard.nbytes for shard in left)
            others = sum(file.stat().st_size for file in self._source.other_files())
            workspace.need_room(unwritten + others, "merging", "an --output_path")
            if workspace.resumed:
                self._progress.say(f"continuing with the finished files in {workspace.directory}")
            done = self.nbytes - unwritten
            with self._progress.stage("merging", 2 * self.nbytes, 2 * done):
                for shard in left:
                    self._write(workspace, shard)
            self._write_the_rest(workspace)
            try:
                check_headers(workspace.checkpoint, Layout(self._source.config))
            except CheckpointError as error:
                raise UserError(f"{error}: {REMEDY}") from None
            workspace.finish()

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

    def _write(self, workspace: Workspace, shard: Shard) -> None:
        partial = workspace.beside(workspace.checkpoint / shard.file)
        with ShardWriter(partial, shard.specs) as writer:
            for spec in shard.specs:
                tensor = self.tensor(spec.name)
                writer.write(spec.name, tensor)
                self._progress.advance(tensor.nbytes)
        with reading_back(partial, shard) as tensors:
            for spec in shard.specs:
                tensor = tensors.get_tensor(spec.name)
                check_bits(partial, spec.name, tensor, self.tensor(spec.name))
                self._progress.advance(tensor.nbytes)
        workspace.put(partial, workspace.checkpoint / shard.file)

    def _write_the_rest(self, workspace: Workspace) -> None:
        directory = workspace.checkpoint
        for file in self._source.other_files():
            workspace.copy(file, directory / file.name)
        if len(self._shards) > 1:
            workspace.write_json(directory / INDEX_FILE, index_of(self._shards))
        field = "dtype" if "dtype" in self._source.json else "torch_dtype"
        config = {**self._source.json, field: str(self._dtype).removeprefix("torch.")}
        workspace.write_json(directory / "config.json", config)
