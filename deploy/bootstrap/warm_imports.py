"""Imports what a server start imports: a broken installation shows here, and the bytecode is there afterwards.

Run with the environment's own Python. Without bytecode every start takes about twice as long.
"""

import importlib
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
    "hunyuan_vllm.cli",
]
WORKERS = {"cpu": "vllm.v1.worker.cpu_worker", "cuda": "vllm.v1.worker.gpu_worker"}


def main() -> None:
    for name in [*MODULES, WORKERS[sys.argv[1]]]:
        print(f"import {name}", flush=True)
        importlib.import_module(name)
    import hunyuan_vllm_plugin

    hunyuan_vllm_plugin.register()


main()
