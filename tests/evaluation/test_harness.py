"""lm-evaluation-harness on a real server of the demo model; its likelihoods and answers, by the reference model."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked_programs
import pytest
import torch
from serving import COMMAND, Server, running_server

from hunyuan_vllm import demo
from hunyuan_vllm.bench.client import ServedModel, connect
from hunyuan_vllm.evaluation.passages import MAX_ANSWER, held_out_questions
from hunyuan_vllm.evaluation.tasks import PUBLISHED, TASKS_DIRECTORY, Harness
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.tokenizer import load_tokenizer
from hunyuan_vllm.util.errors import UserError

pytestmark = [pytest.mark.server, pytest.mark.slow]

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'hunyuan-vllm[eval]'")

KEY = "the-key-of-this-test"
QUESTIONS = 20
# Two questions with one example before each, as a benchmark with shots is asked; and in the form of ARC.
SHOTS = """
task: local_shots
custom_dataset: !function local_data.load
output_type: multiple_choice
test_split: test
fewshot_split: shots
fewshot_config: {sampler: first_n}
doc_to_text: "{{question}} ="
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ARC = (
    "include: "
    + str(TASKS_DIRECTORY / "arc_challenge_letters.yaml")
    + """
task: local_arc
custom_dataset: !function local_data.arc
"""
)
DATA = """
from datasets import Dataset

def load(**_):
    rows = [{"question": f"{a} + {a}", "choices": [str(2 * a), str(2 * a + 1)], "gold": 0} for a in range(2, 6)]
    return {"test": Dataset.from_list(rows[1:]), "shots": Dataset.from_list(rows[:1])}

def arc(**_):
    choices = {"label": ["A", "B", "C"], "text": ["ice", "fire", "rock"]}
    rows = [{"question": "What is cold? ", "choices": choices, "answerKey": "A"},
            {"question": "What burns?", "choices": choices, "answerKey": "B"}]
    return {"test": Dataset.from_list(rows[1:]), "train": Dataset.from_list(rows[:1])}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ["--dtype", "float32", "--max-model-len", "512"]
    with running_server(*flags, VLLM_API_KEY=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def found(server: Server, key_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command finds, run once for all tests."""
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "shots.yaml").write_text(SHOTS)
    (directory / "arc.yaml").write_text(ARC)
    (directory / "local_data.py").write_text(DATA)
    output = directory / "found.json"
    names = "hunyuan_demo,hunyuan_demo_choice,local_shots,local_arc"
    result = forked_programs.run(
        [COMMAND, "eval", "tasks", "--url", server.url, "--tasks", names, "--limit", str(QUESTIONS),
         "--include", directory, "--num-fewshot", "1", "--output", output, "--key-file", key_file],
        {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert KEY not in result.stdout + result.stderr + output.read_text()
    assert all(name in result.stdout for name in names.split(","))
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def model() -> HunYuanForCausalLM:
    return HunYuanForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(demo.path())


def samples(found: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return found[task]["samples"][task]


@torch.inference_mode()
def likelihood(model: HunYuanForCausalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p of the continuation, and whether it is the likeliest, token by token."""
    logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    found = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return found, bool((logits.argmax(-1) == targets).all())


@pytest.mark.server
def test_answers_in_the_chat_format(found: dict[str, Any], model: HunYuanForCausalLM, tokenizer: Any) -> None:
    asked = samples(found, "hunyuan_demo")
    assert len(asked) == QUESTIONS
    for sample, question in zip(asked, held_out_questions(), strict=False):
        passage = question.passage(tokenizer)
        said, _ = model.greedy(
            torch.tensor([passage.ids[: passage.scored[0]]]), MAX_ANSWER, stop_ids=(passage.ids[-1],)
        )
        assert sample["filtered_resps"] == [tokenizer.decode(said[0], skip_special_tokens=True)]
        assert sample["exact_match"] == float(sample["filtered_resps"] == [question.answer])


@pytest.mark.server
def test_likelihoods_in_the_chat_format(found: dict[str, Any], model: HunYuanForCausalLM, tokenizer: Any) -> None:
    """Token offsets and special tokens: the sums are the continuation's, behind the template's own marks."""
    asked = samples(found, "hunyuan_demo_choice")
    assert len(asked) == QUESTIONS
    for sample, question in zip(asked, held_out_questions(), strict=False):
        passage = question.passage(tokenizer)
        context = passage.ids[: passage.scored[0]]
        for choice, (theirs, greedy) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            ours, likeliest = likelihood(model, context, tokenizer(choice, add_special_tokens=False)["input_ids"])
            assert float(theirs) == pytest.approx(ours, abs=2e-3)
            assert str(greedy) == str(likeliest)


@pytest.mark.server
def test_likelihoods_of_plain_text_with_shots(found: dict[str, Any], model: HunYuanForCausalLM, tokenizer: Any) -> None:
    """The document's start token comes first, once."""
    for sample in samples(found, "local_shots"):
        text = f"2 + 2 = 4\n\n{sample['doc']['question']} ="
        whole = tokenizer(text)["input_ids"]
        assert whole[0] == tokenizer.bos_token_id
        for choice, (theirs, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            ids = tokenizer(f"{text} {choice}")["input_ids"]
            ours, _ = likelihood(model, ids[: len(whole)], ids[len(whole) :])
            assert float(theirs) == pytest.approx(ours, abs=2e-3)


@pytest.mark.server
def test_arc_is_asked_with_letters(found: dict[str, Any]) -> None:
    (sample,) = samples(found, "local_arc")
    context, choice = sample["arguments"][1]
    options = "A. ice\nB. fire\nC. rock\n"
    assert context == f"What is cold?\n{options}Answer: A\n\nWhat burns?\n{options}Answer:"
    assert choice == " B" and sample["target"] == 1


@pytest.mark.server
def test_the_scores(found: dict[str, Any]) -> None:
    assert [(name, raw["n-shot"][name], raw["n-samples"][name]["effective"]) for name, raw in found.items()] == [
        ("hunyuan_demo", 0, QUESTIONS),
        ("hunyuan_demo_choice", 0, QUESTIONS),
        ("local_shots", 1, 3),
        ("local_arc", 1, 1),
    ]
    right = [sample["exact_match"] for sample in samples(found, "hunyuan_demo")]
    assert found["hunyuan_demo"]["results"]["hunyuan_demo"]["exact_match,none"] == sum(right) / QUESTIONS


@pytest.mark.server
def test_a_server_that_wants_a_key(server: Server) -> None:
    with pytest.raises(UserError, match="asks for an API key: .*--key-file"):
        connect(server.url, None)
    with pytest.raises(UserError, match="does not accept this API key"):
        connect(server.url, "wrong")
    served = connect(f"{server.url}/", KEY)
    assert (served.name, served.context, served.tokenizer()) == ("hunyuan", 512, demo.path())
    assert KEY not in repr(served)


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the harness's own 14,000 files those of the published tasks: to read all takes half a minute."""
    from lm_eval.tasks._index import TaskIndex

    directory = Path(importlib.import_module("lm_eval.tasks").__file__ or "").parent
    files = TaskIndex._iter_yaml_files

    def wanted(path: Path) -> bool:
        return directory not in path.parents or path.relative_to(directory).parts[0] in (
            "arc",
            "ceval",
            "cmmlu",
            "mmlu",
        )

    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", lambda root: filter(wanted, files(root)))


def test_tasks_that_cannot_be_asked(few_files: None, tmp_path: Path) -> None:
    """Before a question is asked: no server is here."""
    (tmp_path / "gone.yaml").write_text(f"task: local_gone\ndataset_path: {tmp_path / 'none'}\ntest_split: test\n")
    harness = Harness(ServedModel("http://127.0.0.1:9", "hunyuan", 512, ""), demo.path(), 1, tmp_path)
    with pytest.raises(UserError, match=r"--tasks local_gone: its data cannot be loaded \(.*none.*\); .*HF_HOME"):
        harness.load("local_gone")
    with pytest.raises(UserError, match=r"--tasks mmluu: unknown task; `lm_eval ls tasks`"):
        harness.load("mmluu")
    for name in PUBLISHED:  # they exist; their data, from the hub, need not be here
        try:
            harness.load(name)
        except UserError as error:
            assert f"{name}: its data cannot be loaded" in str(error)
