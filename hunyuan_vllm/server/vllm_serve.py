"""`vllm serve` for `hunyuan-vllm serve`: the same server, which imports vLLM in two thirds of the time

    python -P -m hunyuan_vllm.server.vllm_serve serve MODEL [options of vLLM]

The command `vllm` imports all its subcommands, and asks for the version of a distribution called vllm, which CPU builds
are not called.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hunyuan_vllm import envs

COMMAND = (sys.executable, "-P", "-m", __name__, "serve")  # -P: no module from the working directory


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import vLLM in the block without garbage collection, and without the packages of HUNYUAN_VLLM_UNUSED_PACKAGES.

    Collections take a fifth of the time: what a module creates stays. vLLM does without Ray and OpenTelemetry where it
    cannot import them.
    """
    unused = [name for name in envs.unused_packages() if name not in sys.modules]
    gc.disable()
    sys.modules.update(dict.fromkeys(unused))  # type: ignore[arg-type]  # importing them is an ImportError
    try:
        yield
    finally:
        for name in unused:
            del sys.modules[name]
        gc.freeze()
        gc.enable()


def main() -> None:
    with fast_imports():
        from vllm.entrypoints.cli.serve import cmd_init
        from vllm.logger import configure_logging_from_args
        from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as the command `vllm` does
    parser = FlexibleArgumentParser(prog="vllm")
    subcommands = parser.add_subparsers(required=True, dest="subparser")
    (serve,) = cmd_init()
    serve.subparser_init(subcommands)
    args = parser.parse_args()
    configure_logging_from_args(args)
    serve.validate(args)
    serve.cmd(args)


if __name__ == "__main__":
    main()
