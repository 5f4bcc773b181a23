"""The entry point vLLM loads (group `vllm.general_plugins`).

vLLM only logs a plugin whose module fails to import and serves on without it; the user then reads "requires
trust_remote_code". An exception raised by the loaded function, however, stops the process with its cause. So this
module imports nothing that can fail, and everything else happens inside `register`.
"""


def register() -> None:
    """Make Hunyuan-Large known to vLLM in this process. Idempotent; raises if the installation cannot work."""
    try:
        from hunyuan_vllm.plugin import register as register_all

        register_all()
    except BaseException:
        _let_vllm_load_plugins_again()
        raise


def _let_vllm_load_plugins_again() -> None:
    """vLLM notes that it has loaded plugins before it does; a second engine in the same process would go on without
    us."""
    import sys

    if plugins := sys.modules.get("vllm.plugins"):
        plugins.__dict__["plugins_loaded"] = False
