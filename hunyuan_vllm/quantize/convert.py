"""A conversion from start to end: look at everything, calibrate, write file by file, read back, report, rename."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hunyuan_vllm.checkpoint import INDEX_FILE
from hunyuan_vllm.quant.schemes import WRITTEN, find_scheme
from hunyuan_vllm.quantize import verify
from hunyuan_vllm.quantize.calibrate import Calibration
from hunyuan_vllm.quantize.encode import ActivationScales, Encoder, specs_of
from hunyuan_vllm.quantize.estimate import state_bytes
from hunyuan_vllm.quantize.formats import scheme_named
from hunyuan_vllm.quantize.options import Options
from hunyuan_vllm.quantize.smooth import Migration
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.quantize.texts import Tokens, calibration_tokens
from hunyuan_vllm.quantize.units import kept_linears, units
from hunyuan_vllm.quantize.verify import Verifier
from hunyuan_vllm.quantize.writer import Shard, ShardWriter, Workspace, index_of, plan_shards
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import gigabytes

__all__ = ["Conversion", "quantize_checkpoint"]

REPORT = "quantize_report.json"


def quantize_checkpoint(
    src: Path,
    dst: Path,
    scheme: str,
    *,
    calibration: Path | Sequence[Sequence[int]] | None = None,
    calibration_tokens: int = 8192,
    headroom: float = 2.0,
    clip: str = "max",
    smooth: float | None = None,
    shard_bytes: int = 5 * 10**9,
    device: str = "cpu",
    console: Console | None = None,
) -> dict[str, Any]:
    """Convert the BF16 checkpoint in `src` to `scheme`, in `dst`, which must not exist; returns the error report.

    A run that was killed goes on where it stopped when it is started again alike.

    Args:
        scheme: "fp8", "int8" or "int8-w8a8".
        calibration: a text file or a JSONL file of chats, or documents as token ids; None for the built-in text.
        calibration_tokens: most tokens that calibration reads.
        headroom: how many times what calibration saw at most the static input and V scales reach.
        clip: "max" or "mse", for weight scales.
        smooth: SmoothQuant's α; None for no migration of outliers.
        shard_bytes: most bytes of a file.
        device: where the arithmetic runs, as torch names it.
        console: where progress is shown; None for silence.

    Raises:
        UserError: something given is of no use, or the disk is; one line that names it.
    """
    scheme = find_scheme(scheme, WRITTEN).name
    options = Options(scheme, clip, smooth, calibration_tokens, headroom, shard_bytes, device)
    progress = Progress(console or Console(quiet=True))
    return Conversion(Source(src), dst.absolute(), options, calibration, progress).run()


class Conversion:
    """One run of the command; arguments as `quantize_checkpoint` has them."""

    def __init__(
        self,
        source: Source,
        target: Path,
        options: Options,
        calibration: Path | Sequence[Sequence[int]] | None,
        progress: Progress,
    ) -> None:
        self._source, self._target, self._options, self._progress = source, target, options, progress
        self._scheme = scheme_named(options.scheme)
        self._scheme.check(source.config)
        if options.smooth is not None and torch.float16 in map(source.dtype, source.shapes):
            raise UserError("--smooth: float16 weights have no room for it; give the BF16 checkpoint")
        all_units = units(source.config)
        specs = partial(specs_of, scheme=self._scheme, shapes=source.shapes, dtype=source.dtype)
        self._shards = plan_shards(((unit, specs(unit)) for unit in all_units), options.shard_bytes)
        self._calibration_given = calibration
        self._migration: Migration | None = None
        self._activations: ActivationScales | None = None
        self._idle_experts: list[dict[str, int]] = []
        self._tensors_done = 0

    def run(self) -> dict[str, Any]:
        """Convert; returns the report."""
        tokens = None
        if self._options.calibrates:
            tokens = calibration_tokens(
                self._source.folder,
                self._source.config.vocab_size,
                self._calibration_given,
                self._options.calibration_tokens,
            )
        with Workspace(self._target, self._record(tokens)) as workspace:
            self._check_disk(workspace, tokens)
            self._announce(workspace, tokens)
            if tokens is not None:
                self._calibrate(workspace, tokens)
            self._write_shards(workspace)
            made = verify.assemble(self._facts(tokens), self._measured(workspace))
            self._write_the_rest(workspace, made)
            workspace.finish()
        return made

    def _record(self, tokens: Tokens | None) -> dict[str, Any]:
        """What a run that goes on with another's work must have in common with it."""
        options = self._options
        return {
            "an SRC of contents": self._source.fingerprint()[:12],
            "--scheme": options.scheme,
            "--clip": options.clip,
            "--smooth": options.smooth,
            "--headroom": options.headroom,
            "--shard-size": options.shard_bytes,
            "calibration tokens": tokens and f"{tokens.ids.numel()} (contents {tokens.digest()[:12]})",
        }

    def _announce(self, workspace: Workspace, tokens: Tokens | None) -> None:
        if workspace.resumed:
            self._progress.say(f"going on with what is finished in {workspace.folder}")
        size = gigabytes(sum(map(self._source.nbytes, self._source.shapes)))
        text = f", calibrated on {tokens.ids.numel():,} tokens" if tokens else ""
        self._progress.say(f"{self._options.scheme}: {size} in {len(self._source.shapes):,} tensors{text}")

    def _check_disk(self, workspace: Workspace, tokens: Tokens | None) -> None:
        needed = sum(shard.nbytes for shard in workspace.unwritten(self._shards))
        needed += sum(file.stat().st_size for file in self._source.other_files())
        if tokens is not None:
            needed += state_bytes(self._source.config, tokens.ids.numel()) - workspace.state_bytes()
        workspace.need_room(needed, "the conversion", "a DST")

    def _calibrate(self, workspace: Workspace, tokens: Tokens) -> None:
        config = self._source.config
        calibration = Calibration(self._source, workspace)
        calibration.run(tokens, self._options.device, self._progress)
        if self._options.smooth is not None:
            self._migration = Migration(config, self._options.smooth, calibration.layer)
        self._activations = ActivationScales(config, calibration.layer, self._migration, self._options.headroom)
        self._idle_experts = calibration.idle_experts()

    def _read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        return self._migration.apply(name, tensor) if self._migration else tensor

    def _write_shards(self, workspace: Workspace) -> None:
        names = [name for shard in self._shards for unit in shard.units for name in unit.names]
        left = workspace.unwritten(self._shards)
        unfinished = {name for shard in left for unit in shard.units for name in unit.names}
        total = sum(map(self._source.nbytes, names))
        done = total - sum(map(self._source.nbytes, unfinished))
        with self._progress.stage("quantising", total, done):
            self._tensors_done = len(names) - len(unfinished)
            for shard in left:
                self._write_shard(workspace, shard)

    def _write_shard(self, workspace: Workspace, shard: Shard) -> None:
        partial_file = workspace.beside(workspace.checkpoint / shard.file)
        encoder = Encoder(self._scheme, self._options.clip, self._read, self._activations, self._options.device)
        with ShardWriter(partial_file, shard.specs) as writer:
            for unit in shard.units:
                for name, tensor in encoder.tensors(unit):
                    writer.write(name, tensor)
                for name in unit.names:
                    self._progress.advance(self._source.nbytes(name) // 2)
        verifier = Verifier(self._scheme, self._read, self._activations, self._options.device)
        measured = verifier.check(partial_file, shard, self._verified)
        workspace.write_json(workspace.state / f"{shard.file}.json", [asdict(one) for one in measured])
        workspace.put(partial_file, workspace.checkpoint / shard.file)

    def _verified(self, name: str) -> None:
        self._tensors_done += 1
        whole = self._source.nbytes(name)
        self._progress.advance(whole - whole // 2, f"{self._tensors_done:,} of {len(self._source.shapes):,} tensors")

    def _measured(self, workspace: Workspace) -> Iterator[dict[str, Any]]:
        for shard in self._shards:
            yield from json.loads((workspace.state / f"{shard.file}.json").read_text())

    def _facts(self, tokens: Tokens | None) -> dict[str, Any]:
        source, options = self._source, self._options
        facts: dict[str, Any] = {
            "scheme": options.scheme,
            "source": source.folder.resolve().name,
            "clip": options.clip,
            "smooth": options.smooth,
            "headroom": options.headroom if self._scheme.static_inputs else None,
            "source_bytes": sum(map(source.nbytes, source.shapes)),
            "written_bytes": sum(shard.nbytes for shard in self._shards),
            "calibration": None,
        }
        if tokens is not None:
            given = self._calibration_given
            text = "built-in text" if given is None else given.name if isinstance(given, Path) else "token ids"
            facts["calibration"] = {"text": text, "tokens": tokens.ids.numel(), "idle_experts": self._idle_experts}
        return facts

    def _write_the_rest(self, workspace: Workspace, made: dict[str, Any]) -> None:
        folder, source = workspace.checkpoint, self._source
        for file in source.other_files():
            workspace.copy(file, folder / file.name)
        if len(self._shards) > 1:
            workspace.write_json(folder / INDEX_FILE, index_of(self._shards))
        scheme = self._scheme.config(kept_linears(source.config))
        workspace.write_json(folder / "config.json", {**source.json, "quantization_config": scheme})
        workspace.write_json(folder / REPORT, made)
