"""Which variables vLLM copies from a server to its Ray workers, by vLLM's own function."""

from __future__ import annotations

import pytest
from vllm.ray import ray_env
from vllm.v1.executor.ray_env_utils import get_driver_env_vars

from hunyuan_vllm.ray_environment import kept_from_workers, limit_copied_variables


@pytest.fixture
def copied(monkeypatch):
    """Names that would be copied, once our limit is set, of the variables that a test gives."""
    before = set(ray_env.RAY_NON_CARRY_OVER_ENV_VARS)

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


def test_names_alone_decide():
    assert kept_from_workers({"VLLM_LOGGING_LEVEL": "a-secret", "OTHER": "harmless"}) == {"OTHER"}
