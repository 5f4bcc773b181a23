"""The entry point vLLM loads (group `vllm.general_plugins`), in each of its processes and for every model.

So nothing that is wrong with us may reach the models of others: vLLM does not guard the call of `register`. A failure
is a warning, and an error only where a Hunyuan checkpoint is opened; left to vLLM, that would end in "requires
trust_remote_code". What is here has to work where our package does not, and with any vLLM.
"""


def register() -> None:
    """Make the Hunyuan models known to vLLM in this process. Idempotent; never raises."""
    try:
        from hunyuan_vllm.plugin import register as register_all

        register_all()
    except Exception as error:
        _refuse_checkpoints(f"hunyuan-vllm is not active: {' '.join(str(error).split()) or type(error).__name__}")


def _refuse_checkpoints(reason: str) -> None:
    """Warn of `reason`, once for all processes of a server, and let whoever opens a Hunyuan checkpoint raise it."""
    import logging
    import multiprocessing

    if multiprocessing.parent_process() is None:
        # vLLM configures this logger's parent; where it did not, Python prints a warning to standard error.
        logging.getLogger("vllm.hunyuan_vllm").warning("%s. Other models are not affected.", reason)
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

        class RefusedConfig(PretrainedConfig):
            model_type = "hunyuan"

            def __init__(self, **_: object) -> None:
                raise RuntimeError(reason)

        theirs = "hunyuan" in CONFIG_MAPPING and not CONFIG_MAPPING["hunyuan"].__module__.startswith("hunyuan_vllm")
        if not theirs:
            AutoConfig.register("hunyuan", RefusedConfig, exist_ok=True)
    except Exception:
        logging.getLogger("vllm.hunyuan_vllm").debug("a Hunyuan checkpoint cannot be refused", exc_info=True)
