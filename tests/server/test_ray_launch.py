"""The decision where there is a Ray cluster: how many GPUs are counted on, and which ranks share a cache."""

import pytest

from hunyuan_vllm.cluster.ray_nodes import RayNode
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.doctor.hardware import Gpu
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.quant.schemes import FP8, INT8, Scheme
from hunyuan_vllm.server.hardware import Machine
from hunyuan_vllm.server.launch import Launch, decide
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.server.ray_cluster import RayCluster
from hunyuan_vllm.util.errors import UserError

GIB = 2**30
LARGE = HunYuanConfig(
    use_cla=True, cla_share_factor=2, num_hidden_layers=64, hidden_size=6400, intermediate_size=18304,
    num_attention_heads=80, num_key_value_heads=8, num_experts=16, use_mixed_mlp_moe=True, num_shared_expert=1,
)  # fmt: skip
MODEL = ModelSource("/models/large", "/models/large", LARGE, weight_bytes=725 * GIB)
H20, H200, L40S = (
    Gpu(0, name, "570.86", capability, gibibytes * 1024, 4, mig=False, ecc_errors=0)
    for name, capability, gibibytes in (("H20", 9.0, 96), ("H200", 9.0, 140), ("L40S", 8.9, 45))
)
HEAD, WORKER = RayNode("10.0.0.5", 8, 8), RayNode("10.0.0.6", 8, 8)
ALONE, WHOLE = RayCluster([HEAD]), RayCluster([HEAD, WORKER])
BUSY = RayCluster([HEAD, RayNode("10.0.0.6", 8, 3)])


def launch(ray, *flags, gpu=H20, scheme: Scheme | None = None, model=MODEL, **environ) -> Launch:
    machine = Machine(cuda=True, gpus=8, gpu=gpu, ray=ray)
    return decide(Settings.read(environ), Flags(flags), machine, model, environ, scheme=scheme)


def option(made: Launch, name: str) -> str | None:
    return made.argv[made.argv.index(name) + 1] if name in made.argv else None


@pytest.mark.parametrize(
    ("ray", "gpu", "scheme", "environ", "tensor", "gpus_of_ray"),
    [
        (WHOLE, H20, None, {}, "16", 16),
        (BUSY, H20, None, {}, "16", 16),  # those that are taken are waited for
        (ALONE, H20, None, {}, "16", 16),  # 725 GiB do not fit on 8 × 96 GiB beside a cache
        (ALONE, H200, None, {}, "8", 0),
        (ALONE, None, None, {}, "8", 0),  # unknown memory: what there is
        (ALONE, H20, None, {"TP_SIZE": "8"}, "8", 0),
        (ALONE, H20, None, {"TP_SIZE": "16"}, "16", 16),
        (ALONE, H20, INT8, {}, "8", 0),
        (WHOLE, H20, INT8, {}, "8", 0),
        (WHOLE, H20, INT8, {"TP_SIZE": "16"}, "16", 16),
    ],
)
def test_gpus_counted_on(ray, gpu, scheme, environ, tensor, gpus_of_ray):
    made = launch(ray, gpu=gpu, scheme=scheme, **environ)
    assert (option(made, "--tensor-parallel-size"), made.ray_gpus) == (tensor, gpus_of_ray)
    assert option(made, "--distributed-executor-backend") == ("ray" if gpus_of_ray else None)


def test_stages_count_too():
    made = launch(ALONE, "--pipeline-parallel-size", "2")
    assert (option(made, "--tensor-parallel-size"), made.ray_gpus) == ("8", 16)


def test_what_is_waited_for_is_said_before():
    assert launch(WHOLE).notes == []
    assert launch(BUSY, NODE_IPS="10.0.0.5,10.0.0.6,10.0.0.7").notes == [
        "waits for 16 GPUs in Ray: 10.0.0.5 has 8 of its 8 GPUs free; 10.0.0.6 has 3 of its 8 GPUs free: another Ray "
        "program uses the others; 10.0.0.7 has not joined: run sh deploy/ray_worker.sh HEAD_IP there"
    ]


@pytest.mark.parametrize(
    ("ray", "gpu", "flags", "expected"),
    [
        (WHOLE, H20, [], "2"),
        (WHOLE, H20, ["--kv-cache-dtype", "fp8"], "2"),
        (WHOLE, None, [], None),
        (WHOLE, L40S, [], "2"),
        (WHOLE, L40S, ["--kv-cache-dtype", "fp8"], None),  # FLASH_ATTN reads no FP8 cache there; Triton cannot share
        (WHOLE, H20, ["--attention-backend", "TRITON_ATTN"], None),
        (WHOLE, H20, ["--speculative-config", '{"method": "ngram"}'], None),
        (WHOLE, H200, ["-tp", "8"], None),  # each KV head is on one rank
    ],
)
def test_ranks_with_the_same_kv_head_share_a_cache(ray, gpu, flags, expected):
    assert option(launch(ray, *flags, gpu=gpu), "--decode-context-parallel-size") == expected


def test_a_users_own_size_stays():
    made = launch(WHOLE, "--decode-context-parallel-size=1")
    assert "--decode-context-parallel-size" not in made.argv


def test_more_than_one_machine_has_needs_ray():
    with pytest.raises(UserError, match="16 GPUs are asked for and 8 are here: .*or start Ray on several nodes"):
        launch(None, TP_SIZE="16")


@pytest.mark.parametrize(
    ("environ", "message"),
    [({"NODE_IPS": "10.0.0.5,node2"}, "NODE_IPS: node2 is not an IP address"), ({"GPU_WAIT": "soon"}, "GPU_WAIT=soon")],
)
def test_settings_that_mean_nothing(environ, message):
    with pytest.raises(UserError, match=message):
        Settings.read(environ)


def test_the_wait_can_be_set():
    assert Settings.read({}).gpu_wait == 600
    assert Settings.read({"GPU_WAIT": "0"}).gpu_wait == 0
    assert FP8.max_ranks == INT8.max_ranks == 8
