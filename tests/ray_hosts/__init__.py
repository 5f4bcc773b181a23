"""A Ray cluster over test hosts, and a server on its head: `with Network() as network: cluster = RayHosts(network)`."""

from ray_hosts.cluster import RayHosts
from ray_hosts.requirements import need_ray_hosts
from ray_hosts.served import Answer, Served

__all__ = ["Answer", "RayHosts", "Served", "need_ray_hosts"]
