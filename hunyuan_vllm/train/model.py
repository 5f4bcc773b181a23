"""The model to train: from a checkpoint or new, resumed, with or without adapters"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig

from hunyuan_vllm import demo
from hunyuan_vllm.adapter import ADAPTER_CONFIG, read_adapter_config
from hunyuan_vllm.checkpoint import check_headers, missing_weights, shard_files
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout
from hunyuan_vllm.quantize.source import read_bf16_config
from hunyuan_vllm.reference import HunYuanForCausalLM, MoE
from hunyuan_vllm.tokenizer import load_tokenizer
from hunyuan_vllm.train.arguments import Arguments
from hunyuan_vllm.train.checkpoints import resume_directory
from hunyuan_vllm.train.export import read_routers, split_routers
from hunyuan_vllm.util.errors import UserError


def load_partitioned(directory: Path, dtype: torch.dtype) -> HunYuanForCausalLM:
    """The checkpoint in `directory`, partitioned by ZeRO-3. Every process must call this.

    transformers' own loader reads the whole checkpoint in every process: 780 GB, eight times a node, for 389B.
    """
    from deepspeed.runtime.zero import GatheredParameters

    config = HunYuanConfig.from_pretrained(directory)
    model = HunYuanForCausalLM._from_config(config, dtype=dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layout = Layout(config)
    first = torch.distributed.get_rank() == 0
    for shard in shard_files(directory):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():
                names = layout.names(name, tensors.get_slice(name).get_shape())
                parts = dict(layout.split(name, tensors.get_tensor(name))) if first and names else {}
                with GatheredParameters([parameters[part] for part in names], modifier_rank=0):
                    for part, tensor in parts.items():
                        parameters[part].data.copy_(tensor)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.name_or_path = model.config.name_or_path = str(directory)
    return model


def check_base(directory: Path) -> HunYuanConfig:
    """The config of a checkpoint, checked by its files' headers."""
    if not directory.is_dir():
        raise UserError(f"--model_name_or_path {directory} is not a directory: name a checkpoint's directory")
    read_bf16_config(directory)
    config = HunYuanConfig.from_pretrained(directory)
    try:
        if not check_headers(directory, Layout(config)):
            raise CheckpointError(f"it {': '.join(missing_weights(directory))}")
    except CheckpointError as error:
        raise UserError(f"{directory} cannot be trained: {str(error).splitlines()[0]}") from None
    return config


def load_model(directory: Path, dtype: torch.dtype) -> HunYuanForCausalLM:
    """The checkpoint in `directory`, in `dtype`; under ZeRO-3 each process holds only its part."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    try:
        if is_deepspeed_zero3_enabled():
            return load_partitioned(directory, dtype)
        return HunYuanForCausalLM.from_pretrained(directory, dtype=dtype)
    except (CheckpointError, OSError) as error:
        raise UserError(f"{directory} cannot be read: {str(error).splitlines()[0]}") from None


def train_attention_only(model: nn.Module) -> None:
    """Freeze all but attention: its four projections and the query and key norms."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".self_attn." in name)


def add_lora(
    model: HunYuanForCausalLM, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], base: Path | None
) -> Any:
    """`model` as a PeftModel: its weights frozen, adapters on every module whose name ends with one of `targets`."""
    from peft import LoraConfig, get_peft_model

    linears = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears -= {"wg", "lm_head"}
    for target in targets:
        if target not in linears:
            raise UserError(f"--lora_target_modules {target}: this network has {', '.join(sorted(linears))}")
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path=str(base) if base else None,
    )  # fmt: skip
    if base is not None:
        model.name_or_path = str(base)
    return get_peft_model(model, settings)


def make_moe_leaves(model: nn.Module) -> None:
    """Make ZeRO-3 gather each layer's experts at once.

    Otherwise each expert is gathered when it runs, with less memory and more, smaller messages.
    """
    from deepspeed.utils import set_z3_leaf_modules

    if any(isinstance(module, MoE) for module in model.modules()):
        set_z3_leaf_modules(model, [MoE])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trained and total parameters, counted whole where ZeRO-3 holds parts."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


@dataclass
class BaseCheckpoint:
    """What a run starts from.

    Attributes:
        directory: the checkpoint whose weights are read; None for a new network.
        resume: the earlier run's checkpoint to resume from.
    """

    directory: Path | None
    resume: Path | None
    config: HunYuanConfig
    tokenizer_directory: Path
    tokenizer: Any
    served_dtype: torch.dtype

    @classmethod
    def find(cls, arguments: Arguments) -> Self:
        """Check everything that the flags name; nothing large is read."""
        training, model = arguments.training, arguments.model
        given = training.resume_from_checkpoint
        resume = resume_directory(given, Path(training.output_dir)) if given else None
        named = demo.directory(Path(model.model_name_or_path)) if model.model_name_or_path else None
        if resume is not None:
            named = _take_over(arguments, resume, named)
        if named is not None:
            config = check_base(named)
            directory = Path(model.tokenizer_name_or_path or named)
            # A run's checkpoint has the type of the computation, and names that of the result.
            dtype = getattr(torch, getattr(config, "served_dtype", ""), config.dtype)
            dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
            return cls(named, resume, config, directory, load_tokenizer(directory), dtype)
        if not model.tokenizer_name_or_path:
            raise UserError("a new network needs --tokenizer_name_or_path, a directory with hy.tiktoken")
        directory = Path(model.tokenizer_name_or_path)
        tokenizer = load_tokenizer(directory)
        return cls(None, resume, _new_config(arguments, tokenizer), directory, tokenizer, torch.bfloat16)

    def load_model(self, arguments: Arguments) -> Any:
        """The network, loaded or new, with the trained parameters selected."""
        flags, training = arguments.model, arguments.training
        dtype = self._dtype(arguments)
        if self.directory is not None:
            model: Any = load_model(self.directory, dtype)
        else:  # random weights, by `initializer_range`; under ZeRO-3 partitioned
            model = HunYuanForCausalLM._from_config(self.config, dtype=dtype)
        model.config.use_cache = False
        if training.deepspeed and dtype != torch.float32:
            split_routers(model, self._router_start(model))
        if flags.use_lora:
            return add_lora(
                model, rank=flags.lora_rank, alpha=flags.lora_alpha, dropout=flags.lora_dropout,
                targets=flags.lora_target_modules, base=self.directory,
            )  # fmt: skip
        if flags.train_attention_params_only:
            train_attention_only(model)
        return model

    def _router_start(self, model: Any) -> dict[str, torch.Tensor] | None:
        """The routers' exact weights, where ZeRO-3 has partitioned and rounded them."""
        if not hasattr(next(model.parameters()), "ds_id"):
            return None
        if self.directory is not None:
            return read_routers(self.directory)
        names = [name for name in model.state_dict() if name.endswith(".gate.wg.weight")]
        shapes = {name: model.get_parameter(name).ds_shape for name in names}
        drawn = torch.Generator().manual_seed(0)  # the same in every process
        deviation = self.config.initializer_range
        return {name: torch.randn(shape, generator=drawn) * deviation for name, shape in shapes.items()}

    def _dtype(self, arguments: Arguments) -> torch.dtype:
        """The type of the weights: that of the computation where DeepSpeed keeps float32 copies or LoRA does not train
        them; else float32, since small steps are lost in 16 bits."""
        training = arguments.training
        low = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        return low if training.deepspeed or arguments.model.use_lora else torch.float32


def _take_over(arguments: Arguments, resume: Path, named: Path | None) -> Path:
    """Take LoRA's settings from the checkpoint to resume, and return the base."""
    flags = arguments.model
    if not (resume / ADAPTER_CONFIG).is_file():
        if flags.use_lora:
            raise UserError(f"{resume} is not from a LoRA run: leave out --use_lora to resume it")
        return resume if named is None else named
    saved = read_adapter_config(resume)
    flags.use_lora, flags.lora_target_modules = True, sorted(flags.lora_target_modules)
    fixed = {
        "lora_rank": saved.r, "lora_alpha": saved.lora_alpha, "lora_dropout": saved.lora_dropout,
        "lora_target_modules": sorted(saved.target_modules or ()),
    }  # fmt: skip
    for name, value in fixed.items():
        if name in arguments.given and getattr(flags, name) != value:
            raise UserError(f"--{name} {getattr(flags, name)}: {resume} was trained with {value}, which cannot change")
        setattr(flags, name, value)
    base = named or Path(saved.base_model_name_or_path or "")
    if not (base / "config.json").is_file():
        raise UserError(f"the base of {resume} is no longer at {base}: name it with --model_name_or_path")
    return base


SAME_NAMES = (  # of flags as of the config's fields
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_experts",
    "use_mixed_mlp_moe", "num_shared_expert", "use_cla", "cla_share_factor", "use_qk_norm", "tie_word_embeddings",
)  # fmt: skip


def _new_config(arguments: Arguments, tokenizer: Any) -> HunYuanConfig:
    flags, training = arguments.model, arguments.training
    tokens = len(tokenizer)
    vocabulary = flags.vocab_size or -(-tokens // 128) * 128
    if vocabulary < tokens:
        raise UserError(f"--vocab_size {vocabulary}: the tokenizer has {tokens} tokens")
    try:
        return HunYuanConfig(
            architectures=["HunYuanForCausalLM"],
            vocab_size=vocabulary,
            num_hidden_layers=flags.num_layers,
            max_position_embeddings=training.model_max_length or flags.max_position_embeddings,
            rms_norm_eps=flags.layer_norm_eps,
            moe_topk=1 if flags.num_experts == 1 else flags.moe_topk,
            **{name: getattr(flags, name) for name in SAME_NAMES},
            **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
    except ValueError as error:
        raise UserError(str(error)) from None
