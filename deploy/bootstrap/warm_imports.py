"""Writes the bytecode of what a server start imports, and imports it: a broken installation shows here.
The list of vLLM's options is kept, too. On CPUs the C++ kernels are compiled meanwhile, on another core.

Run with the environment's own Python. Without bytecode every start takes about twice as long. All bytecode of the
environment would take longer than this on a small machine: most files are never imported.
"""

import compileall
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# Packages that a server imports almost completely, or piecemeal as its model and its compiler ask for them.
COMPLETE = """
compressed_tensors fastapi hunyuan_vllm model_hosting_container_standards mpmath networkx/generators
pydantic/_internal torch/_dynamo torch/_functorch torch/_higher_order_ops torch/_inductor torch/autograd
torch/distributed/fsdp torch/distributed/tensor torch/fx torch/nn torch/optim transformers/generation
transformers/models/auto transformers/utils vllm/compilation vllm/config vllm/entrypoints vllm/multimodal vllm/utils
vllm/v1
"""
MODULES = """
vllm.entrypoints.launchers.api_server.entry vllm.entrypoints.cli.serve vllm.v1.engine.async_llm vllm.v1.engine.core
vllm.v1.executor.multiproc_executor vllm.model_executor.models.transformers torch._inductor.compile_fx
uvicorn.protocols.http.auto hunyuan_vllm.cli hunyuan_vllm.server.supervisor
"""
# Its errors are reported by the start of a server, which would compile the kernels, too.
KERNELS = """
from hunyuan_vllm import envs
from hunyuan_vllm.native.build import build, require_features
if envs.native_kernels():
    require_features()
    build(envs.cache_directory() / "kernels")
"""
WORKERS = {"cpu": "vllm.v1.worker.cpu_worker", "cuda": "vllm.v1.worker.gpu_worker"}


def main() -> None:
    for name in COMPLETE.split():
        print(f"compile {name}", flush=True)
        package, _, directory = name.partition("/")
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, name
        compileall.compile_dir(Path(spec.origin).parent / directory, quiet=2, workers=0)  # with all cores
    from hunyuan_vllm import envs
    from hunyuan_vllm.server.vllm_serve import fast_imports

    device = sys.argv[1]
    kernels = None
    if device == "cpu":
        nothing = subprocess.DEVNULL
        kernels = subprocess.Popen([sys.executable, "-c", KERNELS], stdin=nothing, stdout=nothing, stderr=nothing)
        os.environ[envs.UNUSED_PACKAGES] = "ray opentelemetry"  # as a server of one rank has it
    with fast_imports():
        for name in [*MODULES.split(), WORKERS[device]]:
            print(f"import {name}", flush=True)
            importlib.import_module(name)
    import hunyuan_vllm_plugin
    from hunyuan_vllm.server.vllm_parser import keep_in_environment

    hunyuan_vllm_plugin.register()
    keep_in_environment()
    if kernels is not None:
        kernels.wait()


if __name__ == "__main__":  # processes that compile import this file, too
    main()
