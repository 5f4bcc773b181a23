"""The platform: a rank takes one of the GPUs that a node was started with, which are a number and nothing more."""

from vllm.platforms.cpu import CpuPlatform


class RayOnCpuPlatform(CpuPlatform):
    """`ray start --num-gpus=N` says how many ranks a node takes."""

    ray_device_key = "GPU"
    ray_noset_device_env_vars = ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "ray_on_cpu.communicator.RayOnCpuCommunicator"
