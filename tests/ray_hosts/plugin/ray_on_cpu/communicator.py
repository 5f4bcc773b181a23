"""The communicator: ranks on different hosts share no memory, which vLLM's own takes for granted on CPUs."""

import socket

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class RayOnCpuCommunicator(CpuCommunicator):
    """vLLM compares the name of the shared memory, which is the same on two hosts: here the hosts are compared too."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        names = [""] * self.world_size
        torch.distributed.all_gather_object(names, socket.gethostname(), group=self.device_group)
        return len(set(names)) == 1 and super()._all_group_ranks_share_shm_group_name()
