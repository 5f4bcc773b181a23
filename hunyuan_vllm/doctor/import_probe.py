"""A script for a process of its own: torch, what is installed beside it, and what torch says of the GPUs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys

# Each is built against one torch; with another it breaks on import, and vLLM or transformers import some if they can.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec", "triton", "xformers", "flash_attn", "flashinfer")


def say(**values: object) -> None:
    print("HUNYUAN-PROBE " + json.dumps(values), flush=True)


def attempt(name: str) -> bool:
    say(step=f"import {name}")
    try:
        module = importlib.import_module(name)
    except BaseException as error:
        text = " ".join(str(error).split())
        say(**{name: {"error": f"{type(error).__name__}: {text[:300]}"}})
        return False
    say(**{name: {"version": str(getattr(module, "__version__", ""))}})
    return True


def look() -> None:
    if not attempt("torch"):
        return
    import torch

    say(step="torch.cuda", cuda=torch.version.cuda, cpu=torch.backends.cpu.get_cpu_capability())
    if torch.version.cuda:
        # A count from NVML, which starts no context on a GPU.
        say(available=torch.cuda.is_available(), devices=torch.cuda.device_count())
        try:
            say(nccl=".".join(map(str, torch.cuda.nccl.version())))
        except (AttributeError, RuntimeError) as error:
            say(nccl_error=str(error))
    for name in COMPANIONS:
        if importlib.util.find_spec(name):
            attempt(name)


if __name__ == "__main__":
    sys.path = [entry for entry in sys.path if entry]  # what lies in the working directory is another check's
    look()
