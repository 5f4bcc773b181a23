"""Imports what a server start imports: a broken installation shows here, and the bytecode is there afterwards.
The list of vLLM's options is, too.

Run with the environment's own Python. Without bytecode every start takes about twice as long.
"""

import compileall
import importlib
import importlib.util
import os
import sys

MODULES = [
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.run_batch",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.transformers",
    "torch._inductor.compile_fx",
    "uvicorn.protocols.http.auto",
    "hunyuan_vllm.cli",
    "hunyuan_vllm.server.run",
]
WORKERS = {"cpu": "vllm.v1.worker.cpu_worker", "cuda": "vllm.v1.worker.gpu_worker"}
# Packages that a server imports piecemeal, as its model and its compiler ask for them.
PIECEMEAL = [
    "compressed_tensors",
    "hunyuan_vllm",
    "model_hosting_container_standards",
    "torch._dynamo",
    "torch._inductor",
    "vllm.compilation",
    "vllm.entrypoints",
    "vllm.v1",
]


def main() -> None:
    for name in [*MODULES, WORKERS[sys.argv[1]]]:
        print(f"import {name}", flush=True)
        importlib.import_module(name)
    import hunyuan_vllm_plugin

    hunyuan_vllm_plugin.register()
    from hunyuan_vllm.server.vllm_parser import keep_in_environment

    keep_in_environment()
    for name in PIECEMEAL:
        print(f"compile {name}", flush=True)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        compileall.compile_dir(os.path.dirname(spec.origin), quiet=2)


main()
