"""The environment variables that say what to serve, where and on what"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import LOOPBACK, is_address

KEY_FILE_VARIABLE = "HUNYUAN_VLLM_API_KEY_FILE"
DEFAULT_PORT = 8020
DEFAULT_GPU_WAIT = 600  # seconds


@dataclass(frozen=True)
class Settings:
    """What the user set.

    Attributes:
        model: MODEL_PATH, a checkpoint folder or a hub name; None serves the demo model.
        local_ip: LOCAL_IP, this node's address among the nodes; also what the server listens on unless HOST is set.
        host: HOST, the address to listen on.
        port: PORT.
        tp_size: TP_SIZE, tensor-parallel ranks; None means all GPUs.
        socket_ifname: SOCKET_IFNAME, the network interface between nodes.
        node_ips: NODE_IPS, the nodes that the Ray cluster is to have; empty where that is not said.
        gpu_wait: GPU_WAIT, seconds to wait for GPUs of the Ray cluster.
        api_key: whether VLLM_API_KEY is set; the key itself stays in the environment.
        api_key_file: HUNYUAN_VLLM_API_KEY_FILE.
        config_home: where a generated key is kept.
        cache_home: where a converted demo model is kept.
    """

    model: str | None = None
    local_ip: str | None = None
    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    tp_size: int | None = None
    socket_ifname: str | None = None
    node_ips: tuple[str, ...] = ()
    gpu_wait: int = DEFAULT_GPU_WAIT
    api_key: bool = False
    api_key_file: Path | None = None
    config_home: Path = Path("~/.config").expanduser()
    cache_home: Path = Path("~/.cache").expanduser()

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Read them.

        Raises:
            UserError: a value means nothing.
        """

        def text(name: str) -> str | None:
            return environ.get(name, "").strip() or None

        local_ip = text("LOCAL_IP")
        if local_ip and not is_address(local_ip):
            raise UserError(f"LOCAL_IP={local_ip} is not an IP address: use this machine's, as in LOCAL_IP=10.0.0.5")
        node_ips = tuple((text("NODE_IPS") or "").replace(",", " ").split())
        if wrong := [address for address in node_ips if not is_address(address)]:
            raise UserError(f"NODE_IPS: {wrong[0]} is not an IP address: name nodes as in NODE_IPS=10.0.0.5,10.0.0.6")
        key_file = text(KEY_FILE_VARIABLE)
        gpu_wait = _integer("GPU_WAIT", text("GPU_WAIT"), 0, 10**6)
        config_home = text("XDG_CONFIG_HOME") or "~/.config"
        cache_home = text("XDG_CACHE_HOME") or "~/.cache"
        return cls(
            model=text("MODEL_PATH"),
            local_ip=local_ip,
            host=text("HOST") or local_ip or LOOPBACK,
            port=_integer("PORT", text("PORT"), 1, 65535) or DEFAULT_PORT,
            tp_size=_integer("TP_SIZE", text("TP_SIZE"), 1, 4096),
            socket_ifname=text("SOCKET_IFNAME"),
            node_ips=node_ips,
            gpu_wait=DEFAULT_GPU_WAIT if gpu_wait is None else gpu_wait,
            api_key=text("VLLM_API_KEY") is not None,
            api_key_file=Path(key_file).expanduser() if key_file else None,
            config_home=Path(config_home).expanduser(),
            cache_home=Path(cache_home).expanduser(),
        )


def _integer(name: str, text: str | None, least: int, most: int) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise UserError(f"{name}={text} is not a number from {least} to {most}")
    return int(text)
