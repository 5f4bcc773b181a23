"""Run in a process of its own by `probes.run_probe`; prints lines of JSON

It spawns a worker as vLLM does, which imports torch and vLLM, loads plugins, and reports whether it knows the model.
"""

import json
import multiprocessing
import sys

IN_WORKER = "hunyuan_vllm_worker_probe"


def say(**values: object) -> None:
    """`step` names what comes next: what a process that ends was doing."""
    print("HUNYUAN-PROBE " + json.dumps(values), flush=True)


def probe() -> None:
    say(step="import torch")
    import torch

    version, cuda = str(torch.__version__), torch.version.cuda
    say(step="torch.cuda", torch=version, cuda=cuda, cpu=torch.backends.cpu.get_cpu_capability())
    if cuda:
        # A count from NVML, which starts no context on a GPU.
        say(available=torch.cuda.is_available(), devices=torch.cuda.device_count())
        try:
            say(nccl=".".join(map(str, torch.cuda.nccl.version())))
        except (AttributeError, RuntimeError) as error:
            say(nccl_error=str(error))
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
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    say(platform=current_platform.device_type, kernels=hasattr(torch.ops._C, "rms_norm"))
    say(step="import hunyuan_vllm.model")
    import hunyuan_vllm.model

    say(model=hunyuan_vllm.model.HunYuanForCausalLM.__name__, step="the end")


if __name__ == IN_WORKER:
    probe()
elif __name__ == "__main__":
    # What was given to `python -c` has no file that a spawned process could import it from; so it gets the text.
    TEXT = sys.orig_argv[sys.orig_argv.index("-c") + 1]
    worker = multiprocessing.get_context("spawn").Process(target=exec, args=(TEXT, {"__name__": IN_WORKER}))
    worker.start()
    worker.join()
    sys.exit(worker.exitcode if worker.exitcode is None or worker.exitcode >= 0 else 1)
