"""The decision: settings, the user's vLLM flags, the machine and the model → one command line and environment.

Pure, so that every case is a row in a test. Whatever the user gave wins; ours fills in the rest.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hunyuan_vllm import envs
from hunyuan_vllm.chat_template import WITH_TOOLS
from hunyuan_vllm.quant.schemes import Scheme
from hunyuan_vllm.replies import parsers_for
from hunyuan_vllm.server.hardware import Machine
from hunyuan_vllm.server.models import (
    ModelSource,
    check_adapters,
    check_files,
    check_scheme,
    cpu_weight_bytes,
    gpu_weight_bytes,
)
from hunyuan_vllm.server.network import interface_env
from hunyuan_vllm.server.options import SURFACE_VARIABLE, Flags, Surface
from hunyuan_vllm.server.parallel import Ranks, choose_context_ranks, choose_ranks
from hunyuan_vllm.settings import KEY_FILE_VARIABLE, Settings
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import LOOPBACK, is_loopback

__all__ = ["Launch", "decide"]

MIB = 2**20
GIB = 2**30
DEMO_KV_CACHE = 256 * MIB
LEAST_KV_CACHE = 256 * MIB
MOST_KV_CACHE = 4 * GIB
PROCESS_MEMORY = 2 * GIB  # a CPU server's own: front end, engine core and worker processes, activations
OPEN = "hunyuan_vllm.server.middleware.stack.Open"
BEHIND_KEY = "hunyuan_vllm.server.middleware.stack.BehindKey"
DEFAULT_SURFACE = Surface()
ANY_ADDRESS = "0.0.0.0"  # what vLLM makes of an empty --host
EXPERT_LOAD = "hunyuan_vllm.expert_load.ExpertLoad"
ADMIN_VARIABLES = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
DECIDED = (KEY_FILE_VARIABLE, SURFACE_VARIABLE, *ADMIN_VARIABLES)  # set even where they are inherited
# Options that may name something on the hub even where the model itself is a folder.
HUB_OPTIONS = ("tokenizer", "speculative-config", "lora-modules", "hf-config-path", "generation-config")


@dataclass(frozen=True)
class Launch:
    """A server to start.

    Attributes:
        argv: the command, complete.
        env: variables to set beside the inherited ones; never a secret.
        host, port: where it will listen.
        model_name: a name that requests may call the model by.
        key_file: the file with the API key; None if the key is in the environment or none is asked for.
        needs_key: requests must carry the key.
        tls: it speaks HTTPS.
        uds: the Unix socket it listens on instead of the port.
        headless: it has no HTTP at all: the front end is on another node.
        ray_gpus: GPUs it takes of a Ray cluster; 0 without Ray.
        notes: what the user should know about the choices made.
    """

    argv: list[str]
    env: dict[str, str]
    host: str
    port: int
    model_name: str
    key_file: Path | None = None
    needs_key: bool = False
    tls: bool = False
    uds: str | None = None
    headless: bool = False
    ray_gpus: int = 0
    notes: list[str] = field(default_factory=list)

    def shell(self) -> str:
        """The command and its environment as a line to paste into a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        command = " ".join(map(shlex.quote, self.argv))
        return " \\\n  ".join([" ".join(["env", *variables]), command])


def decide(
    settings: Settings,
    flags: Flags,
    machine: Machine,
    model: ModelSource,
    environ: Mapping[str, str],
    insecure: bool = False,
    scheme: Scheme | None = None,
    surface: Surface = DEFAULT_SURFACE,
    json_logs: bool = False,
    expert_load: bool = False,
    tools: bool = False,
) -> Launch:
    """Decide on the server to start.

    Args:
        environ: the environment it will inherit; a variable set there is not set again.
        insecure: the user accepts a server that others can reach without a key.
        scheme: how the network is quantised, where it is to be.
        surface: the routes and limits of the server.
        json_logs: its log is a JSON object a line.
        expert_load: its /metrics say how many tokens each expert has had.
        tools: prompts show the model tools, its calls and their results.

    Raises:
        UserError: what the user asked for cannot work, or not safely.
    """
    if "api-key" in flags:
        raise UserError(
            f"--api-key would show the key to every user of this machine: put it into a file and name that with "
            f"{KEY_FILE_VARIABLE}=, or set VLLM_API_KEY"
        )
    check_files(model, flags, environ)
    if not machine.cuda and model.format is not None and model.format.cpus:
        raise UserError(f"{model.given} ({model.format.name}): {model.format.cpus}")
    check_adapters(flags, model.config, cpu=not machine.cuda)
    if scheme:
        check_scheme(scheme, model)
    quantization = flags.get("quantization") or (scheme.quantization if scheme else None)
    weights = gpu_weight_bytes(model, quantization)
    ranks = choose_ranks(settings, flags, machine, model, scheme.max_ranks if scheme else None, weights)

    notes = list(ranks.notes)
    names = ["hunyuan", model.given]
    ours: dict[str, list[str]] = {"host": [settings.host], "port": [str(settings.port)], "served-model-name": names}
    if ranks.tensor > 1:
        ours["tensor-parallel-size"] = [str(ranks.tensor)]
    if ranks.executor:
        ours["distributed-executor-backend"] = [ranks.executor]
    # The model's full length where its KV cache fits, else what does.
    ours["max-model-len"] = ["auto"]
    ours |= _front_end_options(flags, surface, json_logs)
    ours |= _reply_options(flags, model, tools, notes)
    if expert_load:
        if "worker-extension-cls" in flags:
            raise UserError("--expert-load is a worker extension, and vLLM takes one: leave out --worker-extension-cls")
        ours["worker-extension-cls"] = [EXPERT_LOAD]
    if scheme:
        ours |= {name: [value] for name, value in scheme.options.items()}
    if not machine.fp8_cache and "kv-cache-dtype" in ours and "kv-cache-dtype" not in flags:
        del ours["kv-cache-dtype"]
        notes.append("an FP8 KV cache needs a CPU with AVX-512 or AMX: here the cache keeps the model's own type")
    fp8_cache = (flags.get("kv-cache-dtype") or ours.get("kv-cache-dtype", ["auto"])[0]).startswith("fp8")
    context = choose_context_ranks(flags, machine.gpu, model, ranks.tensor, fp8_cache)
    if context > 1:
        ours["decode-context-parallel-size"] = [str(context)]
    if not machine.cuda:
        ours |= _cpu_options(flags, machine, model, ranks, quantization, environ, notes)

    argv = [*(word for name, values in ours.items() if name not in flags for word in (f"--{name}", *values))]
    # What follows rests on what vLLM will make of the whole line.
    understood = Flags([*argv, *flags.argv])
    host, port = understood.get("host") or ANY_ADDRESS, understood.integer("port", settings.port)
    uds = understood.get("uds") or None
    reachable = not (uds or is_loopback(host))
    surface = surface.model_copy(update={"insecure": insecure})
    key_file = _key_file(settings, reachable and not insecure, insecure or uds is not None, surface)
    needs_key = key_file is not None or settings.api_key
    _check_front_end(understood, environ, needs_key)
    argv += ["--middleware", BEHIND_KEY if needs_key else OPEN]  # a user's own stay beside it
    env = _environment(settings, flags, machine, model, ranks) | surface.environment(environ)
    if surface.admin:
        env |= dict.fromkeys(ADMIN_VARIABLES, "1")
    if key_file is not None:
        env[KEY_FILE_VARIABLE] = str(key_file)
    return Launch(
        argv=[*machine.vllm_command, model.name, *argv, *flags.argv],
        env={name: value for name, value in env.items() if name not in environ or name in DECIDED},
        host=host,
        port=port,
        model_name=understood.get("served-model-name")[0] or names[0],
        key_file=key_file,
        needs_key=needs_key,
        tls=bool(understood.get("ssl-certfile")),
        uds=uds,
        headless=bool(understood.get("headless")),
        ray_gpus=ranks.world if ranks.executor == "ray" else 0,
        notes=notes,
    )


def _front_end_options(flags: Flags, surface: Surface, json_logs: bool) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {
        "disable-uvicorn-access-log": [],  # our own log has more of each request
        # vLLM lets the pages of any site use a server that the browser reaches, one on loopback without a key included.
        "allowed-origins": ["[]"],
        "enable-prompt-tokens-details": [],  # how much of a prompt was in the cache
        # JSON without white space, of which a model can write without end and never come to the point. vLLM takes that
        # for a backend that is named, which is the one it prefers anyway.
        "structured-outputs-config": [json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})],
    }
    if json_logs and "logging-config" not in flags:
        options["logging-config.formatter"] = ["json"]
    if surface.admin:
        options["no-log-error-stack"] = []  # which comes with development mode, and quotes what clients sent
    if flags.get("ssl-certfile"):
        options["enable-ssl-refresh"] = []  # a renewed certificate is taken without a restart
    if surface.max_output_tokens:
        if "override-generation-config" in flags:
            raise UserError(
                "--max-output-tokens and --override-generation-config exclude each other: give "
                f"--override-generation-config '{{\"max_new_tokens\": {surface.max_output_tokens}, …}}' alone"
            )
        # For requests that do not say how much they want.
        options["override-generation-config"] = [json.dumps({"max_new_tokens": surface.max_output_tokens})]
    return options


def _reply_options(flags: Flags, model: ModelSource, tools: bool, notes: list[str]) -> dict[str, list[str]]:
    """The parsers that fit what the chat template makes the model write, and a template with tools if it lacks one."""
    given = flags.get("chat-template")
    template = (_text(given) if given else model.chat_template) or ""
    reasoning, calls = parsers_for(template)
    # Without a parser vLLM calls no tool, not even one that is named; with one, only this level pins arguments.
    options: dict[str, list[str]] = {
        "tool-call-parser": [calls or "hunyuan_large"],
        "enable-auto-tool-choice": [],
        "tool-strict-level": ["parameter"],
    }
    if reasoning:
        options["reasoning-parser"] = [reasoning]
    if tools and not calls:
        options["chat-template"] = [str(WITH_TOOLS)]
    if not (model.local or given or tools or "reasoning-parser" in flags or "tool-call-parser" in flags):
        notes.append(
            "the chat template of a model on the hub is not looked at: one that thinks or calls tools (A13B, 0.5B–7B) "
            "needs --reasoning-parser hunyuan_v1 --tool-call-parser hunyuan_v1, or MODEL_PATH= its folder"
        )
    return options


def _text(template: str) -> str:
    """What --chat-template names: a file, or the template itself."""
    try:
        return Path(template).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return template


def _key_file(settings: Settings, required: bool, open_allowed: bool, surface: Surface) -> Path | None:
    """The file with the key to require, if the key is to come from a file."""
    if settings.api_key_file and settings.api_key:
        raise UserError(f"VLLM_API_KEY and {KEY_FILE_VARIABLE} are both set: unset one")
    if settings.api_key_file:
        return settings.api_key_file
    if settings.api_key:
        return None
    if surface.admin and open_allowed:
        raise UserError("--admin-routes are for those who have a key: leave out --insecure, or set one")
    return settings.config_home / "hunyuan-vllm" / "api-key" if required or surface.admin else None


def _check_front_end(understood: Flags, environ: Mapping[str, str], needs_key: bool) -> None:
    """Refuse servers that know no keys where one is needed: vLLM's gRPC server, and its front end in Rust."""
    others = {
        "--grpc": understood.get("grpc"),
        "--grpc-port": "grpc-port" in understood,
        "VLLM_USE_RUST_FRONTEND": environ.get("VLLM_USE_RUST_FRONTEND", "0").strip() not in ("", "0"),
    }
    for name, chosen in others.items():
        if chosen and needs_key:
            raise UserError(
                f"{name} starts a server that asks for no API key: leave it out, or listen on {LOOPBACK} without a key"
            )


def _cpu_options(
    flags: Flags,
    machine: Machine,
    model: ModelSource,
    ranks: Ranks,
    quantization: str | None,
    environ: Mapping[str, str],
    notes: list[str],
) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    sized = any(name in flags for name in ("kv-cache-memory-bytes", "gpu-memory-utilization"))
    if not sized and not environ.get("VLLM_CPU_KVCACHE_SPACE"):
        options["kv-cache-memory-bytes"] = [str(_cpu_kv_cache(machine, model, ranks, quantization))]
    compile_options = ("compilation-config", "optimization-level", "enforce-eager")
    if not machine.compiles and not any(name in flags for name in compile_options):
        options["compilation-config"] = ['{"mode": 0}']
        notes.append(
            "no C++ compiler or no Python headers here, so the model runs uncompiled and slower: install "
            "g++ and python3-dev (Debian, Ubuntu) to have it compiled"
        )
    return options


def _cpu_kv_cache(machine: Machine, model: ModelSource, ranks: Ranks, quantization: str | None) -> int:
    """Bytes of KV cache for each rank: half of what the weights and the processes leave free, in whole MiB.

    Not all of it: vLLM refuses to start if less is free by the time it has compiled than it was told to take.
    """
    if model.demo:
        return DEMO_KV_CACHE
    needed = cpu_weight_bytes(model, quantization) + PROCESS_MEMORY
    share = (machine.memory - needed) // 2 // ranks.world
    if share < LEAST_KV_CACHE:
        raise UserError(
            f"{model.given} needs {(needed + 2 * ranks.world * LEAST_KV_CACHE) / GIB:.1f} GiB of memory and "
            f"{machine.memory / GIB:.1f} GiB is free: free some, use a larger machine, or give "
            "--kv-cache-memory-bytes to try all the same"
        )
    return min(share, MOST_KV_CACHE) // MIB * MIB


def _environment(
    settings: Settings, flags: Flags, machine: Machine, model: ModelSource, ranks: Ranks
) -> dict[str, str]:
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        envs.LIMIT_RAY_VARIABLES: "1",
        # Longer than a client keeps a connection (httpx: 5 s, vLLM's default too): else both may close it at once, and
        # a request that is just being sent is lost.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        # A compiled grammar takes a hundred times what xgrammar counts (benchmarks/grammar_cache.py): vLLM's 512 MiB
        # would be all of the memory before they bound anything.
        "VLLM_XGRAMMAR_CACHE_MB": "1",
        # vLLM kills its engine as it stops; what that had is freed by Python, which warns of it.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
    }
    if model.local and not any(name in flags for name in HUB_OPTIONS):
        env["HF_HUB_OFFLINE"] = "1"
    if not machine.cuda and ranks.world > 1:
        # By itself vLLM binds each rank to a NUMA node of its own and refuses more ranks than nodes.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env["OMP_NUM_THREADS"] = str(max(machine.cores // ranks.world, 1))
    return env | interface_env(settings, machine, ranks.several_nodes)
