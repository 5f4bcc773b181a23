"""Memory that compiled grammars take, against what xgrammar counts for them: what VLLM_XGRAMMAR_CACHE_MB bounds.

    python benchmarks/grammar_cache.py --limit 16

Compiles JSON schemas of three properties, each new, for a vocabulary as small as the demo model's, as vLLM does, and
lets each go. Prints the memory of this process (USS) on the way, and the cache's own count.
"""

from __future__ import annotations

import argparse
import json
from random import Random

import psutil
import xgrammar

MIB = 2**20


def schema(random: Random) -> str:
    names = [f"name{random.randrange(10**6)}" for _ in range(3)]
    properties = {name: {"enum": [name, f"not {name}"]} for name in names}
    return json.dumps({"type": "object", "properties": properties, "required": names, "additionalProperties": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=16, help="MiB (default: %(default)s)")
    parser.add_argument("--schemas", type=int, default=2000, help="default: %(default)s")
    arguments = parser.parse_args()
    vocabulary = [bytes([byte]) for byte in range(256)] + [f"w{number}".encode() for number in range(1792)]
    tokens = xgrammar.TokenizerInfo(vocabulary, vocab_size=len(vocabulary), stop_token_ids=[len(vocabulary) - 1])
    compiler = xgrammar.GrammarCompiler(tokens, max_threads=8, cache_limit_bytes=arguments.limit * MIB)
    process, random = psutil.Process(), Random(1)
    for number in range(arguments.schemas + 1):
        if number % (arguments.schemas // 8) == 0:
            memory, counted = process.memory_full_info().uss / MIB, compiler.get_cache_size_bytes() / MIB
            print(f"{number:6} schemas  {memory:7.1f} MiB, of which the cache counts {counted:.1f}", flush=True)
        compiler.compile_json_schema(schema(random), any_whitespace=False)


if __name__ == "__main__":
    main()
