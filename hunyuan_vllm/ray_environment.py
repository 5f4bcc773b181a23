"""The environment of an engine over Ray: what it needs to join the cluster, and what vLLM may copy to its workers"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from hunyuan_vllm.util.net import own_addresses

SECRET = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
STEERING = re.compile(
    r"(VLLM|HUNYUAN_VLLM|NCCL|GLOO|TP|UCX|OMP|MKL|KMP|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|CUBLAS|TRITON|FLASHINFER"
    r"|FLASH_ATTENTION|LMCACHE|HF|HUGGING_FACE|TRANSFORMERS|SAFETENSORS|TOKENIZERS|TIKTOKEN|XDG)_\w+"
    r"|DO_NOT_TRACK|LD_LIBRARY_PATH|LD_PRELOAD|PATH|PYTHONHASHSEED|PYTHONPATH|TMPDIR|TZ|LANG|LC_ALL"
)
# Below the home directory, which SSH sessions and shells agree about; XDG_CONFIG_HOME is set in some of them only.
NODE_DIRECTORY = Path(".config/hunyuan-vllm/cluster")


def names_a_secret(variable: str) -> bool:
    """Whether the variable of that name is to be kept from other processes and nodes."""
    return SECRET.search(variable) is not None


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that Ray, and all that it starts, may inherit: those whose names do not suggest a secret."""
    return {name: value for name, value in environ.items() if not names_a_secret(name)}


def kept_from_workers(environ: Mapping[str, str]) -> set[str]:
    """The variables that are not to be copied to Ray's workers."""
    asked = {name.strip() for name in environ.get("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "").split(",")}
    copied = {name for name in environ if STEERING.fullmatch(name) and not names_a_secret(name)}
    return environ.keys() - copied - asked


def limit_copied_variables() -> None:
    """Tell vLLM, in this process: its own list of such names is what $VLLM_CONFIG_ROOT has in a file for it."""
    from vllm.ray import ray_env

    ray_env.RAY_NON_CARRY_OVER_ENV_VARS.update(kept_from_workers(os.environ))


def current_cluster_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where `ray start` writes the address of the cluster that programs on this machine join."""
    return Path(environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")


def cluster_variables(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> dict[str, str]:
    """The variables by which a program joins the cluster that this machine is a node of, without those already set.

    Empty where `cluster up` or `ray_head.sh` started no node here, where another Ray has taken its place, and where
    RAY_ADDRESS names another cluster.
    """
    try:
        current = current_cluster_file(environ).read_text().strip()
    except OSError:
        return {}
    own = own_addresses()
    for file in sorted(((home or Path.home()) / NODE_DIRECTORY).glob("node-*.json")):
        try:
            variables: dict[str, str] = json.loads(file.read_text())["environment"]
            address, cluster = variables["VLLM_HOST_IP"], variables["RAY_ADDRESS"]
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if address in own and cluster == current:
            if environ.get("RAY_ADDRESS", "").strip() not in ("", "auto", cluster):
                return {}
            # Without the address: programs find that where `ray start` wrote it.
            return {name: value for name, value in variables.items() if name not in environ and name != "RAY_ADDRESS"}
    return {}


def join_own_cluster() -> None:
    """Let this process join the Ray cluster that this machine is a node of, as `cluster_variables` says."""
    if missing := cluster_variables():
        # Ray reads its settings as it is imported, which vLLM has done here by now: a forked engine would keep them.
        os.environ.update(missing, VLLM_WORKER_MULTIPROC_METHOD="spawn")
