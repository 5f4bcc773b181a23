"""`hunyuan-vllm serve`"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from hunyuan_vllm.util.streams import say

ROUTES, LIMITS = "What is served", "Limits (0: no limit)"


def _limit(name: str, text: str, metavar: str = "N") -> Any:
    return typer.Option(None, name, min=0, metavar=metavar, help=text, rich_help_panel=LIMITS)


def _seconds(default: float, name: str, text: str, minimum: float = 1) -> Any:
    return typer.Option(default, name, min=minimum, metavar="SECONDS", help=f"With --supervise: {text}")


def api_policy(
    routes: Sequence[str] = (), max_body: float | None = None, insecure: bool = False, **options: Any
) -> Any:
    """The ApiPolicy of these options; HUNYUAN_VLLM_API_POLICY, else the defaults, decide what they leave open."""
    from hunyuan_vllm.server.options import MIB, ApiPolicy
    from hunyuan_vllm.util.errors import UserError

    for route in routes:
        if not route.startswith("/"):
            raise UserError(f"--allow-route {route} is not a path: give one as in --allow-route /load")
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    given["insecure"] = insecure  # the variable alone does not permit that
    if routes:
        given["extra_routes"] = tuple(routes)
    if max_body is not None:
        given["max_body"] = round(max_body * MIB)
    return ApiPolicy.read(os.environ).model_copy(update=given)


def serve(
    context: typer.Context,
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the exact command and environment, start nothing."),
    scheme_name: str = typer.Option(
        None, "--scheme", metavar="SCHEME", help="bf16, int8, int8-w8a8, fp8 or int4; default: as the checkpoint is."
    ),
    insecure: bool = typer.Option(
        False, "--insecure", help="Listen beyond this machine without an API key: anyone who can connect can use it."
    ),
    grace: float = typer.Option(
        None, "--grace", min=0, metavar="SECONDS", help="Time for requests to finish after a stop signal (default: 60)."
    ),
    supervised: bool = typer.Option(
        False, "--supervise", help="Restart the server when it, its engine or a node dies, or when it hangs."
    ),
    max_restarts: int = typer.Option(
        None, "--max-restarts", min=0, metavar="N", help="With --supervise: give up after N quick failures in a row."
    ),
    max_wait: float = _seconds(
        60, "--max-restart-wait", "quick failures in a row double the wait before a restart, from 1 s up to this.", 0
    ),
    hang_timeout: float = _seconds(60, "--hang-timeout", "restart a server that hangs this long."),
    start_timeout: float = _seconds(3600, "--start-timeout", "time limit of a start."),
    admin_routes: bool = typer.Option(
        False,
        "--admin-routes",
        help="Serve vLLM's administrative routes as well, to the admin key.",
        rich_help_panel=ROUTES,
    ),
    allowed_routes: list[str] = typer.Option(
        [],
        "--allow-route",
        metavar="PATH",
        help="Serve this route of vLLM's as well; repeatable.",
        rich_help_panel=ROUTES,
    ),
    ignore_unknown_fields: bool = typer.Option(
        False,
        "--ignore-unknown-fields",
        help="Ignore unknown fields of a request, as vLLM does, instead of refusing them.",
        rich_help_panel=ROUTES,
    ),
    max_body: float = _limit("--max-body", "Maximum size of a request body (default: 16).", "MIB"),
    max_prompt_tokens: int = _limit("--max-prompt-tokens", "Tokens of a prompt (default: the context length)."),
    max_output_tokens: int = _limit("--max-output-tokens", "Tokens of an answer (default: the context length)."),
    max_sequences: int = _limit("--max-sequences", "Sequences of one request: its prompts times n (default: 256)."),
    max_requests_per_key: int = _limit("--max-requests-per-key", "Requests of one key in flight (default: 512)."),
    max_queue: int = _limit("--max-queue", "Sequences waiting for the engine (default: 1024)."),
    tools: bool = typer.Option(
        False, "--tools", help="Use a chat template with tools: definitions, calls and results are in the prompt."
    ),
    verbose: bool = typer.Option(False, "--verbose", help="Log to the terminal instead of a file."),
    json_logs: bool = typer.Option(False, "--json-logs", help="Log one JSON object per line."),
    expert_load: bool = typer.Option(False, "--expert-load", help="Count the tokens of each expert in /metrics."),
) -> None:
    """Serve a Hunyuan model with an OpenAI-compatible API.

    Takes a model instead of MODEL_PATH, and vLLM's own options, which override
    ours (vllm serve --help=all).

    \b
    Examples:
      hunyuan-vllm serve
          the demo model on 127.0.0.1:8020
      hunyuan-vllm serve /models/hunyuan-large
          a checkpoint, on all GPUs of this machine
      MODEL_PATH=/models/hunyuan-large LOCAL_IP=10.0.0.5 hunyuan-vllm serve
          the same, on all GPUs of the Ray cluster this node belongs to
      MODEL_PATH=/models/hunyuan-large hunyuan-vllm serve --scheme int8
          the BF16 checkpoint, its weights quantised to int8 while they load,
          on up to 8 GPUs; int8-w8a8 computes with int8 activations as well
      MODEL_PATH=/models/hunyuan-large-fp8 hunyuan-vllm serve --scheme fp8
          an FP8 checkpoint with an FP8 cache, on up to 8 GPUs
      hunyuan-vllm serve --supervise --grace 120
          a service that restarts; see docs/serving.md
      hunyuan-vllm serve --max-output-tokens 4096 --max-requests-per-key 32
          limits on requests; docs/api.md lists all of them
      hunyuan-vllm serve --ssl-certfile cert.pem --ssl-keyfile key.pem
          HTTPS
      hunyuan-vllm serve --dry-run --max-num-batched-tokens 8192
          show what would be started

    \b
    Environment variables:
      MODEL_PATH     checkpoint directory or hub name; default: the demo model
      TP_SIZE        tensor-parallel ranks; default: all GPUs of the Ray
                     cluster or of the machine, 1 on a CPU
      PORT           port; default: 8020
      HOST           address to listen on; default: LOCAL_IP, else 127.0.0.1
      LOCAL_IP       this node's address among several nodes
      NODE_IPS       addresses of all nodes, comma-separated, to name those
                     that have not joined the Ray cluster
      GPU_WAIT       seconds to wait for GPUs of the Ray cluster; default: 600
      SOCKET_IFNAME  network interface between nodes; default: bond1 where
                     it exists, else the one that carries LOCAL_IP
      VLLM_API_KEY   the key that every request must carry, or
      HUNYUAN_VLLM_API_KEY_FILE
                     a file (chmod 600) with the key, or with one NAME KEY
                     per line; it may change while the server runs. Beyond
                     loopback a key is always required; if none is set, one
                     is generated in ~/.config/hunyuan-vllm/api-key

    \b
    Exit status:
      0     stopped by a signal, after requests had finished or timed out
      1     the server died; the last line says why
      2     wrong options or settings, named in one line
      69    --max-restarts was reached
      75    not available yet: the Ray cluster, GPUs, or the port
      128+n signal n ended it; 137 if it had to be killed
    """
    from hunyuan_vllm.envs import Settings
    from hunyuan_vllm.plugin import check_engine
    from hunyuan_vllm.quant.schemes import find_scheme
    from hunyuan_vllm.server import keys
    from hunyuan_vllm.server.hardware import read_machine
    from hunyuan_vllm.server.launch import check_certificate, decide
    from hunyuan_vllm.server.models import convert, demo_in, open_model
    from hunyuan_vllm.server.options import Flags
    from hunyuan_vllm.server.process import Stop
    from hunyuan_vllm.server.ray_cluster import wait_for_gpus
    from hunyuan_vllm.server.supervisor import RestartPolicy, run_once, supervise
    from hunyuan_vllm.server.terminal import LogFile, Terminal
    from hunyuan_vllm.util.errors import UserError
    from hunyuan_vllm.util.net import check_port
    from hunyuan_vllm.util.streams import make_output_unfailing

    if not dry_run:
        make_output_unfailing()
    check_engine()
    environ = dict(os.environ)
    settings = Settings.read(environ)
    flags = Flags(context.args, [name for option in context.command.params for name in option.opts])
    scheme = find_scheme(scheme_name) if scheme_name else None
    if flags.model and settings.model and flags.model != settings.model:
        raise UserError(f"the model is given twice: {flags.model}, and MODEL_PATH={settings.model}; leave one out")
    source = model = open_model(flags.model or settings.model)
    if scheme and model.demo:
        model = demo_in(scheme, source, settings.cache_home)
    policy = api_policy(
        allowed_routes, max_body, insecure=insecure, admin=admin_routes, ignore_unknown_fields=ignore_unknown_fields,
        max_prompt_tokens=max_prompt_tokens, max_output_tokens=max_output_tokens, max_sequences=max_sequences,
        max_requests_per_key=max_requests_per_key, max_queue=max_queue,
    )  # fmt: skip
    launch = decide(
        settings, flags, read_machine(environ), model, environ, scheme=scheme, policy=policy, grace=grace,
        json_logs=json_logs, expert_load=expert_load, tools=tools,
    )  # fmt: skip
    check_certificate(flags)
    for note in launch.notes:
        say(note)
    if dry_run:
        if model != source and not Path(model.name).exists():
            say(f"the first start converts the demo model to {model.name}")
        print(launch.shell())
        return
    if not launch.uds and not launch.headless:
        check_port(launch.host, launch.port)
    if launch.key_file is not None:
        if settings.api_key_file is None and keys.create_key_file(launch.key_file):
            say(f"a new API key is in {launch.key_file}")
        keys.read_key_file(launch.key_file)
    if scheme and model != source:
        convert(Path(source.name), Path(model.name), scheme, "the demo model")
    stop = Stop()
    if launch.ray_gpus:
        wait_for_gpus(launch.ray_gpus, {**environ, **launch.env}, settings.gpu_wait, launch.nodes, stop)
    where = launch.uds or f"{launch.host} port {launch.port}"
    say(f"starting {model.given} on {where}")
    terminal = None
    if not verbose and sys.stdout.isatty():
        log = settings.state_home / "hunyuan-vllm" / f"serve-{Path(launch.uds).name if launch.uds else launch.port}.log"
        try:
            terminal = Terminal(LogFile(log))
            say(f"its log is in {log}")
        except OSError as error:
            say(f"{log} cannot be written ({error.strerror}): logging to the terminal instead")
    if not supervised:
        raise typer.Exit(run_once(launch, environ, stop, terminal=terminal))
    restarts = RestartPolicy(start_timeout, hang_timeout, max_restarts, max_wait)
    raise typer.Exit(supervise(launch, environ, stop, restarts, terminal=terminal))
