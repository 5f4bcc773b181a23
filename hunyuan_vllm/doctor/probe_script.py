"""Run in a process of its own by `probes.run_probe`, with the mode `imports` or `worker`; prints lines of JSON

imports: torch, what is installed beside it, and what torch says of the GPUs.
worker: spawns a worker as vLLM does, which loads plugins and then reports whether it knows the model.
"""

import importlib
import importlib.util
import json
import multiprocessing
import sys

# Each is built for one torch and breaks on import with another; vLLM or transformers import some if they can.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec", "triton", "xformers", "flash_attn", "flashinfer")
IN_WORKER = "hunyuan_vllm_worker_probe"


def say(**values: object) -> None:
    """`step` names what comes next: what a process that ends was doing."""
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


def probe_imports() -> None:
    sys.path = [entry for entry in sys.path if entry]  # files in the working directory are another check's
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


def probe_worker() -> None:
    say(step="import vllm")
    import vllm
    from vllm.plugins import load_general_plugins

    say(vllm=vllm.__file__, step="load plugins")
    load_general_plugins()
    say(step="read the registry")
    from vllm import ModelRegistry

    registered = "HunYuanForCausalLM" in ModelRegistry.get_supported_archs()
    say(registered=registered, plugin=getattr(sys.modules.get("hunyuan_vllm"), "__file__", None))
    if not registered:
        say(step="register hunyuan_vllm")
        from hunyuan_vllm.plugin import register  # which raises what the entry point only warns of

        register()
        return
    say(step="load vLLM's kernels")
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    say(platform=current_platform.device_type, kernels=hasattr(torch.ops._C, "rms_norm"))
    say(step="import hunyuan_vllm.model")
    import hunyuan_vllm.model

    say(model=hunyuan_vllm.model.HunYuanForCausalLM.__name__, step="the end")


if __name__ == IN_WORKER:
    probe_worker()
elif __name__ == "__main__" and sys.argv[1] == "imports":
    probe_imports()
elif __name__ == "__main__":
    # What was given to `python -c` has no file that a spawned process could import it from; so it gets the text.
    TEXT = sys.orig_argv[sys.orig_argv.index("-c") + 1]
    worker = multiprocessing.get_context("spawn").Process(target=exec, args=(TEXT, {"__name__": IN_WORKER}))
    worker.start()
    worker.join()
    sys.exit(worker.exitcode if worker.exitcode is None or worker.exitcode >= 0 else 1)
