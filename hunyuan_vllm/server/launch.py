"""The command line and environment of a server, decided from settings, vLLM's options, the machine and the model

Whatever the user gave wins; defaults of ours fill in the rest. Nothing is started or read here.
"""

import json
import os
import shlex
import ssl
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hunyuan_vllm import envs
from hunyuan_vllm.chat_template import WITH_TOOLS
from hunyuan_vllm.envs import KEY_FILE_VARIABLE, Settings
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
from hunyuan_vllm.server.options import MIB, POLICY_VARIABLE, ApiPolicy, Flags
from hunyuan_vllm.server.parallel import Ranks, choose_context_ranks, choose_ranks, interface_env
from hunyuan_vllm.server.vllm_serve import COMMAND
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import LOOPBACK, host_port, is_loopback, local_address
from hunyuan_vllm.util.text import GIB, gibibytes

DEMO_KV_CACHE = 256 * MIB
MIN_KV_CACHE = 256 * MIB
MAX_KV_CACHE = 4 * GIB
PROCESS_MEMORY = 2 * GIB  # a CPU server's own: front end, engine core and worker processes, activations
OPEN = "hunyuan_vllm.server.middleware.stack.Open"
BEHIND_KEY = "hunyuan_vllm.server.middleware.stack.BehindKey"
DEFAULT_POLICY = ApiPolicy()
ANY_ADDRESS = "0.0.0.0"  # vLLM's default
SCHEDULER = "hunyuan_vllm.server.scheduler.BatchingScheduler"
EXPERT_LOAD = "hunyuan_vllm.expert_load.ExpertLoad"
ADMIN_VARIABLES = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
# Set even where they are inherited.
ALWAYS_SET = (KEY_FILE_VARIABLE, POLICY_VARIABLE, envs.DRAIN_GRACE, *ADMIN_VARIABLES)
# Options that may name something on the hub even where the model itself is a directory.
HUB_OPTIONS = ("tokenizer", "speculative-config", "lora-modules", "hf-config-path", "generation-config")


@dataclass(frozen=True)
class Launch:
    """A server to start.

    Attributes:
        argv: the command, complete.
        env: variables to set beside the inherited ones; never a secret.
        host, port: where it will listen.
        model_name: a name that requests may call the model by.
        key_file: the file with the API key; None if the key is in the environment or none is required.
        needs_key: requests must carry the key.
        tls: it speaks HTTPS.
        uds: the Unix socket it listens on instead of the port.
        headless: it has no HTTP server: the front end is on another node.
        ray_gpus: GPUs it takes of a Ray cluster; 0 without Ray.
        nodes: addresses of the nodes that the Ray cluster should have, if they are known.
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
    nodes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its URL, as a client would write it."""
        return f"{'https' if self.tls else 'http'}://{host_port(self.host, self.port)}"

    @property
    def local_url(self) -> str:
        """Its URL on this machine."""
        return f"{'https' if self.tls else 'http'}://{host_port(local_address(self.host), self.port)}"

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
    *,
    scheme: Scheme | None = None,
    policy: ApiPolicy = DEFAULT_POLICY,
    grace: float | None = None,
    json_logs: bool = False,
    expert_load: bool = False,
    tools: bool = False,
) -> Launch:
    """Decide on the server to start.

    Args:
        environ: the environment it will inherit; a variable set there is not set again.
        scheme: how the weights are quantised, if the user chose that.
        policy: the routes and limits of the server, and whether it may be reached without a key.
        grace: seconds that requests may take to finish once it is told to stop; None leaves the default.
        json_logs: log JSON objects.
        expert_load: count tokens per expert in /metrics.
        tools: a chat template with tools.
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
    ours["max-model-len"] = ["auto"]  # the model's full length if its KV cache fits, else what fits
    ours |= _front_end_options(flags, policy, json_logs)
    ours |= _reply_options(flags, model, tools, notes)
    if expert_load:
        if "worker-extension-cls" in flags:
            raise UserError("--expert-load is a worker extension, and vLLM takes one: leave out --worker-extension-cls")
        ours["worker-extension-cls"] = [EXPERT_LOAD]
    if scheme:
        ours |= {name: [value] for name, value in scheme.options.items()}
    if not machine.fp8_cache and "kv-cache-dtype" in ours and "kv-cache-dtype" not in flags:
        del ours["kv-cache-dtype"]
        notes.append("an FP8 KV cache needs a CPU with AVX-512 or AMX: here the cache has the model's own type")
    fp8_cache = (flags.get("kv-cache-dtype") or ours.get("kv-cache-dtype", ["auto"])[0]).startswith("fp8")
    context = choose_context_ranks(flags, machine.gpu, model, ranks.tensor, fp8_cache)
    if context > 1:
        ours["decode-context-parallel-size"] = [str(context)]
    if not machine.cuda:
        ours |= _cpu_options(flags, machine, model, ranks, quantization, environ, notes)

    argv = [*(word for name, values in ours.items() if name not in flags for word in (f"--{name}", *values))]
    # Whether a key is needed depends on what vLLM makes of the whole command line.
    parsed = Flags([*argv, *flags.argv])
    host, uds = parsed.get("host") or ANY_ADDRESS, parsed.get("uds") or None
    key_file = _key_file(settings, policy, host, uds)
    needs_key = key_file is not None or settings.api_key
    _check_front_end(parsed, environ, needs_key)
    argv += ["--middleware", BEHIND_KEY if needs_key else OPEN]  # beside the user's own

    env = machine.ray_env if ranks.executor == "ray" else {}
    env = {**env, **_engine_env(flags, machine, model), **interface_env(settings, machine, ranks.several_nodes)}
    if not machine.cuda and parsed.get("enforce-eager"):
        env["TORCH_COMPILE_DISABLE"] = "1"  # vLLM compiles functions of its sampler even then
    if not machine.cuda and ranks.world == 1:
        env[envs.FORK_ENGINE] = "1"
        # Those that vLLM imports wherever they are installed, and that this server does without.
        over_ray = "ray" in (parsed.get("distributed-executor-backend"), parsed.get("data-parallel-backend"))
        unused = {"ray": not over_ray, "opentelemetry": not parsed.get("otlp-traces-endpoint")}
        env[envs.UNUSED_PACKAGES] = " ".join(name for name in unused if unused[name])
    env |= policy.environment(environ)
    if policy.admin:
        env |= dict.fromkeys(ADMIN_VARIABLES, "1")
    if key_file is not None:
        env[KEY_FILE_VARIABLE] = str(key_file)
    if grace is not None:
        env[envs.DRAIN_GRACE] = f"{grace:g}"
    return Launch(
        argv=[*COMMAND, model.name, *argv, *flags.argv],
        env={name: value for name, value in env.items() if name not in environ or name in ALWAYS_SET},
        host=host,
        port=parsed.integer("port", settings.port),
        model_name=parsed.get("served-model-name")[0] or names[0],
        key_file=key_file,
        needs_key=needs_key,
        tls=bool(parsed.get("ssl-certfile")),
        uds=uds,
        headless=bool(parsed.get("headless")),
        ray_gpus=ranks.world if ranks.executor == "ray" else 0,
        nodes=settings.node_ips,
        notes=notes,
    )


def _front_end_options(flags: Flags, policy: ApiPolicy, json_logs: bool) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {
        "disable-uvicorn-access-log": [],  # ours logs more about each request
        # By default vLLM lets the pages of any site use a server that the browser reaches, without a key on loopback.
        "allowed-origins": ["[]"],
        "enable-prompt-tokens-details": [],  # how many tokens of a prompt were cached
        # Without white space in JSON, which a model can generate endlessly. The option needs a named backend; this is
        # the one vLLM prefers anyway.
        "structured-outputs-config": [json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})],
    }
    if json_logs and "logging-config" not in flags:
        options["logging-config.formatter"] = ["json"]
    if policy.admin:
        options["no-log-error-stack"] = []  # development mode's traces quote requests
    if flags.get("ssl-certfile"):
        options["enable-ssl-refresh"] = []  # loads a renewed certificate without a restart
    if policy.max_output_tokens:
        if "override-generation-config" in flags:
            raise UserError(
                "--max-output-tokens and --override-generation-config exclude each other: give "
                f"--override-generation-config '{{\"max_new_tokens\": {policy.max_output_tokens}, …}}' alone"
            )
        # The default of requests without max_tokens.
        options["override-generation-config"] = [json.dumps({"max_new_tokens": policy.max_output_tokens})]
    return options


def _reply_options(flags: Flags, model: ModelSource, tools: bool, notes: list[str]) -> dict[str, list[str]]:
    """The parsers for what the chat template makes the model write, and a template with tools if it lacks one."""
    given = flags.get("chat-template")
    template = given or model.chat_template or ""
    if given:
        with suppress(OSError):  # else it is the template itself
            template = Path(given).read_text(encoding="utf-8", errors="replace")
    reasoning, calls = parsers_for(template)
    # Without a parser vLLM calls no tool, not even a named one; only this level constrains arguments.
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
            "the chat template of a model on the hub is not read: one that thinks or calls tools (A13B, 0.5B–7B) "
            "needs --reasoning-parser hunyuan_v1 --tool-call-parser hunyuan_v1, or MODEL_PATH= its directory"
        )
    return options


def _key_file(settings: Settings, policy: ApiPolicy, host: str, uds: str | None) -> Path | None:
    """The file with the key to require; None if the key is in the environment, or none is required."""
    if settings.api_key_file and settings.api_key:
        raise UserError(f"VLLM_API_KEY and {KEY_FILE_VARIABLE} are both set: unset one")
    if settings.api_key_file or settings.api_key:
        return settings.api_key_file
    if policy.admin and (policy.insecure or uds):
        raise UserError("--admin-routes needs an API key: leave out --insecure, or set a key")
    required = policy.admin or not (policy.insecure or uds or is_loopback(host))
    return settings.config_home / "hunyuan-vllm" / "api-key" if required else None


def _check_front_end(parsed: Flags, environ: Mapping[str, str], needs_key: bool) -> None:
    """Refuse vLLM's servers without authentication, gRPC and the front end in Rust, if a key is needed."""
    others = {
        "--grpc": parsed.get("grpc"),
        "--grpc-port": "grpc-port" in parsed,
        "VLLM_USE_RUST_FRONTEND": environ.get("VLLM_USE_RUST_FRONTEND", "0").strip() not in ("", "0"),
    }
    for name, chosen in others.items():
        if chosen and needs_key:
            raise UserError(
                f"{name} starts a server without authentication: leave it out, or listen on {LOOPBACK} without a key"
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
    options: dict[str, list[str]] = {"scheduler-cls": [SCHEDULER]}
    sized = any(name in flags for name in ("kv-cache-memory-bytes", "gpu-memory-utilization"))
    if not sized and not environ.get("VLLM_CPU_KVCACHE_SPACE"):
        options["kv-cache-memory-bytes"] = [str(_cpu_kv_cache(machine, model, ranks, quantization))]
    compile_options = ("compilation-config", "optimization-level", "enforce-eager")
    if any(name in flags for name in compile_options):
        return options
    if model.demo and ranks.world == 1:
        options["enforce-eager"] = []  # compiling it takes longer than all the rest of a first start
    elif not machine.compiles:
        options["enforce-eager"] = []
        notes.append(
            "there is no C++ compiler or no Python headers, so the model runs uncompiled and slower: to compile it, "
            "install g++ and python3-dev (Debian, Ubuntu)"
        )
    return options


def _cpu_kv_cache(machine: Machine, model: ModelSource, ranks: Ranks, quantization: str | None) -> int:
    """Bytes of KV cache for each rank, in whole MiB: half of the memory left by the weights and the processes.

    Not all of it: vLLM refuses to start if less than the cache is free once it has compiled.
    """
    if model.demo:
        return DEMO_KV_CACHE
    needed = cpu_weight_bytes(model, quantization) + PROCESS_MEMORY
    share = (machine.memory - needed) // 2 // ranks.world
    if share < MIN_KV_CACHE:
        raise UserError(
            f"{model.given} needs {gibibytes(needed + 2 * ranks.world * MIN_KV_CACHE)} of memory and "
            f"{gibibytes(machine.memory)} is free: free some, use a larger machine, or set --kv-cache-memory-bytes to "
            "start anyway"
        )
    return min(share, MAX_KV_CACHE) // MIB * MIB


def _engine_env(flags: Flags, machine: Machine, model: ModelSource) -> dict[str, str]:
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        envs.LIMIT_RAY_VARIABLES: "1",
        # Longer than a client keeps an idle connection (httpx: 5 s, like vLLM's default): else both sides may close it
        # at once, and a request that is being sent then is lost.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        # Compiled grammars take far more memory than xgrammar counts: vLLM's limit of 512 MiB would fill the memory
        # before it has an effect.
        "VLLM_XGRAMMAR_CACHE_MB": "1",
        # vLLM kills its engine when it stops, and Python warns of what it frees then.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
    }
    if model.local and not any(name in flags for name in HUB_OPTIONS):
        env["HF_HUB_OFFLINE"] = "1"
    if not machine.cuda:
        env |= envs.OPENMP_WAIT
    return env


def check_certificate(flags: Flags) -> None:
    """Check the files of --ssl-certfile and --ssl-keyfile, if they are given."""
    certificate, key = flags.get("ssl-certfile") or None, flags.get("ssl-keyfile") or None
    if certificate is None:
        if key is not None:
            raise UserError("--ssl-keyfile has no effect without --ssl-certfile: give both")
        return
    for option, name in (("ssl-certfile", certificate), ("ssl-keyfile", key)):
        if name is not None and not Path(name).is_file():
            raise UserError(f"--{option} {name} is not a file")
    private = Path(key or certificate)
    status = private.stat()
    if status.st_uid == os.geteuid() and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"the private key {private} is open to other users: chmod 600 {private}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a passphrase would be asked for on the terminal, by vLLM as well.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"--ssl-certfile {certificate} and its key {private} cannot be used ({reason}): they must be PEM files "
            "that belong together, the key without a passphrase"
        ) from None
