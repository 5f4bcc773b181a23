"""`batch`, `eval` and two replicas on checkpoints like the V1 models': one like Hunyuan-A13B, with experts and a
hy.tiktoken, and a dense one with a tokenizer.json, like the smaller ones."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked_programs
import httpx
import pytest
from checkpoints import tiny_config, write_checkpoint
from forked_programs import ENGINE_TOO
from golden_data import GOLDEN, reference_answers
from serving import COMMAND, running_server
from v1_templates import A13B, small_vocabulary

from hunyuan_vllm import demo
from hunyuan_vllm.config import HunYuanConfig

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TEXT = "The capital of France is Paris. 2 + 3 = 5, and 法国的首都是巴黎。 " * 3
CACHE = ["--kv-cache-memory-bytes", str(64 * 2**20)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = small_vocabulary([TEXT])
    tokenizer.bos_token, tokenizer.eos_token = "<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>"
    config = tiny_config(
        model_type="hunyuan_v1_dense", architectures=["HunYuanDenseV1ForCausalLM"], num_experts=1, use_cla=False,
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "dense", config)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the demo model's vocabulary, which has the names of A13B's special tokens."""
    fields = json.loads((GOLDEN / "v1_a13b" / "config.json").read_text())
    fields |= dict(vocab_size=2048, bos_token_id=1801, eos_token_id=1803, pad_token_id=1804)
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "moe", HunYuanConfig(**fields))
    (directory / "config.json").write_text(json.dumps(fields))
    shutil.copy(demo.path() / "hy.tiktoken", directory)
    tokenizer_config = json.loads((demo.path() / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"chat_template": A13B}))
    return directory


def run(*arguments: object) -> str:
    command = [COMMAND, *map(str, arguments), "--dtype", "float32", *CACHE]
    ran = forked_programs.run(command, os.environ | ENGINE_TOO, timeout=400)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(("network", "special"), [("dense", "<｜hy_User｜>"), ("moe", "<|extra_0|>")])
def test_batch(network: str, special: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    directory = request.getfixturevalue(network)
    prompts = [[5, 6, 7], [9] * 40]
    greedy = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "return_token_ids": True}
    lines = [{"prompt": prompt, **greedy} for prompt in prompts] + [
        {"messages": [{"role": "user", "content": special}], **greedy}
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", directory, "--enforce-eager")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    *plain, chat = sorted(records, key=lambda record: record["line"])
    for record, item in zip(plain, reference_answers(directory, prompts, 16).items, strict=True):
        assert record["outputs"][0]["token_ids"] == item.greedy
    assert chat["error"] is None and chat["usage"]["completion_tokens"] == 16
    assert chat["usage"]["prompt_tokens"] > 8  # what a user writes is no special token


def test_eval_compare(moe: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--text", tmp_path / "text.txt", "--context", "40"]
    (found,) = json.loads(run("eval", "compare", moe, "--b", "int8", *text, "--json"))["compared"]
    assert found["tokens"] > 40 and found["kl_mean"] > 0


def test_two_replicas_answer_as_one(dense: Path) -> None:
    prompts = [[5 + number, 6, 7] for number in range(8)]
    body = {"model": "hunyuan", "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with (
        running_server(str(dense), "--data-parallel-size", "2", "--dtype", "float32") as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
        ThreadPoolExecutor(len(prompts)) as several,
    ):
        answers = [*several.map(lambda prompt: client.post("/v1/completions", json=body | {"prompt": prompt}), prompts)]
        assert {"EngineCore_DP0", "EngineCore_DP1"} == {*re.findall(r"EngineCore_DP\d", server.said)}
    for answer, item in zip(answers, reference_answers(dense, prompts, 16).items, strict=True):
        assert answer.json()["choices"][0]["token_ids"] == item.greedy
