"""The entry point vLLM loads (group `vllm.general_plugins`).

vLLM only logs a plugin whose module fails to import and serves on without it; the user then reads "requires
trust_remote_code". An exception raised by the loaded function, however, stops the process with its cause. So this
module imports nothing that can fail, and everything else happens inside `register`.
"""


def register() -> None:
    """Make Hunyuan-Large known to vLLM in this process. Idempotent; raises if the installation cannot work."""
    from hunyuan_vllm.plugin import register as register_all

    register_all()
