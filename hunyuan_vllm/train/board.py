"""TensorBoard's files of a run: transformers' scalars, and the share of the tokens that each expert was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.integrations import TensorBoardCallback

if TYPE_CHECKING:
    from hunyuan_vllm.train.trainer import HunYuanTrainer

__all__ = ["Board"]


class Board(TensorBoardCallback):
    """Writes to `folder`; `watch` it a trainer before it trains."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.logging_dir = folder
        self._trainer: HunYuanTrainer | None = None

    def watch(self, trainer: HunYuanTrainer) -> None:
        """Take the experts' shares from `trainer`."""
        self._trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        super().on_log(args, state, control, logs=logs, **others)
        if self.tb_writer is None or self._trainer is None or "loss" not in (logs or {}):
            return
        for layer, shares in self._trainer.expert_shares.items():
            for expert, share in enumerate(shares):
                self.tb_writer.add_scalar(f"expert_load/layer_{layer}/expert_{expert}", share, state.global_step)
            self.tb_writer.add_scalar(f"expert_load_max/layer_{layer}", max(shares), state.global_step)
