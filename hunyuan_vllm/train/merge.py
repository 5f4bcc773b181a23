"""Merge an adapter into its checkpoint, one tensor in memory at a time"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hunyuan_vllm.checkpoint import INDEX_FILE, check_headers
from hunyuan_vllm.layout import CheckpointError, Layout
from hunyuan_vllm.quantize.formats import Spec, in_blocks
from hunyuan_vllm.quantize.source import Source, Unit
from hunyuan_vllm.quantize.writer import Shard, ShardWriter, Workspace, index_of, plan_shards
from hunyuan_vllm.train.adapter import Adapter
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress

SAVE_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REMEDY: Final = "the disk or the memory is at fault; run the same command again"


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
        self._source_is_not_target()
        if self._target.is_dir() and not any(self._target.iterdir()):
            self._target.rmdir()
        with Workspace(self._target, self._record()) as workspace:
            left = workspace.unwritten(self._shards)
            unwritten = sum(shard.nbytes for shard in left)
            others = sum(file.stat().st_size for file in self._source.other_files())
            workspace.need_room(unwritten + others, "merging", "an --output_path")
            if workspace.resumed:
                self._progress.say(f"continuing with the finished files in {workspace.folder}")
            done = self.nbytes - unwritten
            with self._progress.stage("merging", 2 * self.nbytes, 2 * done):
                for shard in left:
                    self._write(workspace, shard)
            self._write_the_rest(workspace)
            self._check_complete(workspace.checkpoint)
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
            "--shard_size": self._shard_bytes,
        }

    def _source_is_not_target(self) -> None:
        if self._target.resolve() in (self._source.folder.resolve(), self._adapter.folder.resolve()):
            raise UserError(f"--output_path {self._target} is an input: name another folder")

    def _write(self, workspace: Workspace, shard: Shard) -> None:
        partial = workspace.beside(workspace.checkpoint / shard.file)
        with ShardWriter(partial, shard.specs) as writer:
            for spec in shard.specs:
                tensor = self.tensor(spec.name)
                writer.write(spec.name, tensor)
                self._progress.advance(tensor.nbytes)
        left = {spec.name for spec in shard.specs}
        for name, tensor in _read_back(partial):
            if name not in left or not _same_bits(tensor, self.tensor(name)):
                raise UserError(f"{partial}: {name} reads back differently: {REMEDY}")
            left.remove(name)
            self._progress.advance(tensor.nbytes)
        if left:
            raise UserError(f"{partial} reads back without {min(left)}: {REMEDY}")
        workspace.put(partial, workspace.checkpoint / shard.file)

    def _write_the_rest(self, workspace: Workspace) -> None:
        folder = workspace.checkpoint
        for file in self._source.other_files():
            workspace.copy(file, folder / file.name)
        if len(self._shards) > 1:
            workspace.write_json(folder / INDEX_FILE, index_of(self._shards))
        field = "dtype" if "dtype" in self._source.json else "torch_dtype"
        config = {**self._source.json, field: str(self._dtype).removeprefix("torch.")}
        workspace.write_json(folder / "config.json", config)

    def _check_complete(self, folder: Path) -> None:
        """Raise UserError unless the headers hold exactly the network's tensors."""
        try:
            check_headers(folder, Layout(self._source.config))
        except CheckpointError as error:
            raise UserError(f"{error}: {REMEDY}") from None


def _read_back(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read back ({error}): {REMEDY}") from None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """As integers, so that a zero's sign counts."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    kind = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return torch.equal(a.view(kind), b.contiguous().view(kind))
