"""How many ranks a server has, which executor starts them, and the network interface between them"""

from dataclasses import dataclass, field

from hunyuan_vllm.doctor.hardware import Gpu
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.plan.hardware import choose_backend
from hunyuan_vllm.preflight import check_parallel_on_cpus, check_tensor_parallel
from hunyuan_vllm.server.hardware import Machine
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.server.options import MIB, Flags
from hunyuan_vllm.server.ray_cluster import describe_nodes
from hunyuan_vllm.util.errors import NotYetError, UserError
from hunyuan_vllm.util.net import INTERFACE_VARIABLES, LOOPBACK, interface_of

LOOPBACK_INTERFACE = "lo"
USUAL_INTERFACE = "bond1"
# Options with which splitting the KV cache over ranks may not work.
INCOMPATIBLE = ("decode-context-parallel-size", "attention-backend", "speculative-config", "kv-transfer-config")


def choose_context_ranks(flags: Flags, gpu: Gpu | None, model: ModelSource, tensor: int, fp8_cache: bool) -> int:
    """vLLM's --decode-context-parallel-size; 1 to leave the option out.

    With more tensor-parallel ranks than KV heads, several ranks hold the same head. With this option they hold
    different tokens of it, and the cache takes that many times the tokens.
    """
    if gpu is None or model.config is None or any(name in flags for name in INCOMPATIBLE):
        return 1
    copies = tensor // model.config.num_key_value_heads
    if copies <= 1:
        return 1
    major, minor = divmod(round(10 * gpu.capability), 10)
    backend, _ = choose_backend((major, minor), model.config.head_dim, fp8_cache, copies)
    return copies if backend else 1


WEIGHTS_SHARE = 0.85  # of a GPU's memory; vLLM takes 0.92, some of it for the cache and activations


@dataclass(frozen=True)
class Ranks:
    """Parallel sizes.

    Attributes:
        world: all ranks: tensor × pipeline × data parallel.
        executor: vLLM's --distributed-executor-backend, or None for its default on one machine.
    """

    tensor: int
    world: int
    executor: str | None = None
    several_nodes: bool = False
    notes: list[str] = field(default_factory=list)


def choose_ranks(
    settings: Settings,
    flags: Flags,
    machine: Machine,
    model: ModelSource,
    most: int | None = None,
    weight_bytes: int = 0,
) -> Ranks:
    """Decide on the ranks. They may need more GPUs than a Ray cluster has free: the start then waits for those.

    Args:
        most: GPUs to use at most, unless the user says how many.
        weight_bytes: size of the weights as GPUs hold them; 0 if unknown.
    """
    others = flags.integer("pipeline-parallel-size", 1) * flags.integer("data-parallel-size", 1)
    asked = flags.integer("tensor-parallel-size", 0) or settings.tp_size
    executor = flags.get("distributed-executor-backend")
    started_by_user = any(name in flags for name in ("nnodes", "headless", "data-parallel-address"))
    if not machine.cuda or model.demo or started_by_user:
        tensor = asked or 1
        _check_division(model, tensor)
        if not machine.cuda and model.config is not None:
            expert_parallel = bool(flags.get("enable-expert-parallel"))
            try:
                check_parallel_on_cpus(model.config, flags.integer("data-parallel-size", 1), expert_parallel)
            except ValueError as error:
                raise UserError(str(error)) from error
        return Ranks(tensor, tensor * others, executor, several_nodes=started_by_user or executor == "ray")
    total = max(machine.ray.gpus if machine.ray else 0, machine.gpus)
    if total == 0:
        raise NotYetError("no GPU is visible (nvidia-smi -L, CUDA_VISIBLE_DEVICES) and no Ray cluster offers one")
    notes: list[str] = []
    usable = total // others
    if most and not asked and usable > most:
        notes.append(f"using {most} of {usable} GPUs: set TP_SIZE for more")
        usable = most
    tensor = asked or _largest_division(model, usable, notes)
    if not asked and machine.ray:
        tensor = max(tensor, _min_gpus(weight_bytes // others, machine.gpu, model))
    _check_division(model, tensor)
    world = tensor * others
    if world > total and machine.ray is None:
        raise NotYetError(
            f"{world} GPUs are asked for and {total} are here: set TP_SIZE={max(total // others, 1)} or less, or start "
            "Ray on several nodes (hunyuan-vllm cluster up)"
        )
    if executor is None and world > machine.gpus:
        executor = "ray"
    if executor == "ray" and machine.ray and machine.ray.free_gpus < world:
        notes.append(f"waits for {world} GPUs in Ray: {'; '.join(describe_nodes(machine.ray, settings.node_ips))}")
    return Ranks(tensor, world, executor, executor == "ray", notes)


def _largest_division(model: ModelSource, gpus: int, notes: list[str]) -> int:
    """The largest number of these GPUs that the network can be divided over."""
    for size in range(gpus, 1, -1):
        if _division_problem(model, size) is None:
            if size < gpus:
                notes.append(f"using {size} of {gpus} GPUs: the network cannot be divided over more")
            return size
    return 1


def _min_gpus(weight_bytes: int, gpu: Gpu | None, model: ModelSource) -> int:
    """The fewest GPUs that hold the weights and that the network can be divided over; 1 if there is no such number."""
    if gpu is None or model.config is None:
        return 1
    for size in range(1, model.config.num_attention_heads + 1):
        if weight_bytes <= size * gpu.memory * MIB * WEIGHTS_SHARE and _division_problem(model, size) is None:
            return size
    return 1


def _check_division(model: ModelSource, size: int) -> None:
    if problem := _division_problem(model, size):
        raise UserError(problem)


def _division_problem(model: ModelSource, size: int) -> str | None:
    """Why the network cannot be divided over `size` ranks; None if it can, or if its config is on the hub."""
    if model.config is None:
        return None
    try:
        check_tensor_parallel(model.config, size)
        if model.format is not None:
            model.format.check_ranks(model.config, size)
    except ValueError as error:
        return str(error)
    return None


def interface_env(settings: Settings, machine: Machine, several_nodes: bool) -> dict[str, str]:
    """The variables that name this node's address and the network interface between ranks."""
    if settings.local_ip and not interface_of(settings.local_ip, machine.interfaces):
        own = sorted(address for addresses in machine.interfaces.values() for address in addresses)
        raise UserError(f"LOCAL_IP={settings.local_ip} is not this machine's address: it has {', '.join(own)}")
    interface = settings.socket_ifname
    if interface and interface not in machine.interfaces:
        names = ", ".join(sorted(machine.interfaces))
        raise UserError(f"SOCKET_IFNAME={interface} does not exist; this machine has {names}")
    if not several_nodes and not interface:
        return {"VLLM_HOST_IP": LOOPBACK} | dict.fromkeys(INTERFACE_VARIABLES, LOOPBACK_INTERFACE)
    env = {"VLLM_HOST_IP": settings.local_ip} if settings.local_ip else {}
    if not interface and settings.local_ip:
        bonded = USUAL_INTERFACE in machine.interfaces
        interface = USUAL_INTERFACE if bonded else interface_of(settings.local_ip, machine.interfaces)
    return env | (dict.fromkeys(INTERFACE_VARIABLES, interface) if interface else {})
