"""A real server with all that an operator may switch on: keys by name, TLS, limits, adapters, JSON logs."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from adapters import adapter_pairs, rename_modules, write_adapter
from certificates import own_certificate
from openai import OpenAI
from serving import Server, running_server

from hunyuan_vllm import demo
from hunyuan_vllm.config import HunYuanConfig

KEYS = {"admin": "the-key-of-the-operator", "alice": "the-key-of-alice", "bob": "the-key-of-bob"}
LIMITS = {"max-body": 0.05, "max-prompt-tokens": 200, "max-output-tokens": 256, "max-sequences": 8}
LIMITS |= {"max-requests-per-key": 4, "max-queue": 6}
PLACES = 8


@dataclass
class KeyedServer:
    """The server and what one needs to ask it."""

    server: Server
    key_file: Path
    certificate: Path
    adapters: Path

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.port}"

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))

    def http(self, name: str | None = "alice", **headers: str) -> httpx.Client:
        """A client with the key of that name, or without one."""
        if name is not None:
            headers["Authorization"] = f"Bearer {KEYS[name]}"
        return httpx.Client(base_url=self.url, verify=self.trust, headers=headers, trust_env=False, timeout=60)

    def openai(self, name: str = "alice") -> OpenAI:
        client = httpx.Client(verify=self.trust, trust_env=False)
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEYS[name], max_retries=0, http_client=client)


def write_keys(file: Path, keys: dict[str, str]) -> None:
    """As an operator should: beside, then renamed."""
    beside = file.with_suffix(".new")
    beside.touch(mode=0o600)
    beside.write_text("".join(f"{name} {key}\n" for name, key in keys.items()))
    beside.rename(file)


@contextmanager
def start_keyed_server(directory: Path) -> Iterator[KeyedServer]:
    key_file, adapters = directory / "keys", directory / "adapters"
    adapters.mkdir()
    write_keys(key_file, KEYS)
    certificate, private = own_certificate(directory)
    config = HunYuanConfig.from_pretrained(demo.path())
    for name, seed in (("style", 3), ("tone", 3), ("brief", 4)):
        write_adapter(adapters / name, adapter_pairs(config, seed))
    wrong = write_adapter(adapters / "wrong", adapter_pairs(config))
    rename_modules(wrong, lambda name: name.replace("model.", "transformer."))
    flags = [f"--{name}={value}" for name, value in LIMITS.items()]
    flags += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(private), "--admin-routes", "--json-logs"]
    flags += ["--allow-route=/load", "--enable-lora", "--lora-modules", f"style={adapters / 'style'}", "--max-loras=3"]
    flags += ["--max-lora-rank=8", "--max-num-seqs", str(PLACES), "--max-model-len=512"]
    with running_server(*flags, HUNYUAN_VLLM_API_KEY_FILE=str(key_file)) as server:
        yield KeyedServer(server, key_file, certificate, adapters)
