"""What a run starts from: which checkpoint, which tokenizer, and what a checkpoint of an earlier run decides."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hunyuan_vllm import demo
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.tokenizer import load_tokenizer
from hunyuan_vllm.train.arguments import Arguments
from hunyuan_vllm.train.checkpoints import resume_folder
from hunyuan_vllm.train.export import read_origin, read_routers, split_routers
from hunyuan_vllm.train.model import add_lora, check_base, load_model, new_model, train_attention_only
from hunyuan_vllm.util.errors import UserError

__all__ = ["Start"]

ADAPTER = "adapter_config.json"


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        base: the checkpoint whose weights are read; None for a new network.
        resume: the earlier run's checkpoint to go on from.
        config: the network's.
        tokenizer_folder: where the tokenizer's files are.
        served_dtype: what the result is saved in.
        origin: the checkpoint that training began from, also where an earlier run did; None for a new network.
    """

    base: Path | None
    resume: Path | None
    config: HunYuanConfig
    tokenizer_folder: Path
    tokenizer: Any
    served_dtype: torch.dtype
    origin: Path | None = None

    @classmethod
    def find(cls, arguments: Arguments) -> Start:
        """Look at all that is named; nothing large is read.

        Raises:
            UserError: something is not there, or does not fit the rest.
        """
        training, model = arguments.training, arguments.model
        given = training.resume_from_checkpoint
        resume = resume_folder(given, Path(training.output_dir)) if given else None
        named = demo.folder(Path(model.model_name_or_path)) if model.model_name_or_path else None
        if resume is not None:
            named = _take_over(arguments, resume, named)
        if named is not None:
            config = check_base(named)
            folder = Path(model.tokenizer_name_or_path or named)
            # A checkpoint has the type that was computed with, and remembers which one the result is to have.
            origin, dtype = (read_origin(resume) if resume else None) or (named, _dtype_of(config))
            return cls(named, resume, config, folder, load_tokenizer(folder), dtype, origin)
        if not model.tokenizer_name_or_path:
            raise UserError("a new network needs --tokenizer_name_or_path, a folder with hy.tiktoken")
        folder = Path(model.tokenizer_name_or_path)
        tokenizer = load_tokenizer(folder)
        return cls(None, resume, _new_config(arguments, tokenizer), folder, tokenizer, torch.bfloat16)

    def model(self, arguments: Arguments) -> Any:
        """The network, read or drawn, with what is trained of it."""
        flags, training = arguments.model, arguments.training
        dtype = self._dtype(arguments)
        model: Any = load_model(self.base, dtype) if self.base is not None else new_model(self.config, dtype)
        model.config.use_cache = False
        if training.deepspeed and dtype != torch.float32:
            split_routers(model, self._router_start(model))
        if flags.use_lora:
            return add_lora(
                model, rank=flags.lora_rank, alpha=flags.lora_alpha, dropout=flags.lora_dropout,
                targets=flags.lora_target_modules, base=self.base,
            )  # fmt: skip
        if flags.train_attention_params_only:
            train_attention_only(model)
        return model

    def _router_start(self, model: Any) -> dict[str, torch.Tensor] | None:
        """What the routers' weights are, where ZeRO-3 has parted and rounded them."""
        if not hasattr(next(model.parameters()), "ds_id"):
            return None
        if self.base is not None:
            return read_routers(self.base)
        names = [name for name in model.state_dict() if name.endswith(".gate.wg.weight")]
        shapes = {name: model.get_parameter(name).ds_shape for name in names}
        drawn = torch.Generator().manual_seed(0)  # the same in every process
        deviation = self.config.initializer_range
        return {name: torch.randn(shape, generator=drawn) * deviation for name, shape in shapes.items()}

    def _dtype(self, arguments: Arguments) -> torch.dtype:
        """What the weights are held in: that of the computation where something wider is kept beside (DeepSpeed), or
        where they are not trained (LoRA); else float32, in which alone small steps add up."""
        training = arguments.training
        low = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        return low if training.deepspeed or arguments.model.use_lora else torch.float32


def _take_over(arguments: Arguments, resume: Path, named: Path | None) -> Path:
    """What a checkpoint decides: LoRA or not, with which settings, and on which base. Returns the base.

    Raises:
        UserError: flags say otherwise.
    """
    flags = arguments.model
    file = resume / ADAPTER
    if not file.is_file():
        if flags.use_lora:
            raise UserError(f"{resume} is not of a LoRA run: leave out --use_lora to go on from it")
        return resume if named is None else named
    saved = json.loads(file.read_text())
    fixed = {"lora_rank": saved["r"], "lora_alpha": saved["lora_alpha"], "lora_dropout": saved["lora_dropout"]}
    for name, value in fixed.items():
        if name in arguments.given and getattr(flags, name) != value:
            raise UserError(f"--{name} {getattr(flags, name)}: {resume} was trained with {value}, which cannot change")
        setattr(flags, name, value)
    targets = sorted(saved["target_modules"])
    if "lora_target_modules" in arguments.given and sorted(flags.lora_target_modules) != targets:
        raise UserError(f"--lora_target_modules: {resume} was trained with {' '.join(targets)}, which cannot change")
    flags.use_lora, flags.lora_target_modules = True, targets
    base = named or Path(saved["base_model_name_or_path"] or "")
    if not (base / "config.json").is_file():
        raise UserError(f"the base of {resume} is not at {base} any more: name it with --model_name_or_path")
    return base


def _dtype_of(config: HunYuanConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def _new_config(arguments: Arguments, tokenizer: Any) -> HunYuanConfig:
    flags, training = arguments.model, arguments.training
    least = len(tokenizer)
    vocabulary = flags.vocab_size or -(-least // 128) * 128
    if vocabulary < least:
        raise UserError(f"--vocab_size {vocabulary}: the tokenizer has {least} tokens")
    try:
        return HunYuanConfig(
            architectures=["HunYuanForCausalLM"],
            vocab_size=vocabulary,
            hidden_size=flags.hidden_size,
            intermediate_size=flags.intermediate_size,
            num_hidden_layers=flags.num_layers,
            num_attention_heads=flags.num_attention_heads,
            num_key_value_heads=flags.num_key_value_heads,
            max_position_embeddings=training.model_max_length or flags.max_position_embeddings,
            rms_norm_eps=flags.layer_norm_eps,
            num_experts=flags.num_experts,
            moe_topk=1 if flags.num_experts == 1 else flags.moe_topk,
            use_mixed_mlp_moe=flags.use_mixed_mlp_moe,
            num_shared_expert=flags.num_shared_expert,
            use_cla=flags.use_cla,
            cla_share_factor=flags.cla_share_factor,
            use_qk_norm=flags.use_qk_norm,
            tie_word_embeddings=flags.tie_word_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
