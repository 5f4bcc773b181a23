"""KV cache blocks and tokens for the same memory, with CLA sharing on and off, from the engine itself.

    python benchmarks/kv_capacity.py

Each engine runs in its own process, with 8 KV heads of 128, 8 layers and a narrow network of random weights. The gain
must be exactly the CLA factor and what `hunyuan_vllm.kv_cache` predicts, with tensors of that size; otherwise the exit
status is 1.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from common import Report, note, options
from processes import Child, Engine, engine_environ
from torch import Tensor

MIB = 2**20
CLA_FACTORS = (2, 4)
CACHE_DTYPES = {"bfloat16": 2, "fp8": 1}  # bytes an element
SHAPE = dict(
    model_type="hunyuan",
    architectures=["HunYuanForCausalLM"],
    torch_dtype="bfloat16",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=1024,
    num_experts=1,
    use_cla=True,
    use_qk_norm=True,
    tie_word_embeddings=True,
    rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
)


class Capacity(Engine):
    """An engine that reports its cache, to be built in a `Child`."""

    def blocks(self) -> tuple[int, int]:
        """KV blocks, and tokens of a block."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks, cache.block_size

    def allocated(self) -> int:
        """Bytes of all cache tensors; what several layers share counts once."""
        return self.llm.apply_model(_cache_bytes)[0]

    def predicted(self, memory: int, itemsize: int, sharing: bool) -> int:
        """KV blocks by the package's arithmetic."""
        from hunyuan_vllm.kv_cache import CacheShape

        config = self.llm.llm_engine.vllm_config
        shape = CacheShape.of(config.model_config.hf_config, itemsize=itemsize, sharing=sharing)
        return shape.blocks(memory, config.cache_config.block_size)


def _cache_bytes(model: Any) -> int:
    caches = [module.kv_cache for module in model.modules() if isinstance(getattr(module, "kv_cache", None), Tensor)]
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches}
    return sum(storages.values())


def main() -> None:
    parser = options(__doc__, rounds=None)
    parser.add_argument("--cache-mib", type=int, default=256, help="memory for the cache (default: %(default)s)")
    arguments = parser.parse_args()
    report = Report("kv_capacity", arguments)
    with tempfile.TemporaryDirectory() as directory:
        wrong = list(_measure(Path(directory), arguments.cache_mib * MIB, arguments.threads, report))
    report.show()
    for problem in wrong:
        note(problem)
    raise SystemExit(bool(wrong))


def _measure(directory: Path, memory: int, threads: int, report: Report) -> Iterator[str]:
    """Adds a row for each CLA factor and cache type; yields what is not as expected."""
    for factor, (dtype, itemsize) in product(CLA_FACTORS, CACHE_DTYPES.items()):
        model = directory / f"cla-{factor}"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(SHAPE | {"cla_share_factor": factor}))
        found: dict[bool, tuple[int, int]] = {}
        case = f"CLA factor {factor}, {dtype} cache"
        for sharing in (True, False):
            settings = dict(
                dtype="bfloat16",
                kv_cache_dtype="auto" if dtype == "bfloat16" else dtype,
                load_format="dummy",
                enforce_eager=True,
                max_model_len=512,
                kv_cache_memory_bytes=memory,
            )
            environ = engine_environ(threads) | {"HUNYUAN_VLLM_CLA_SHARING": str(int(sharing))}
            name = f"{case}, sharing {'on' if sharing else 'off'}"
            with Child(name, Capacity, model, settings, environ=environ) as engine:
                engine.ready()
                found[sharing] = engine.call("blocks")
                predicted = engine.call("predicted", memory, itemsize, sharing)
                allocated = engine.call("allocated")
            if not 0 <= memory - allocated < memory / found[sharing][0]:
                yield f"{name}: the cache tensors take {allocated} bytes of {memory}"
            if found[sharing][0] != predicted:
                yield f"{name}: {found[sharing][0]} blocks, not the predicted {predicted}"
        (shared, block), (unshared, _) = found[True], found[False]
        report.add(
            f"KV cache of {memory / MIB:.0f} MiB",
            CLA_factor=factor,
            cache=dtype,
            blocks_shared=shared,
            blocks_unshared=unshared,
            tokens_shared=shared * block,
            tokens_unshared=unshared * block,
            ratio=shared / unshared,
        )
        if shared != factor * unshared:
            yield f"{case}: {shared} blocks with sharing and {unshared} without are not a factor of {factor} apart"


if __name__ == "__main__":
    main()
