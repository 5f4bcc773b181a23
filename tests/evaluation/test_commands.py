"""`hunyuan-vllm eval compare` as a user runs it; the figures once more by the reference model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked_programs
import numpy as np
import pytest
import torch
from checkpoints import rewrite
from serving import COMMAND
from torch import Tensor

from hunyuan_vllm import demo
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.tokenizer import load_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]
CACHE = ["--kv-cache-memory-bytes", str(64 * 2**20)]
EXACT = ["--json", "--dtype", "float32"]
TEXT = "The capital of France is Paris. 2 + 3 = 5, and 法国的首都是巴黎。 " * 3


CASES = {
    "int4": ["compare", "--b", "int4"],
    "no such model": ["compare", "stray", "--b", "int8"],
    "two models": ["compare", "demo", "stray", "--b", "int8"],
    "no such flag": ["compare", "--b", "kv-fp8", "--limit", "5", "--block-sizee", "3"],
    "no such block size": ["compare", "--b", "kv-fp8", "--limit", "5", "--block-size", "7"],
}


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    output: str
    errors: str


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with one layer's experts blurred."""
    directory = tmp_path_factory.mktemp("perturbed") / "model"
    shutil.copytree(demo.path(), directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))

    def change(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for expert in range(4):
            weight = tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
            noise = torch.randn(weight.shape, generator=generator)
            weight += (weight.float().std() * noise).to(weight.dtype)

    rewrite(directory, change)
    return directory


@pytest.fixture(scope="module")
def ran(perturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Ran]]]:
    """All commands, a core each."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)
    other = f"bf16:{perturbed}"
    compare = ["compare", "--b", other, "--text", str(text), "--context", "40", *EXACT, *CACHE]
    cases = {"compare": compare, **CASES}

    def run(arguments: list[str]) -> Ran:
        temporary = tmp_path_factory.mktemp("temporary")
        found = forked_programs.run([COMMAND, "eval", *arguments], os.environ | {"TMPDIR": str(temporary)})
        assert list(temporary.glob("hunyuan-vllm-*")) == []  # the logits' directory is gone
        return Ran(found.returncode, found.stdout, found.stderr)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run, arguments) for name, arguments in cases.items()}


@torch.inference_mode()
def distributions(directory: Path, sequences: Sequence[list[int]], firsts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The reference model's log-probabilities [tokens, vocab], and the tokens, from `firsts` on."""
    model = HunYuanForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows, targets = [], []
    for ids, first in zip(sequences, firsts, strict=True):
        rows.append(model(torch.tensor([ids])).logits[0, first - 1 : -1].double().log_softmax(-1))
        targets += ids[first:]
    return torch.cat(rows), torch.tensor(targets)


def check(found: dict[str, Any], a: Path, b: Path, sequences: Sequence[list[int]], firsts: Sequence[int]) -> None:
    """The command's figures against those of the reference model on both checkpoints."""
    (p, targets), (q, _) = distributions(a, sequences, firsts), distributions(b, sequences, firsts)
    kl = (p.exp() * (p - q)).sum(-1).numpy()
    perplexities = [(-one.gather(1, targets[:, None]).mean()).exp().item() for one in (p, q)]
    assert found["tokens"] == len(targets)
    assert [found["perplexity_a"], found["perplexity_b"]] == pytest.approx(perplexities, rel=1e-4)
    assert found["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-9)
    assert found["kl_mean"] == pytest.approx(kl.mean(), rel=1e-2, abs=1e-6)
    assert found["kl_median"] == pytest.approx(np.median(kl), rel=1e-2, abs=1e-6)
    assert found["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-2)
    assert found["kl_max"] == pytest.approx(kl.max(), rel=1e-2)


def test_compare_on_a_text(ran: dict[str, Future[Ran]], perturbed: Path) -> None:
    result = ran["compare"].result()
    assert result.status == 0, result.errors
    (found,) = json.loads(result.output)["compared"]
    assert found["checkpoint"] == str(perturbed)

    tokenizer = load_tokenizer(demo.path())
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    windows = [[tokenizer.bos_token_id, *ids[start : start + 39]] for start in range(0, len(ids), 39)]
    assert len(windows) > 1
    check(found, demo.path(), perturbed, windows, [1] * len(windows))


def test_an_engine_that_does_not_start(ran: dict[str, Future[Ran]]) -> None:
    """An option that only vLLM can judge: one line, and the status of a user's mistake; of any other trouble, 3."""
    result = ran["no such flag"].result()
    assert (result.status, result.output) == (2, "")
    assert "--block-sizee" in result.errors.splitlines()[-1]
    result = ran["no such block size"].result()
    assert (result.status, result.output) == (3, "")
    assert result.errors.splitlines()[-1].startswith("hunyuan-vllm: bf16: ")
    assert "Traceback" not in result.errors


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("int4", "int4 starts from a 4-bit checkpoint"),
        ("no such model", "the model stray does not exist"),
        ("two models", "'stray' is one argument too many"),
    ],
)
def test_a_mistake_is_one_line(ran: dict[str, Future[Ran]], case: str, says: str) -> None:
    result = ran[case].result()
    assert (result.status, result.output) == (2, "")
    assert says in result.errors and result.errors.count("\n") == 1
