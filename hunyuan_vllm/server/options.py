"""What the user asked for: environment variables, vLLM's flags, routes and limits"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hunyuan_vllm.server.vllm_parser import parse
from hunyuan_vllm.util.errors import UserError

KEY_FILE_VARIABLE = "HUNYUAN_VLLM_API_KEY_FILE"
DEFAULT_PORT = 8020
DEFAULT_GPU_WAIT = 600  # seconds
LOOPBACK = "127.0.0.1"


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
        if local_ip and not _is_address(local_ip):
            raise UserError(f"LOCAL_IP={local_ip} is not an IP address: use this machine's, as in LOCAL_IP=10.0.0.5")
        node_ips = tuple((text("NODE_IPS") or "").replace(",", " ").split())
        if wrong := [address for address in node_ips if not _is_address(address)]:
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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _integer(name: str, text: str | None, least: int, most: int) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise UserError(f"{name}={text} is not a number from {least} to {most}")
    return int(text)


MODEL = ("model_tag", "model")


class Flags:
    """A user's vLLM arguments as vLLM's parser understands them, by the option's long name.

    Attributes:
        argv: the arguments without the model.
        model: the model among them, or in a file named by --config; None if there is none.
    """

    def __init__(self, argv: Sequence[str] = (), own_options: Sequence[str] = ()) -> None:
        """Raises UserError if vLLM would not take them; `own_options` are names that may have been meant, too."""
        self.argv = list(argv)
        self._given = parse(self.argv, own_options)
        models = {name: self._given.pop(name) for name in MODEL if name in self._given}
        if len(set(models.values())) > 1:
            raise UserError(f"the model is given twice: {' and '.join(models.values())}; leave one out")
        self.model: str | None = next(iter(models.values()), None)
        for name in models:
            self._leave_out(name)

    def __contains__(self, name: str) -> bool:
        return name.replace("-", "_") in self._given

    def get(self, name: str) -> Any:
        """The option's value; None if it is absent."""
        return self._given.get(name.replace("-", "_"))

    def integer(self, name: str, default: int) -> int:
        """The option's value as a number of at least 1.

        Raises:
            UserError: it is not one.
        """
        value = self.get(name)
        if value is None:
            return default
        if int(value) < 1:
            raise UserError(f"--{name} {value} is not a number of at least 1")
        return int(value)

    def _leave_out(self, name: str) -> None:
        """Take a model's words out of `argv`: those without which vLLM would understand the same, but for the model.

        None are there to take if the model is named in a file.
        """
        wanted = {key: value for key, value in parse(self.argv).items() if key != name}
        for start in range(len(self.argv)):
            for words in (1, 2):
                rest = [*self.argv[:start], *self.argv[start + words :]]
                try:
                    same = parse(rest) == wanted
                except UserError:
                    continue
                if same:
                    self.argv = rest
                    return


SURFACE_VARIABLE = "HUNYUAN_VLLM_SURFACE"  # JSON, set by the launch: vLLM makes its middleware without arguments
MIB = 2**20
Limit = Annotated[int, Field(ge=0)]


class Surface(BaseModel):
    """Routes and limits. A limit of 0 is none.

    Attributes:
        insecure: others than this machine may use it without a key.
        admin: vLLM's administrative routes are there, for the key that may use them.
        extra_routes: paths of vLLM's that are open beside the usual ones.
        max_body: bytes of a request.
        max_prompt_tokens: tokens of a prompt; 0 leaves the model's context length.
        max_output_tokens: the most a request may ask for; 0 leaves the model's context length.
        max_sequences: sequences one request may ask for: its prompts times n.
        max_requests_per_key: generating requests a key may have under way at once.
        max_queue: sequences that may wait for a place in the engine's batch.
        ignore_unknown_fields: a field of a request that nothing reads is passed over instead of refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    insecure: bool = False
    admin: bool = False
    extra_routes: tuple[str, ...] = ()
    max_body: Limit = 16 * MIB
    max_prompt_tokens: Limit = 0
    max_output_tokens: Limit = 0
    max_sequences: Limit = 256
    max_requests_per_key: Limit = 512
    max_queue: Limit = 1024
    ignore_unknown_fields: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Surface:
        """As the launch set it; the defaults where it did not."""
        text = environ.get(SURFACE_VARIABLE)
        return cls.model_validate_json(text) if text else cls()

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The variable that tells the server's process; none where that would find everything so by itself."""
        if self == Surface.read(inherited):
            return {}
        return {SURFACE_VARIABLE: self.model_dump_json(exclude_defaults=True)}
