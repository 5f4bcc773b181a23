"""What we use of vLLM: every symbol, the keywords we pass and the members we rely on.

`compat.check_symbols` compares this list with a vLLM source tree; a test keeps it complete.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["USED", "Symbol"]


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
    Symbol("vllm.ray.ray_env", "RAY_NON_CARRY_OVER_ENV_VARS"),
    Symbol("vllm.envs", "VLLM_ENABLE_V1_MULTIPROCESSING"),
    Symbol("vllm.envs", "VLLM_WORKER_MULTIPROC_METHOD"),
    Symbol("vllm.compilation.decorators", "support_torch_compile"),
    Symbol(
        "vllm.config",
        "VllmConfig",
        members=(
            "model_config",
            "cache_config",
            "parallel_config",
            "load_config",
            "quant_config",
            "lora_config",
            "kernel_config",
        ),
    ),
    Symbol("vllm.config.load", "LoadConfig", members=("use_tqdm_on_load", "load_format")),
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
    Symbol("vllm.distributed", "get_world_group"),
    Symbol("vllm.logger", "init_logger"),
    Symbol("vllm.platforms", "current_platform"),
    Symbol(
        "vllm.platforms.interface", "Platform", members=("device_type", "import_kernels", "get_device_name", "is_cpu")
    ),
    Symbol("vllm.plugins", "load_general_plugins"),
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
            "custom_routing_function",
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
    Symbol(
        f"{_LAYERS}.fused_moe.config",
        "FusedMoEConfig",
        members=("in_dtype", "has_bias", "activation", "moe_backend", "moe_parallel_config"),
    ),
    Symbol(
        f"{_LAYERS}.fused_moe.experts.cpu_moe",
        "CPUUnquantizedExperts",
        members=("_pad_moe_intermediate", "reduction_alignment", "is_supported_config", "apply"),
    ),
    Symbol(f"{_LAYERS}.fused_moe.experts.cpu_moe", "is_zentorch_moe_supported"),
    Symbol(f"{_LAYERS}.fused_moe.experts.cpu_moe", "is_zentorch_moe_config_supported"),
    Symbol(
        "vllm.lora.ops.torch_ops.lora_ops",
        "bgmv_shrink",
        keywords=("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "scaling"),
    ),
    Symbol("vllm.lora.punica_wrapper.punica_cpu", "bgmv_shrink"),
    Symbol("vllm.lora.worker_manager", "WorkerLoRAManager", members=("_load_adapter",)),
    Symbol("vllm.lora.lora_model", "LoRAModel"),
    Symbol("vllm.v1.engine.input_processor", "InputProcessor", members=("_validate_lora",)),
    Symbol("vllm.lora.request", "LoRARequest", members=("lora_name", "lora_path")),
    Symbol(f"{_LAYERS}.quantization.utils.quant_utils", "QuantKey"),
    # FP8: vLLM's own methods, with other scales.
    Symbol(f"{_LAYERS}.quantization.fp8", "Fp8Config", keywords=("activation_scheme",)),
    Symbol(
        f"{_LAYERS}.quantization.fp8", "Fp8LinearMethod", members=("create_weights", "process_weights_after_loading")
    ),
    Symbol(f"{_LAYERS}.quantization.fp8", "Fp8MoEMethod", members=("create_weights", "_setup_kernel")),
    Symbol(f"{_LAYERS}.quantization.utils.fp8_utils", "create_fp8_input_scale"),
    Symbol(f"{_LAYERS}.quantization.utils.fp8_utils", "create_fp8_scale_parameter"),
    Symbol(f"{_LAYERS}.quantization.utils.fp8_utils", "create_fp8_weight_parameter"),
    Symbol(f"{_LAYERS}.quantization.utils.fp8_utils", "process_fp8_input_tensor_strategy_moe"),
    Symbol(f"{_LAYERS}.quantization.utils.quant_utils", "kFp8StaticChannelSym"),
    Symbol("vllm.model_executor.parameter", "PerTensorScaleParameter"),
    Symbol("vllm._custom_ops", "weight_packed_linear_cpu"),
    Symbol("vllm.model_executor.utils", "replace_parameter"),
    Symbol(
        "vllm._custom_ops",
        "fused_experts_cpu",
        keywords=("w1_scale", "w2_scale", "w1_zero", "w2_zero", "block_size"),
    ),
    Symbol("vllm._custom_ops", "CPUQuantMethod", members=("UNQUANT", "INT8_W8A8")),
    Symbol(f"{_LAYERS}.layernorm", "RMSNorm", keywords=("hidden_size", "eps", "has_weight")),
    Symbol(f"{_LAYERS}.linear", "ColumnParallelLinear", keywords=_LINEAR),
    Symbol(f"{_LAYERS}.linear", "MergedColumnParallelLinear", keywords=("bias", "quant_config", "prefix")),
    Symbol(f"{_LAYERS}.linear", "QKVParallelLinear", keywords=("bias", "quant_config", "prefix")),
    Symbol(f"{_LAYERS}.linear", "RowParallelLinear", keywords=(*_LINEAR, "reduce_results", "skip_bias_add")),
    # Int8: our layers on CPUs, vLLM's for compressed-tensors elsewhere.
    Symbol(f"{_LAYERS}.linear", "LinearBase"),
    Symbol(f"{_LAYERS}.linear", "LinearMethodBase", members=("create_weights", "apply")),
    Symbol(f"{_LAYERS}.linear", "UnquantizedLinearMethod"),
    Symbol(f"{_LAYERS}.linear", "register_weight_loader_v2_supported_method"),
    Symbol("vllm.model_executor.parameter", "ChannelQuantScaleParameter", keywords=("output_dim",)),
    Symbol("vllm.model_executor.parameter", "ModelWeightParameter"),
    Symbol(f"{_LAYERS}.fused_moe", "RoutedExperts"),
    Symbol(
        f"{_LAYERS}.fused_moe",
        "FusedMoEMethodBase",
        members=("create_weights", "apply", "process_weights_after_loading", "get_fused_moe_quant_config"),
    ),
    Symbol(f"{_LAYERS}.fused_moe", "FusedMoeWeightScaleSupported", members=("CHANNEL",)),
    Symbol(f"{_LAYERS}.fused_moe.config", "FusedMoEQuantConfig"),
    Symbol("vllm.model_executor.utils", "set_weight_attrs"),
    Symbol(
        f"{_LAYERS}.quantization.compressed_tensors.compressed_tensors",
        "CompressedTensorsConfig",
        members=("from_config", "get_quant_method"),
    ),
    Symbol(f"{_LAYERS}.logits_processor", "LogitsProcessor"),
    Symbol(
        f"{_LAYERS}.quantization",
        "QuantizationConfig",
        members=(
            "get_name",
            "get_supported_act_dtypes",
            "get_min_capability",
            "get_config_filenames",
            "from_config",
            "override_quantization_method",
            "maybe_update_config",
            "get_quant_method",
        ),
    ),
    Symbol(f"{_LAYERS}.quantization", "register_quantization_config"),
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
    Symbol("vllm.model_executor.models.utils", "is_pp_missing_parameter"),
    Symbol("vllm.model_executor.models.utils", "make_empty_intermediate_tensors_factory"),
    Symbol("vllm.model_executor.models.utils", "make_layers"),
    Symbol("vllm.model_executor.models.utils", "maybe_prefix"),
    Symbol("vllm.sequence", "IntermediateTensors"),
    # What must go on calling us, or reading what we set: KV sharing in both model runners, and the post-load hooks.
    Symbol("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", members=("get_kv_cache_spec",)),
    Symbol("vllm.v1.worker.gpu.attn_utils", "get_shared_kv_cache_layers"),
    Symbol("vllm.v1.worker.utils", "add_kv_sharing_layers_to_kv_cache_groups"),
    Symbol("vllm.model_executor.model_loader.utils", "process_weights_after_loading"),
    Symbol("vllm.model_executor.model_loader.weight_utils", "get_quant_config"),
    # The batch runner: vLLM's server without HTTP.
    Symbol("vllm.engine.protocol", "EngineClient", members=("vllm_config", "errored", "generate", "collective_rpc")),
    Symbol("vllm.exceptions", "VLLMUnprocessableEntityError"),
    Symbol("vllm.envs", "VLLM_MOE_SKIP_PADDING"),
    Symbol("vllm.forward_context", "get_forward_context"),
    Symbol("vllm.forward_context", "is_forward_context_available"),
    Symbol("vllm.forward_context", "ForwardContext", members=("is_padding",)),
    Symbol(f"{_LAYERS}.fused_moe.router.base_router", "BaseRouter", members=("set_capture_fn",)),
    Symbol("vllm.entrypoints.cli.serve", "make_arg_parser"),
    Symbol("vllm.entrypoints.launchers.api_server.app_state", "init_app_state"),
    Symbol("vllm.entrypoints.launchers.api_server.entry", "build_async_engine_client", keywords=("usage_context",)),
    Symbol(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest",
        members=("max_tokens", "max_completion_tokens", "to_sampling_params"),
    ),
    Symbol("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", members=("create_chat_completion",)),
    Symbol(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest",
        members=("max_tokens", "to_sampling_params"),
    ),
    Symbol("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion", members=("create_completion",)),
    Symbol("vllm.entrypoints.serve.engine.protocol", "ErrorResponse", members=("error",)),
    Symbol("vllm.entrypoints.serve.exception_handling.error_response", "create_error_response"),
    Symbol("vllm.usage.usage_lib", "UsageContext", members=("OPENAI_BATCH_RUNNER",)),
    Symbol("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    Symbol("vllm.renderers.chat_utils", "parse_chat_messages_async"),  # known by its module in a traceback
    Symbol("vllm.entrypoints.openai.responses.utils", "construct_input_messages"),  # known by its name there
    Symbol("vllm.v1.metrics.prometheus", "get_prometheus_registry"),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM"),  # known by its module, which names a logger
    Symbol("vllm.v1.engine.exceptions", "EngineDeadError"),
    Symbol("vllm.benchmarks.serve", "add_cli_args"),
    Symbol("vllm.benchmarks.serve", "main_async"),
    # Readiness and draining: what the front end lets us ask, and the signals it takes.
    Symbol("vllm.engine.protocol", "EngineClient", members=("errored", "is_sleeping")),
    Symbol("vllm.v1.engine.utils", "CoreEngineProcManager", members=("finished_procs",)),
    Symbol("vllm.entrypoints.launchers.launcher", "serve_http"),
    # Evaluation: an offline engine with a worker extension.
    Symbol("vllm.engine.arg_utils", "EngineArgs", members=("from_cli_args", "worker_extension_cls")),
    Symbol("vllm.entrypoints.llm", "LLM", members=("from_engine_args", "collective_rpc", "generate", "llm_engine")),
    Symbol("vllm.inputs", "TokensPrompt"),
    Symbol("vllm.sampling_params", "SamplingParams", members=("temperature", "max_tokens", "detokenize")),
    Symbol("vllm.v1.worker.gpu_worker", "Worker", members=("get_model",)),
    # The tool parser.
    Symbol("vllm.tool_parsers", "ToolParserManager"),
    Symbol("vllm.tool_parsers.abstract_tool_parser", "ToolParserManager", members=("register_lazy_module",)),
    Symbol(
        "vllm.tool_parsers.hermes_tool_parser",
        "Hermes2ProToolParser",
        members=("extract_tool_calls", "tool_call_start_token", "tool_call_end_token"),
    ),
    Symbol("vllm.tool_parsers.abstract_tool_parser", "ToolParser", members=("get_structural_tag",)),
    Symbol("vllm.tool_parsers.tool_strict_level", "ToolStrictLevel", members=("AUTO", "PARAMETER")),
    Symbol("vllm.tool_parsers.utils", "is_complete_json"),
    Symbol("vllm.v1.structured_output", "StructuredOutputManager", members=("_create_grammar",)),
    Symbol(
        "vllm.v1.structured_output.request",
        "StructuredOutputRequest",
        members=("_check_grammar_completion", "_grammar"),
    ),
    Symbol("vllm.v1.structured_output.backend_types", "StructuredOutputGrammar"),
    Symbol("vllm.v1.request", "Request"),
    Symbol("vllm.v1.structured_output.backend_xgrammar", "has_xgrammar_unsupported_json_features"),
    Symbol("vllm.entrypoints.generate.base.protocol", "ExtractedToolCallInformation"),
    Symbol("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
    Symbol("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),
    Symbol("vllm.entrypoints.anthropic.protocol", "AnthropicCountTokensRequest"),
    Symbol("vllm.exceptions", "VLLMValidationError", keywords=("parameter",)),
)
