"""mlx-lm on the CPU, run by an interpreter that has it: answers requests on standard input, one JSON object per line.

    pip install "mlx[cpu]" mlx-lm        # in an environment of its own
    python benchmarks/decode.py --mlx-python THAT_ENVIRONMENT/bin/python

float32, because mlx's CPU backend does not gather bfloat16. It ties the head to the embedding whatever the config says.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def steps(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
    """Seconds of each step, the first of which reads the prompt; and the tokens, greedy."""
    cache, given = make_prompt_cache(model), mx.array([prompt])
    seconds, tokens = [], []
    last = time.perf_counter()
    for _ in range(new_tokens):
        token = mx.argmax(model(given, cache=cache)[:, -1], axis=-1)
        tokens.append(token.item())
        given = token[:, None]
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    return seconds, tokens


def main() -> None:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(sys.argv[1]), lazy=True)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    steps(model, [3] * 4, 2)
    print(json.dumps({"version": metadata.version("mlx-lm")}), flush=True)
    for line in sys.stdin:
        seconds, tokens = steps(model, **json.loads(line))
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
