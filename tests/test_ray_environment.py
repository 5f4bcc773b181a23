"""Which variables vLLM copies from a server to its Ray workers, by vLLM's own function."""

import os

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.ray import ray_env
from vllm.v1.executor.ray_env_utils import get_driver_env_vars

from hunyuan_vllm import demo, plugin, ray_environment
from hunyuan_vllm.preflight import HunYuanPreflight
from hunyuan_vllm.ray_environment import kept_from_workers, limit_copied_variables


@pytest.fixture
def copied(monkeypatch):
    """Names that would be copied, once our limit is set, of the variables that a test gives."""
    monkeypatch.delenv("HUNYUAN_VLLM_LIMIT_RAY_VARIABLES", raising=False)
    before = set(ray_env.RAY_NON_CARRY_OVER_ENV_VARS)
    ray_env.RAY_NON_CARRY_OVER_ENV_VARS.clear()  # what another test's engine in this process left

    def names(**environ: str) -> set[str]:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        limit_copied_variables()
        return get_driver_env_vars(worker_specific_vars=set()).keys() & environ.keys()

    yield names
    ray_env.RAY_NON_CARRY_OVER_ENV_VARS.clear()
    ray_env.RAY_NON_CARRY_OVER_ENV_VARS.update(before)


STEERING = ["VLLM_LOGGING_LEVEL", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"]
STEERING += ["CUDA_LAUNCH_BLOCKING", "TOKENIZERS_PARALLELISM", "HUNYUAN_VLLM_CLA_SHARING", "PYTHONHASHSEED"]
SECRETS = ["VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "S3_ACCESS_KEY_ID"]
SECRETS += ["HUNYUAN_SSH_PASSWORD", "RAY_AUTH_TOKEN", "DATABASE_URL", "SSH_AUTH_SOCK", "SOMETHING_UNHEARD_OF"]
SECRETS += ["HUNYUAN_VLLM_API_KEY_FILE", "WANDB_API_KEY", "PGPASSWORD"]


def test_what_steers_is_copied_and_nothing_else(copied):
    assert copied(**dict.fromkeys(STEERING + SECRETS, "1")) == set(STEERING)


def test_an_operator_may_ask_for_more(copied):
    assert copied(MINE="1", HF_TOKEN="1", VLLM_RAY_EXTRA_ENV_VARS_TO_COPY="MINE, HF_TOKEN") >= {"MINE", "HF_TOKEN"}


@pytest.mark.parametrize(("variable", "limited"), [(None, False), ("0", False), ("1", True)])
def test_only_a_process_of_serve_or_batch_limits_them(variable, limited, copied, monkeypatch):
    """Registration happens in every vLLM process, those of other people's models included."""
    if variable:
        monkeypatch.setenv("HUNYUAN_VLLM_LIMIT_RAY_VARIABLES", variable)
    plugin.register.cache_clear()
    monkeypatch.setenv("HF_TOKEN", "theirs")
    plugin.register()
    assert ("HF_TOKEN" in ray_env.RAY_NON_CARRY_OVER_ENV_VARS) is limited


JOINED = {"RAY_AUTH_MODE": "token", "VLLM_HOST_IP": "10.0.0.5"}
# The engine's process is not to have the Ray that this one has imported without them.
SPAWNED = {**JOINED, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@pytest.mark.parametrize(("backend", "set_"), [("ray", SPAWNED), ("mp", {})])
def test_an_engine_over_ray_joins_the_cluster_of_this_machine(backend, set_, monkeypatch):
    """No other: the hook is that of our architecture alone."""
    config = EngineArgs(model=str(demo.path())).create_engine_config()
    config.parallel_config.distributed_executor_backend = backend
    monkeypatch.setattr(ray_environment, "cluster_variables", lambda: JOINED)
    for name in SPAWNED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    HunYuanPreflight.verify_and_update_config(config)
    assert {name: os.environ[name] for name in SPAWNED if name in os.environ} == set_


def test_names_alone_decide():
    assert kept_from_workers({"VLLM_LOGGING_LEVEL": "a-secret", "OTHER": "harmless"}) == {"OTHER"}
