"""`hunyuan-vllm serve`: decide what to start, show it or start it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

__all__ = ["serve"]


def serve(
    context: typer.Context,
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the exact command and environment, start nothing."),
    scheme_name: str = typer.Option(
        None, "--scheme", metavar="SCHEME", help="Serve quantised: int8, int8-w8a8 or fp8-w8a8c8; see the examples."
    ),
    insecure: bool = typer.Option(
        False, "--insecure", help="Listen beyond this machine without an API key: anyone who can connect can use it."
    ),
) -> None:
    """Serve a Hunyuan model with an OpenAI-compatible API.

    vLLM's own flags may follow and win over ours (vllm serve --help=all).

    \b
    Examples:
      hunyuan-vllm serve
          the demo model on 127.0.0.1:8020
      MODEL_PATH=/models/hunyuan-large hunyuan-vllm serve
          a checkpoint, on all GPUs of this machine
      MODEL_PATH=/models/hunyuan-large LOCAL_IP=10.0.0.5 hunyuan-vllm serve
          the same, on all GPUs of the Ray cluster this node belongs to
      MODEL_PATH=/models/hunyuan-large hunyuan-vllm serve --scheme int8
          the BF16 checkpoint, its weights quantised to int8 while they load,
          on up to 8 GPUs; int8-w8a8 computes with int8 activations as well
      MODEL_PATH=/models/hunyuan-large-fp8 hunyuan-vllm serve --scheme fp8-w8a8c8
          an FP8 checkpoint with an FP8 cache, on up to 8 GPUs
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
      SOCKET_IFNAME  network interface between nodes; default: bond1 where
                     it exists, else the one that carries LOCAL_IP
      VLLM_API_KEY   the key that every request must carry, or
      HUNYUAN_VLLM_API_KEY_FILE
                     a file (chmod 600) that holds it. Beyond loopback a key
                     is always asked for; where none is set, one is made and
                     kept in ~/.config/hunyuan-vllm/api-key
    """
    from hunyuan_vllm.server import auth, child, ready
    from hunyuan_vllm.server.flags import Flags
    from hunyuan_vllm.server.launch import decide
    from hunyuan_vllm.server.machine import probe
    from hunyuan_vllm.server.model_source import demo_model, open_model
    from hunyuan_vllm.server.scheme import scheme_named
    from hunyuan_vllm.server.settings import Settings

    environ = dict(os.environ)
    settings = Settings.read(environ)
    flags = Flags(context.args)
    scheme = scheme_named(scheme_name)
    source = model = open_model(settings.model) if settings.model else demo_model()
    if scheme and model.demo:
        model = scheme.with_demo(source, settings.cache_home)
    launch = decide(settings, flags, probe(environ, sys.executable), model, environ, insecure, scheme)
    for note in launch.notes:
        print(f"hunyuan-vllm: {note}", file=sys.stderr)
    if dry_run:
        if scheme and not Path(model.name).exists() and model.demo:
            print(f"hunyuan-vllm: a start converts the demo model to {model.name} first", file=sys.stderr)
        print(launch.shell())
        return
    if "uds" not in flags and "headless" not in flags:
        ready.check_port(launch.host, launch.port)
    if launch.key_file is not None:
        if settings.api_key_file is None and not launch.key_file.exists():
            auth.create_key_file(launch.key_file)
            print(f"hunyuan-vllm: a new API key is in {launch.key_file}", file=sys.stderr)
        auth.read_key_file(launch.key_file)
    if scheme and model != source:
        scheme.convert_demo(Path(source.name), Path(model.name))
    print(f"hunyuan-vllm: starting {model.given} on {launch.host} port {launch.port}", file=sys.stderr, flush=True)
    raise typer.Exit(child.run(launch, environ, ready.answers))
