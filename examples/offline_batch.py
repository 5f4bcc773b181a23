"""Offline inference with vLLM alone; this package's entry point registers Hunyuan-Large in every process.

python examples/offline_batch.py
python examples/offline_batch.py --model /models/hunyuan-large --tensor-parallel-size 8
"""

import os

from vllm import LLM, EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

QUESTIONS = ["Why is sea water salty?", "海水为什么是咸的？", "Rank the four oceans by area."]
BEGINNINGS = ["The capital of France is", "Water boils at"]


def main() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description="Ask a few questions."))
    if checkpoint := os.environ.get("MODEL_PATH"):
        parser.set_defaults(model=checkpoint)
    else:
        from hunyuan_vllm import demo

        # Without a size for the KV cache, vLLM takes most of the free memory.
        parser.set_defaults(model=str(demo.path()), kv_cache_memory_bytes=256 * 2**20)
    llm = LLM(**vars(parser.parse_args()))

    sampling = llm.get_default_sampling_params()  # the checkpoint's own, from generation_config.json
    sampling.max_tokens = 128
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for question, answer in zip(QUESTIONS, llm.chat(chats, sampling), strict=True):
        print(f"\n> {question}\n{answer.outputs[0].text}")

    greedy = SamplingParams(temperature=0, max_tokens=24)
    for beginning, answer in zip(BEGINNINGS, llm.generate(BEGINNINGS, greedy), strict=True):
        print(f"\n{beginning}[…]{answer.outputs[0].text}")


if __name__ == "__main__":  # the engine's processes import this file
    main()
