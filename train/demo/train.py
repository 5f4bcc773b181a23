"""Train the demo model from scratch and write its checkpoint: `python train/demo/train.py`.

A seed fixes the text and the initial weights. With another thread count, processor type or torch build the sums round
differently, and the loss curves drift apart.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, Final

import torch
import torch.nn.functional as F
import typer
from encoding import IGNORED, Batch, Encoder, batches
from safetensors.torch import save_file
from torch import Tensor
from vocabulary import VOCABULARY_FILE

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.reference import HunYuanForCausalLM

__all__ = ["Recipe", "demo_config", "save_checkpoint", "train"]

DEMO_DIRECTORY: Final = VOCABULARY_FILE.parent


@dataclass(frozen=True)
class Recipe:
    """What decides the result, besides the corpus."""

    steps: int = 1500
    batch_tokens: int = 4096
    seed: int = 1
    learning_rate: float = 0.006
    warmup: int = 60
    decay_share: float = 0.5  # of the steps, at the end, linearly to zero
    weight_decay: float = 0.1
    balance: float = 0.01  # load-balancing loss of the experts
    z_loss: float = 1e-3  # keeps log Z near 0, so that a repetition penalty scales little but the unlikely
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step as a share of the highest: warm-up, plateau, linear decay."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.decay_share * self.steps))


def demo_config(encoder: Encoder) -> dict[str, Any]:
    """config.json of the demo model, in the published style."""
    return {
        "architectures": ["HunYuanForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": encoder.startoftext,
        "cla_share_factor": 2,
        "eos_token_id": encoder.eos,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "hunyuan",
        "moe_topk": 1,
        "num_attention_heads": 8,
        "num_experts": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "num_shared_expert": 1,
        "pad_token_id": encoder.pad,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_cla": True,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "vocab_size": -(-encoder.size // 64) * 64,
    }


def losses(model: HunYuanForCausalLM, batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and the mean cross entropy that is its main part."""
    hidden = model.model(batch.ids)
    learned = batch.labels != IGNORED
    # Only learned positions go through the head, which would otherwise be a fifth of the work.
    logits = model.lm_head(hidden.last_hidden_state[learned])  # [learned tokens, vocab]
    log_z = logits.logsumexp(-1)
    entropy = (log_z - logits.gather(-1, batch.labels[learned].unsqueeze(-1)).squeeze(-1)).mean()
    balance = imbalance(hidden.router_logits, batch.ids.flatten() != model.config.pad_token_id)
    return entropy + recipe.z_loss * log_z.square().mean() + recipe.balance * balance, entropy.detach()


def imbalance(router_logits: tuple[Tensor, ...], real: Tensor) -> Tensor:
    """Load-balancing loss of Switch Transformer (arXiv:2101.03961, eq. 4): 1 where experts share the tokens evenly."""
    each = []
    for logits in router_logits:
        probabilities = logits[real].softmax(-1)  # [tokens, experts]
        experts = probabilities.shape[-1]
        share = F.one_hot(probabilities.argmax(-1), experts).float().mean(0)
        each.append(experts * (share * probabilities.mean(0)).sum())
    return torch.stack(each).mean()


def optimizers(model: HunYuanForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices; AdamW, without decay, for embedding, router and norms."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 2 and "embed_tokens" not in name and "gate.wg" not in name
        (matrices if plain else rest).append(parameter)
    rate = recipe.learning_rate
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(recipe: Recipe, encoder: Encoder, report: Callable[[str], None] = print) -> HunYuanForCausalLM:
    """Train a fresh model; `report` gets a progress line every 20 steps."""
    torch.manual_seed(recipe.seed)
    model = HunYuanForCausalLM(HunYuanConfig(**demo_config(encoder))).float().train()
    stream = batches(encoder, Random(recipe.seed), recipe.batch_tokens)
    optimizing = optimizers(model, recipe)
    started, seen, smooth = time.monotonic(), 0, 0.0
    for step, batch in zip(range(recipe.steps), stream, strict=False):
        for optimizer in optimizing:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * recipe.rate(step)
        loss, entropy = losses(model, batch, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizing:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch.ids.numel()
        smooth = entropy.item() if step == 0 else 0.95 * smooth + 0.05 * entropy.item()
        if (step + 1) % 20 == 0 or step + 1 == recipe.steps:
            elapsed = time.monotonic() - started
            left = elapsed / (step + 1) * (recipe.steps - step - 1)
            report(
                f"step {step + 1}/{recipe.steps}  loss {smooth:.4f}  {seen / 1e6:.2f}M tokens  "
                f"{seen / elapsed:.0f} tokens/s  {left / 60:.1f} min left"
            )
    return model.eval()


def save_checkpoint(model: HunYuanForCausalLM, encoder: Encoder, directory: Path) -> None:
    """Write the checkpoint's files, each beside its place first: bfloat16 weights, the router in float32.

    The vocabulary is copied where the directory is not the one it is committed in.
    """
    tensors = {
        name: tensor.detach().to(torch.float32 if "gate.wg" in name else torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    partial = directory / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors lets only the owner read
    os.replace(partial, directory / "model.safetensors")
    generation = {
        "do_sample": True,
        "eos_token_id": [encoder.eos, encoder.stop],
        "pad_token_id": encoder.pad,
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.6,
    }
    tokenizer = {
        "add_bos_token": True,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|eos|>",
        "model_max_length": demo_config(encoder)["max_position_embeddings"],
        "pad_token": "<|pad|>",
        "tokenizer_class": "HYTokenizer",
    }
    if directory.resolve() != DEMO_DIRECTORY:
        shutil.copyfile(VOCABULARY_FILE, directory / VOCABULARY_FILE.name)
    _write_json(directory / "config.json", demo_config(encoder))
    _write_json(directory / "tokenizer_config.json", tokenizer)
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main(
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint.")] = DEMO_DIRECTORY,
    steps: Annotated[int, typer.Option(help="Optimizer steps of about 4096 tokens.")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="Seed of weights and text.")] = Recipe.seed,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the demo model and write its checkpoint."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(VOCABULARY_FILE)
    model = train(Recipe(steps=steps, seed=seed), encoder, lambda line: print(line, flush=True))
    save_checkpoint(model, encoder, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
