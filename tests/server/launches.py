"""Machines and models to decide launches for, and launches as vLLM's own parser reads them"""

from argparse import Namespace
from functools import cache

from vllm.utils.argparse_utils import FlexibleArgumentParser

from hunyuan_vllm.cluster.ray_nodes import RayNode
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.server.hardware import Machine
from hunyuan_vllm.server.launch import Launch, decide
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.server.options import ApiPolicy, Flags
from hunyuan_vllm.server.ray_cluster import RayCluster

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser

GIB = 2**30
LARGE = HunYuanConfig(use_cla=True, cla_share_factor=2, num_key_value_heads=8, num_experts=16, use_mixed_mlp_moe=True)
MODEL = ModelSource("/models/large", "/models/large", LARGE, weight_bytes=777 * GIB)
SMALL = ModelSource("/models/small", "/models/small", LARGE, weight_bytes=4 * GIB)
DEMO = ModelSource("/demo", "hunyuan-demo", LARGE, weight_bytes=2**20, demo=True)
HUB = ModelSource("tencent/Hunyuan-A52B-Instruct", "tencent/Hunyuan-A52B-Instruct")

NETWORK = {"lo": ("127.0.0.1", "::1"), "eth0": ("192.168.7.2",), "ib0": ("10.0.0.5",)}
CPU = Machine(cuda=False, memory=32 * GIB, interfaces=NETWORK)
GPU8 = Machine(cuda=True, gpus=8, memory=900 * GIB, interfaces=NETWORK)
NODE1 = Machine(
    cuda=True, gpus=8, ray=RayCluster([RayNode("10.0.0.5", 8, 8), RayNode("10.0.0.6", 8, 8)]), interfaces=NETWORK
)
BONDED = Machine(cuda=True, gpus=8, ray=NODE1.ray, interfaces={**NETWORK, "bond1": ("10.1.0.5",)})


def launch(machine, model, *flags, insecure=False, **environ) -> Launch:
    policy = ApiPolicy(insecure=insecure)
    return decide(Settings.read(environ), Flags(flags), machine, model, environ, policy=policy)


@cache
def vllm_parser() -> FlexibleArgumentParser:
    return make_arg_parser(FlexibleArgumentParser())


def parsed(made: Launch) -> Namespace:
    return vllm_parser().parse_args(made.argv[made.argv.index("serve") + 1 :])
