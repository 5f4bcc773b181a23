"""transformers' Trainer with the balance loss and the experts' load"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.integrations import TensorBoardCallback

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.train.checkpoints import STAGING, name_whole, remove_old, saving
from hunyuan_vllm.train.export import as_published

if TYPE_CHECKING:
    pass


def moe_layers(config: HunYuanConfig) -> list[int]:
    """The layers that have a router, in the order of a model's `router_logits`."""
    return [layer for layer in range(config.num_hidden_layers) if config.experts_at(layer) > 1]


def balance_loss(router_logits: Sequence[Tensor], topk: Sequence[int], real: Tensor | None = None) -> Tensor:
    """The load-balancing loss of Switch Transformers, mean over layers: 1 if even, up to the number of experts if not.

    Of a layer with E experts: E · Σ f_e · p_e, where f_e is the share of the routed (token, choice) pairs that expert e
    is given and p_e the mean probability of e. Gradients flow through p alone. It is of one batch of one process, as is
    usual: over several, it is the mean of theirs.

    Args:
        router_logits: [tokens, experts] of each MoE layer.
        topk: experts a token is given, of each of them.
        real: [tokens], which are no padding; all where it is None.
    """
    losses = []
    for logits, k in zip(router_logits, topk, strict=True):
        experts = logits.shape[-1]
        probabilities = logits.softmax(-1)
        chosen = F.one_hot(probabilities.topk(k, dim=-1).indices, experts).sum(1).to(logits.dtype)  # [tokens, experts]
        weights = torch.ones_like(logits[:, 0]) if real is None else real.to(logits.device, logits.dtype)
        count = weights.sum()
        given = (chosen * weights[:, None]).sum(0) / (count * k)
        likely = (probabilities * weights[:, None]).sum(0) / count
        losses.append(experts * (given.detach() * likely).sum())
    return torch.stack(losses).mean()


class ExpertLoad:
    """Tokens given to each expert of each MoE layer since they were last taken."""

    def __init__(self, config: HunYuanConfig) -> None:
        self.layers = moe_layers(config)
        self.topk = [config.topk_at(layer) for layer in self.layers]
        self._experts = [config.experts_at(layer) for layer in self.layers]
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def add(self, router_logits: Sequence[Tensor], real: Tensor | None = None) -> None:
        """Count one batch; the arguments are `balance_loss`'s."""
        new = []
        for logits, k in zip(router_logits, self.topk, strict=True):
            ids = logits.topk(k, dim=-1).indices
            ids = ids if real is None else ids[real.to(ids.device)]
            new.append(ids.flatten().bincount(minlength=logits.shape[-1]))
        self._counts = [a + b for a, b in zip(self._counts, new, strict=True)] if self._counts else new

    def take(self) -> dict[int, list[float]]:
        """Layer → share of each expert, over all processes (which all call it); empty where nothing was counted."""
        if not self._counts:
            return {}
        counts, self._counts = torch.cat(self._counts), []
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        parts = counts.double().split(self._experts)
        shares = [(part / part.sum().clamp(min=1)).tolist() for part in parts]
        return dict(zip(self.layers, shares, strict=True))


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


SHARD = "5GB"


class HunYuanTrainer(transformers.Trainer):
    """The Trainer, and what this model needs besides.

    Args:
        aux_loss_coef: weight of `balance_loss`.
        finish: called with the folder of weights before it gets its name: adds what serving needs.
        around: a context manager around each forward pass.
        arguments: `transformers.Trainer`'s.

    Attributes:
        expert_shares: layer → share of the tokens of each expert, as last logged.
        served_dtype: what a full model is saved in; None for what it is trained in, to go on from.
    """

    def __init__(
        self,
        *,
        aux_loss_coef: float = 0.0,
        finish: Callable[[Path], None],
        around: Callable[[], AbstractContextManager[Any]],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.aux_loss_coef, self._finish, self._around = aux_loss_coef, finish, around
        self.expert_shares: dict[int, list[float]] = {}
        self.served_dtype: torch.dtype | None = None
        self._load = ExpertLoad(self.model.config)
        self._saving_in: str | None = None
        self._restart()

    def _restart(self) -> None:
        """Begin to count anew: tokens, seconds, and the balance loss of parts of steps."""
        self._tokens, self._since = 0, None
        self._balance, self._steps = torch.zeros(()), 0.0

    _since: float | None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy, summed here and divided by the learned tokens of the whole batch; and the balance loss."""
        self._since = self._since or time.monotonic()
        inputs, real = without_padding_mask(inputs)
        with self._around():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            parts = self.current_gradient_accumulation_steps
            self._tokens += inputs["input_ids"].numel() if real is None else int(real.sum())
            self._steps += 1 / parts
            if self._load.layers:
                self._load.add(outputs.router_logits, real)
            if self._load.layers and self.aux_loss_coef:
                balance = balance_loss(outputs.router_logits, self._load.topk, real)
                # The mean over the parts of a step: DDP and ZeRO take that over processes, and this over the rest.
                loss = loss + self.aux_loss_coef * balance / parts
                self._balance = self._balance.to(loss.device) + balance.detach() / parts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens a second (without padding, over all processes), and the balance loss where it is asked for."""
        if "loss" in logs and self._since is not None:
            seconds = time.monotonic() - self._since
            tokens, balance = self._over_processes(self._tokens, self._balance.item() / self._steps)
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            if self.aux_loss_coef:
                logs["balance_loss"] = round(balance / self.args.world_size, 4)
            self.expert_shares = self._load.take()
            self._restart()
        super().log(logs, start_time)

    def _over_processes(self, *numbers: float) -> list[float]:
        summed = torch.tensor(numbers, dtype=torch.float64 if self.args.device.type == "cpu" else torch.float32)
        if self.args.world_size > 1:
            summed = summed.to(self.args.device)
            torch.distributed.all_reduce(summed)
        return summed.tolist()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written in a folder beside; it gets its name when it is whole, and older ones are deleted only then.

        Raises:
            DiskError: it could not be written; those that were there are as they were.
        """
        output, step = Path(self.args.output_dir), self.state.global_step
        final = output / f"checkpoint-{step}"
        beside = output / STAGING / final.name
        started = time.monotonic()
        with saving(f"the checkpoint of step {step}", output):
            self._saving_in = str(beside.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in = None
            self._wait()
            if self.args.should_save:
                name_whole(beside, final)
                remove_old(output, self.args.save_total_limit)
            self._wait()
            # On a node that does not share the first one's disk, its processes' parts have yet to be named.
            if self.is_local_process_zero() and beside.exists():
                name_whole(beside, final)
        if self._since is not None:
            self._since += time.monotonic() - started

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_in or super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The weights alone, as the published checkpoints or as PEFT's adapters, and what `finish` adds."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if not hasattr(self.model, "peft_config"):
            state_dict = as_published(state_dict or self.model.state_dict(), self.model.config, self.served_dtype)
        self.model.save_pretrained(folder, state_dict=state_dict, max_shard_size=SHARD)
        self._finish(folder)

    def _wait(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()


def without_padding_mask(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The inputs without a mask that only tells padding; and which tokens, [rows · tokens], are no padding.

    Padding is on the right: under the causal mask no token sees it, so attention needs no mask and may take its fastest
    way. The mask of a packed batch stays; its padding is what sees itself alone.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs, None
    if mask.dim() == 2:
        return {name: value for name, value in inputs.items() if name != "attention_mask"}, mask.flatten().bool()
    related = mask[:, 0].sum(-1) + mask[:, 0].sum(-2)  # itself twice, and each token that it sees or that sees it
    return inputs, (related > 2).flatten()
