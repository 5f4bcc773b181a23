"""Worker extension (vLLM's --worker-extension-cls) that records a model's logits, or compares them with a record.

The whole vocabulary is compared at every token, one block of rows at a time. A record holds the logits in the engine's
own type, on the disk of the rank that has them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

BLOCK_BYTES = 32 << 20  # of one [rows, vocab] float32 tensor; half a dozen of them are alive at once

Scores = dict[str, list[float]]


class Recorder:
    """Methods of every worker, for `LLM.collective_rpc`. `quality_open` first; then for each passage `quality` calls
    `Recording.begin`, and, after a request whose prompt is the passage, `Recording.end`; at last `Recording.close`."""

    get_model: Callable[[], Any]  # the worker's

    def quality_open(self, file: str, format: tuple[int, str] | None) -> None:
        self._quality = Recording(self.get_model(), Path(file), format)

    @torch.inference_mode()
    def quality(self, method: str, *args: Any) -> Any:
        return getattr(self._quality, method)(*args)


class Recording:
    """The record of one engine.

    Args:
        format: vocabulary size and type of the logits of the record to compare with; None writes a new one.
    """

    def __init__(self, model: Any, file: Path, format: tuple[int, str] | None) -> None:
        self._model, self._format = model, format
        # All ranks take part in computing logits; one has them and works with them.
        self._reports = get_pp_group().is_last_rank and get_tensor_model_parallel_rank() == 0
        self._file: BinaryIO | None = None
        if self._reports:
            self._file = file.open("rb" if format else "wb")
        self._hidden: Tensor | None = None  # [tokens, hidden]
        self._seen = torch.zeros(0, dtype=torch.bool)
        self._hook = model.register_forward_hook(self._take, with_kwargs=True)

    def begin(self, length: int) -> None:
        """A passage of `length` tokens comes next."""
        self._seen = torch.zeros(length, dtype=torch.bool)
        self._hidden = None

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the hidden states of one engine step, which may hold only a part of the passage, and padding."""
        if not isinstance(output, Tensor):  # of an earlier pipeline stage
            return
        positions: Tensor = kwargs["positions"]
        steps = torch.arange(len(positions), device=positions.device)
        start = int(positions[0])
        # Padding has other positions, or ones that a later step overwrites.
        count = int((positions == start + steps).long().cumprod(0).sum())
        count = min(count, len(self._seen) - start)
        if count <= 0:
            return
        if self._hidden is None:
            self._hidden = output.new_empty(len(self._seen), output.shape[-1])
        self._hidden[start : start + count] = output[:count]
        self._seen[start : start + count] = True

    def end(self, scored: list[int], ids: list[int]) -> tuple[tuple[int, str], Scores] | None:
        """Scores of the `scored` tokens of the passage `ids`, and the (vocabulary size, type) of its logits.

        None from all ranks but the one that has the logits.
        """
        if not get_pp_group().is_last_rank:
            return None
        rows = torch.tensor(scored) - 1  # a token's distribution is computed at the one before it
        if self._hidden is None or not bool(self._seen[rows].all()):
            raise RuntimeError("the model's output was not seen at every token: try it with --enforce-eager")
        targets = torch.tensor(ids)[torch.tensor(scored)]
        step = max(1, BLOCK_BYTES // (4 * self._model.config.vocab_size))
        format = None
        scores: Scores = {}
        for block, wanted in zip(rows.split(step), targets.split(step), strict=True):
            logits = self._model.compute_logits(self._hidden[block.to(self._hidden.device)])
            if self._reports:
                format = (logits.shape[1], str(logits.dtype).removeprefix("torch."))
                for name, values in self._work(logits, wanted).items():
                    scores.setdefault(name, []).extend(values)
        return None if format is None else (format, scores)

    def _work(self, logits: Tensor, targets: Tensor) -> Scores:
        """Write one block of logits, or compare it with the next one of the record."""
        assert self._file is not None
        if self._format is None:
            self._file.write(logits.contiguous().view(torch.uint8).cpu().numpy().data)
            return score_block(logits, targets)
        vocab, dtype = self._format
        if vocab != logits.shape[1]:
            raise ValueError(f"the vocabularies differ: {vocab} and {logits.shape[1]} tokens")
        kind: torch.dtype = getattr(torch, dtype)
        size = len(targets) * vocab * kind.itemsize
        data = bytearray(self._file.read(size))
        if len(data) < size:
            raise ValueError(f"the record {self._file.name} ends too early")
        kept = torch.frombuffer(data, dtype=kind).view(len(targets), vocab).to(logits.device)
        return score_block(logits, targets, kept)

    def close(self) -> None:
        self._hook.remove()
        if self._file is not None:
            self._file.close()


def score_block(logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> Scores:
    """Scores of a block of logits, token by token, and its distance from a reference.

    Args:
        logits, reference: [tokens, vocab], any floating type.
        targets: [tokens], the tokens that came.

    Returns:
        "nll": -log q(target); with a reference also "kl": sum over the vocabulary of p (log p - log q) in nats, where
        p is the reference's distribution, and "same": 1 if both have the same most likely token, else 0.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits are not finite")
    targets = targets.to(logits.device)
    log_q = logits.float().log_softmax(-1)
    scores = {"nll": -log_q.gather(1, targets[:, None])[:, 0]}
    if reference is not None:
        log_p = reference.float().log_softmax(-1)
        scores["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        scores["same"] = (reference.argmax(-1) == logits.argmax(-1)).float()
    return {name: values.tolist() for name, values in scores.items()}
