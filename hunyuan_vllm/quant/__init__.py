"""Quantised weights and caches: int8 weight-only, int8 W8A8, and W8A8C8-FP8."""


def register_quantization() -> None:
    """Make our quantisations known to vLLM by their names; it also asks them which checkpoints they take over."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from hunyuan_vllm.quant.fp8 import HunYuanFp8Config
    from hunyuan_vllm.quant.int8 import Int8Config, Int8W8A8Config

    for config in (Int8Config, Int8W8A8Config, HunYuanFp8Config):
        register_quantization_config(config.name)(config)
