"""What the converter's options are worth on the demo model: KL and top-1 agreement with BF16 on its held-out questions.

    python benchmarks/quantize_options.py

The converted checkpoints are run in float32 by the plain PyTorch model, their weights as stored and their inputs
rounded as kernels round them (tests/quantize/served.py), so that only quantising differs. FP8 has its FP8 cache. A
calibration of 24 tokens shows what headroom is for: inputs beyond what calibration saw.
"""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, Report, note, options
from transformers import AutoTokenizer

from hunyuan_vllm import demo
from hunyuan_vllm.evaluation.passages import held_out_questions
from hunyuan_vllm.quantize.convert import quantize_checkpoint
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.tokenizer import register_tokenizer

FP8 = "fp8"
RUNS: list[tuple[str, dict[str, Any]]] = [
    *[(FP8, {"headroom": headroom}) for headroom in (1.0, 2.0, 4.0, 16.0)],
    *[(FP8, {"calibration_tokens": 24, "headroom": headroom}) for headroom in (1.0, 2.0, 4.0)],
    *[(scheme, {}) for scheme in ("int8", "int8-w8a8")],
    *[(scheme, {"smooth": 0.5}) for scheme in (FP8, "int8", "int8-w8a8")],
]


def chats(each: int) -> list[list[int]]:
    """Question and right answer, as the chat template has them."""
    register_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    asked = []
    for one in held_out_questions(each):
        system = [{"role": "system", "content": one.system}] if one.system else []
        turns = [{"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer}]
        text = tokenizer.apply_chat_template([*system, *turns], tokenize=False)
        asked.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return asked


@torch.inference_mode()
def logprobs(model: HunYuanForCausalLM, documents: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([document])).logits[0].log_softmax(-1) for document in documents]


def main() -> None:
    parser = options(__doc__, rounds=None)
    parser.add_argument("--each", type=int, default=6, help="questions of a kind and language (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("quantize_options", arguments)
    served = runpy.run_path(str(REPOSITORY / "tests" / "quantize" / "served.py"))["served"]
    documents = chats(arguments.each)
    exact = logprobs(HunYuanForCausalLM.from_pretrained(demo.path(), dtype=torch.float32), documents)
    tokens = sum(map(len, documents))
    for scheme, given in RUNS:
        name = " ".join([scheme, *(f"{key} {value}" for key, value in given.items())])
        note(name)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "converted"
            quantize_checkpoint(demo.path(), target, scheme, **given)
            found = logprobs(served(target, scheme == FP8), documents)
        pairs = list(zip(exact, found, strict=True))
        kl = sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / tokens
        same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs) / tokens
        title = f"{len(documents)} chats, {tokens:,} tokens"
        report.add(title, options=name, KL=f"{kl:.5f}", top_1=f"{100 * same:.2f}%")
    report.show()


if __name__ == "__main__":
    main()
