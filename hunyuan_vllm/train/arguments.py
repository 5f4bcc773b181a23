"""The flags of fine-tuning: the published ones, transformers' own, and a few of ours, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
import transformers

from hunyuan_vllm.train.model import ATTENTION

__all__ = ["SHAPE", "WITHOUT_EFFECT", "DataArguments", "ModelArguments", "TrainingArguments"]

SHAPE: Final = (
    "hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings", "model_max_length", "vocab_size", "layer_norm_eps", "num_experts", "moe_topk",
    "use_mixed_mlp_moe", "num_shared_expert", "use_cla", "cla_share_factor", "use_qk_norm", "tie_word_embeddings",
)  # fmt: skip
"""Flags that say what a new network looks like."""

WITHOUT_EFFECT: Final = {
    "do_train": "training is all this does",
    "overwrite_output_dir": "what is in output_dir is never overwritten: checkpoints have names of their own",
    "save_safetensors": "weights are always saved as safetensors",
    "type_vocab_size": "the network has no token types",
    "complex_data": "it named a data format that was not published",
    "cache_dir": "nothing is downloaded",
}
"""Flags that published commands have and that change nothing, with the reason."""


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """What is trained. The defaults of LoRA and of the network's shape are those of the published script."""

    model_name_or_path: str | None = _flag(None, "Folder of the checkpoint to start from.")
    tokenizer_name_or_path: str | None = _flag(None, "Folder of the tokenizer; default: the checkpoint's.")
    use_lora: bool = _flag(False, "Train low-rank adapters and leave the checkpoint's weights as they are.")
    lora_rank: int = _flag(64, "Rank of the adapters.")
    lora_alpha: int = _flag(8, "What an adapter computes is multiplied by lora_alpha / lora_rank.")
    lora_dropout: float = _flag(0.0, "Dropout before the adapters.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(ATTENTION), metadata={"help": "Modules that get an adapter."}
    )
    train_attention_params_only: bool = _flag(False, "Train attention only (without LoRA).")
    make_moe_param_leaf_module: bool = _flag(
        False, "Under ZeRO-3, gather all experts of a layer at once: fewer messages, and their memory."
    )
    use_flash_attn: bool = _flag(False, "On GPUs, take PyTorch's flash-attention kernels where they can be.")
    aux_loss_coef: float = _flag(0.0, "Weight of the loss that evens out the experts' load; 0: none.")
    hidden_size: int = _flag(2048, "Of a new network.")
    num_layers: int = _flag(24, "Of a new network.")
    num_attention_heads: int = _flag(16, "Of a new network.")
    num_key_value_heads: int = _flag(16, "Of a new network.")
    intermediate_size: int = _flag(8192, "Of a new network: width of an expert.")
    max_position_embeddings: int = _flag(2048, "Of a new network: longest context; also --model_max_length.")
    vocab_size: int | None = _flag(None, "Of a new network; default: the tokenizer's, up to a multiple of 128.")
    layer_norm_eps: float = _flag(1e-5, "Of a new network.")
    num_experts: int = _flag(8, "Of a new network; 1: dense layers.")
    moe_topk: int = _flag(4, "Of a new network: experts a token is given.")
    use_mixed_mlp_moe: bool = _flag(False, "Of a new network: an expert that every token passes.")
    num_shared_expert: int = _flag(1, "Of a new network: width of that one, in experts.")
    use_cla: bool = _flag(False, "Of a new network: layers share K and V (cross-layer attention).")
    cla_share_factor: int = _flag(2, "Of a new network: so many layers share.")
    use_qk_norm: bool = _flag(False, "Of a new network: norms on queries and keys.")
    tie_word_embeddings: bool = _flag(True, "Of a new network: the head is the embedding.")
    type_vocab_size: int = _flag(1, "Without effect.")


@dataclass
class DataArguments:
    """What it is trained on."""

    train_data_file: str | None = _flag(None, "JSONL, one conversation a line.")
    eval_data_file: str | None = _flag(None, "The same, held out: its loss is shown as well (--eval_steps).")
    max_seq_length: int = _flag(2048, "Longer conversations are cut; a packed row has so many tokens.")
    packing: bool = _flag(False, "Several conversations a row, none of which sees another, instead of padding.")
    train_on_all: bool = _flag(False, "Learn system and user messages too.")
    default_system: str = _flag("You are a helpful assistant.", 'Where a conversation has no system message; "": none.')
    use_dummy_data: bool = _flag(False, "Random tokens instead of a file, to measure speed and memory.")
    complex_data: str | None = _flag(None, "Without effect.")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained: transformers' arguments, some with other defaults."""

    output_dir: str = _flag("train_output", "Folder for checkpoints, logs, the loss curve, and the result in final/.")
    min_lr: float | None = _flag(None, "Learning rate at the end of the cosine; default: a tenth of --learning_rate.")
    lr_scheduler_type: str = _flag("cosine_with_min_lr", "How the learning rate falls.")
    warmup_ratio: float = _flag(0.0, "Share of the steps over which it rises first.")
    logging_steps: float = _flag(5, "Steps between two lines of the log.")
    save_steps: float = _flag(100, "Steps between two checkpoints.")
    model_max_length: int | None = _flag(None, "As --max_position_embeddings, of a new network.")
    logging_dir: str | None = _flag(None, "Folder for TensorBoard's files; default: runs/ in --output_dir.")
    report_to: str = _flag("tensorboard", "tensorboard, or none.")
    overwrite_output_dir: bool = _flag(False, "Without effect.")
    save_safetensors: bool = _flag(True, "Without effect.")
    cache_dir: str | None = _flag(None, "Without effect.")

    def __post_init__(self) -> None:
        this: Any = self  # the base class' fields are transformers', which the type checker does not follow
        this.use_cpu = this.use_cpu or not torch.cuda.is_available()
        # Non-reentrant: the one that frozen weights and shared K and V need.
        if this.gradient_checkpointing and this.gradient_checkpointing_kwargs is None:
            this.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if self.lr_scheduler_type == "cosine_with_min_lr" and this.lr_scheduler_kwargs is None:
            # As a share: transformers asks the optimiser what min_lr is a share of, and DeepSpeed's does not know.
            share = 0.1 if self.min_lr is None else self.min_lr / this.learning_rate
            if share > 1:
                raise ValueError(f"--min_lr {self.min_lr} is more than --learning_rate {this.learning_rate}")
            this.lr_scheduler_kwargs = {"min_lr_rate": share}
        if self.warmup_ratio and not this.warmup_steps:
            this.warmup_steps = self.warmup_ratio
        this.remove_unused_columns = False  # the data are ours
        this.disable_tqdm = True  # and so is the display
        super().__post_init__()
