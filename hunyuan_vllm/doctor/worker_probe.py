"""A script for a process of its own: spawns a worker as vLLM does, which loads plugins and then looks what is there."""

from __future__ import annotations

import json
import multiprocessing
import sys

IN_WORKER = "hunyuan_vllm_worker_probe"


def say(**values: object) -> None:
    print("HUNYUAN-PROBE " + json.dumps(values), flush=True)


def look() -> None:
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
    look()
elif __name__ == "__main__":
    # What was given to `python -c` has no file that a spawned process could import it from; so it gets the text.
    TEXT = sys.orig_argv[sys.orig_argv.index("-c") + 1]
    worker = multiprocessing.get_context("spawn").Process(target=exec, args=(TEXT, {"__name__": IN_WORKER}))
    worker.start()
    worker.join()
    sys.exit(worker.exitcode if worker.exitcode is None or worker.exitcode >= 0 else 1)
