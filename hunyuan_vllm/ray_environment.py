"""Which of a server's environment variables vLLM may copy to its Ray workers: those that steer them, and no secret.

vLLM copies all, so whatever the operator has exported for other programs would be in processes on every node. A
variable that a worker needs beyond these is exported on its node before Ray starts there, or named in
VLLM_RAY_EXTRA_ENV_VARS_TO_COPY.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from hunyuan_vllm.secret_names import names_a_secret

__all__ = ["kept_from_workers", "limit_copied_variables"]

STEERING = re.compile(
    r"(VLLM|HUNYUAN_VLLM|NCCL|GLOO|TP|UCX|OMP|MKL|KMP|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|CUBLAS|TRITON|FLASHINFER"
    r"|FLASH_ATTENTION|LMCACHE|HF|HUGGING_FACE|TRANSFORMERS|SAFETENSORS|TOKENIZERS|TIKTOKEN|XDG)_\w+"
    r"|DO_NOT_TRACK|LD_LIBRARY_PATH|LD_PRELOAD|PATH|PYTHONHASHSEED|PYTHONPATH|TMPDIR|TZ|LANG|LC_ALL"
)


def kept_from_workers(environ: Mapping[str, str]) -> set[str]:
    """The variables that are not to be copied."""
    asked = {name.strip() for name in environ.get("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "").split(",")}
    return {name for name in environ if name not in asked and not _may_be_copied(name)}


def _may_be_copied(name: str) -> bool:
    return STEERING.fullmatch(name) is not None and not names_a_secret(name)


def limit_copied_variables() -> None:
    """Tell vLLM, in this process: its own list of such names is what $VLLM_CONFIG_ROOT has in a file for it."""
    from vllm.ray import ray_env

    ray_env.RAY_NON_CARRY_OVER_ENV_VARS.update(kept_from_workers(os.environ))
