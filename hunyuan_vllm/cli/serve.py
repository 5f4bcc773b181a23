"""`hunyuan-vllm serve`: decide what to start, show it or start it"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

MIB = 2**20
ROUTES, LIMITS = "What is served", "Limits (0 is none)"


def _limit(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, min=0, metavar=metavar, help=text, rich_help_panel=LIMITS, show_default=False)


AdminRoutes = Annotated[
    bool,
    typer.Option(
        "--admin-routes", help="Serve vLLM's administrative routes, too, to the admin key.", rich_help_panel=ROUTES
    ),
]
AllowedRoutes = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-route", metavar="PATH", help="Serve this route of vLLM's as well; repeatable.", rich_help_panel=ROUTES
    ),
]
IgnoreUnknownFields = Annotated[
    bool,
    typer.Option(
        "--ignore-unknown-fields",
        help="Pass over fields of a request that nothing reads, as vLLM does, instead of refusing them.",
        rich_help_panel=ROUTES,
    ),
]
MaxBody = Annotated[float | None, _limit("--max-body", "MIB", "Size of a request (default: 16).")]
MaxPromptTokens = Annotated[
    int | None, _limit("--max-prompt-tokens", "N", "Tokens of a prompt (default: the context length).")
]
MaxOutputTokens = Annotated[
    int | None, _limit("--max-output-tokens", "N", "Tokens of an answer (default: the context length).")
]
MaxSequences = Annotated[
    int | None, _limit("--max-sequences", "N", "Answers to one request: its prompts times n (default: 256).")
]
MaxRequestsPerKey = Annotated[
    int | None, _limit("--max-requests-per-key", "N", "Requests of a key under way at once (default: 512).")
]
MaxQueue = Annotated[int | None, _limit("--max-queue", "N", "Sequences waiting for the engine (default: 1024).")]


def surface_of(
    admin: bool,
    routes: list[str] | None,
    max_body: float | None,
    ignore_unknown_fields: bool = False,
    **limits: int | None,
) -> Any:
    """The Surface these options ask for; what they leave open is as HUNYUAN_VLLM_SURFACE or the default has it.

    Raises:
        UserError: a route is no path, or the variable is no surface.
    """
    from pydantic import ValidationError

    from hunyuan_vllm.server.options import SURFACE_VARIABLE, Surface
    from hunyuan_vllm.util.errors import UserError

    for route in routes or ():
        if not route.startswith("/"):
            raise UserError(f"--allow-route {route} is no path: give one as in --allow-route /load")
    given: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    if admin:
        given["admin"] = True
    if ignore_unknown_fields:
        given["ignore_unknown_fields"] = True
    if routes:
        given["extra_routes"] = tuple(routes)
    if max_body is not None:
        given["max_body"] = round(max_body * MIB)
    try:
        return Surface.read(os.environ).model_copy(update=given)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"{SURFACE_VARIABLE}: {where}{': ' if where else ''}{problem['msg']}") from None


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
        None, "--grace", min=0, metavar="SECONDS", help="Time for requests to finish once told to stop (default: 60)."
    ),
    supervised: bool = typer.Option(
        False, "--supervise", help="Start the server again whenever it, its engine or a node dies, or it hangs."
    ),
    max_restarts: int = typer.Option(
        None, "--max-restarts", min=0, metavar="N", help="With --supervise: give up after N quick deaths in a row."
    ),
    max_wait: float = typer.Option(
        60,
        "--max-restart-wait",
        min=0,
        metavar="SECONDS",
        help="With --supervise: quick deaths in a row double the wait before a restart, from 1 s up to this.",
    ),
    hang_timeout: float = typer.Option(
        60, "--hang-timeout", min=1, metavar="SECONDS", help="With --supervise: a standstill this long is a death."
    ),
    start_timeout: float = typer.Option(
        3600, "--start-timeout", min=1, metavar="SECONDS", help="With --supervise: a start may take this long."
    ),
    admin_routes: AdminRoutes = False,
    allowed_routes: AllowedRoutes = None,
    ignore_unknown_fields: IgnoreUnknownFields = False,
    max_body: MaxBody = None,
    max_prompt_tokens: MaxPromptTokens = None,
    max_output_tokens: MaxOutputTokens = None,
    max_sequences: MaxSequences = None,
    max_requests_per_key: MaxRequestsPerKey = None,
    max_queue: MaxQueue = None,
    tools: bool = typer.Option(
        False, "--tools", help="A chat template with tools: their definitions, calls and results are in prompts."
    ),
    json_logs: bool = typer.Option(False, "--json-logs", help="Log a JSON object a line."),
    expert_load: bool = typer.Option(False, "--expert-load", help="Count the tokens of each expert in /metrics."),
) -> None:
    """Serve a Hunyuan model with an OpenAI-compatible API.

    A model may follow, instead of MODEL_PATH, and vLLM's own flags, which win
    over ours (vllm serve --help=all).

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
          a service that comes back; see docs/serving.md
      hunyuan-vllm serve --max-output-tokens 4096 --max-requests-per-key 32
          limits for those who use it; docs/api.md has all of them
      hunyuan-vllm serve --ssl-certfile cert.pem --ssl-keyfile key.pem
          HTTPS
      hunyuan-vllm serve --dry-run --max-num-batched-tokens 8192
          what would be started

    \b
    Environment variables:
      MODEL_PATH     checkpoint folder or hub name; default: the demo model
      TP_SIZE        tensor-parallel ranks; default: all GPUs of the Ray
                     cluster or of the machine, 1 on a CPU
      PORT           port; default: 8020
      HOST           address to listen on; default: LOCAL_IP, else 127.0.0.1
      LOCAL_IP       this node's address among several nodes
      NODE_IPS       addresses of all nodes, with commas between: a node that
                     has not joined the Ray cluster is then named
      GPU_WAIT       seconds to wait for GPUs of the Ray cluster; default: 600
      SOCKET_IFNAME  network interface between nodes; default: bond1 where
                     it exists, else the one that carries LOCAL_IP
      VLLM_API_KEY   the key that every request must carry, or
      HUNYUAN_VLLM_API_KEY_FILE
                     a file (chmod 600) that holds it, or a line "NAME KEY"
                     for each; it may change while the server runs. Beyond
                     loopback a key is always asked for; where none is set,
                     one is made and kept in ~/.config/hunyuan-vllm/api-key

    \b
    Exit status:
      0     told to stop, and requests had finished or had had their time
      1     the server died; it says of what
      2     a mistake in what was asked for, named in one line
      69    --max-restarts was reached
      75    what it needs is not there yet: the Ray cluster, GPUs, a free port
      128+n signal n ended it: 137 where it had to be killed
    """
    from hunyuan_vllm import envs
    from hunyuan_vllm.quant.schemes import find_scheme
    from hunyuan_vllm.ray_environment import cluster_variables
    from hunyuan_vllm.server import keys, supervisor
    from hunyuan_vllm.server.hardware import probe
    from hunyuan_vllm.server.launch import decide
    from hunyuan_vllm.server.models import convert, demo_in, demo_model, open_model
    from hunyuan_vllm.server.network import check_certificate
    from hunyuan_vllm.server.options import Flags
    from hunyuan_vllm.server.parallel import wait_for_gpus
    from hunyuan_vllm.server.process import Stop
    from hunyuan_vllm.server.supervisor import OneMachine, RayNodes
    from hunyuan_vllm.settings import Settings
    from hunyuan_vllm.util.errors import UserError
    from hunyuan_vllm.util.net import check_port
    from hunyuan_vllm.util.streams import make_output_unfailing
    from hunyuan_vllm.vllm_version import check_engine

    if not dry_run:
        make_output_unfailing()
    check_engine()
    environ = dict(os.environ)
    joined = cluster_variables(environ)
    environ |= {name: value for name, value in joined.items() if name.startswith("RAY_")}
    settings = Settings.read(environ)
    flags = Flags(context.args, [name for option in context.command.params for name in option.opts])
    scheme = find_scheme(scheme_name) if scheme_name else None
    if flags.model and settings.model and flags.model != settings.model:
        raise UserError(f"the model is given twice: {flags.model}, and MODEL_PATH={settings.model}; leave one out")
    given = flags.model or settings.model
    source = model = open_model(given) if given else demo_model()
    if scheme and model.demo:
        model = demo_in(scheme, source, settings.cache_home)
    surface = surface_of(
        admin_routes,
        allowed_routes,
        max_body,
        ignore_unknown_fields,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        max_sequences=max_sequences,
        max_requests_per_key=max_requests_per_key,
        max_queue=max_queue,
    )
    machine = probe(environ, sys.executable)
    launch = decide(settings, flags, machine, model, environ, insecure, scheme, surface, json_logs, expert_load, tools)
    if launch.ray_gpus:
        launch.env.update({name: value for name, value in joined.items() if name not in launch.env})
    check_certificate(flags)
    if grace is not None:
        launch.env[envs.DRAIN_GRACE] = f"{grace:g}"
    for note in launch.notes:
        print(f"hunyuan-vllm: {note}", file=sys.stderr)
    if dry_run:
        if scheme and not Path(model.name).exists() and model.demo:
            print(f"hunyuan-vllm: a start converts the demo model to {model.name} first", file=sys.stderr)
        print(launch.shell())
        return
    if not launch.uds and not launch.headless:
        check_port(launch.host, launch.port)
    if launch.key_file is not None:
        if settings.api_key_file is None and not launch.key_file.exists():
            keys.create_key_file(launch.key_file)
            print(f"hunyuan-vllm: a new API key is in {launch.key_file}", file=sys.stderr)
        keys.read_key_file(launch.key_file)
    if scheme and model != source:
        convert(Path(source.name), Path(model.name), scheme, "the demo model")
    stop = Stop()
    if launch.ray_gpus:
        wait_for_gpus(launch.ray_gpus, environ, settings.gpu_wait, settings.node_ips, stop)
    where = launch.uds or f"{launch.host} port {launch.port}"
    print(f"hunyuan-vllm: starting {model.given} on {where}", file=sys.stderr, flush=True)
    if not supervised:
        raise typer.Exit(supervisor.run_once(launch, environ, stop))
    surroundings = RayNodes(launch.ray_gpus, environ) if launch.ray_gpus else OneMachine()
    tolerance = supervisor.Tolerance(start_timeout, hang_timeout, max_restarts, max_wait)
    raise typer.Exit(supervisor.supervise(launch, environ, stop, surroundings, tolerance))
