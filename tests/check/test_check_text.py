"""Tokenizer, chat template and generation settings of damaged copies of the demo checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_templates import FAULTY, FINE_TUNED
from damage import check_directory, copy_demo, edit_json, findings, only_problem

from hunyuan_vllm.chat_template import CHAT_TEMPLATE
from hunyuan_vllm.util.findings import Status

VOCABULARY = "hy.tiktoken"


@pytest.mark.parametrize("lines", [1, 7, 120])
def test_a_vocabulary_cut_at_a_line_end_is_noticed_by_its_special_ids(tmp_path: Path, lines: int) -> None:
    vocabulary = copy_demo(tmp_path) / VOCABULARY
    kept = vocabulary.read_bytes().splitlines(keepends=True)[:-lines]
    vocabulary.write_bytes(b"".join(kept))
    # Each line is well-formed, so that the file itself is no less sound than before.
    problem = next(problem for problem in findings(check_directory(tmp_path)) if problem.subject == "special ids")
    assert f"<|eos|> is id {1803 - lines}" in problem.text
    assert VOCABULARY in problem.remedy


def test_a_vocabulary_cut_inside_a_line(tmp_path: Path) -> None:
    vocabulary = copy_demo(tmp_path) / VOCABULARY
    vocabulary.write_bytes(vocabulary.read_bytes()[:-9])
    assert "is damaged" in only_problem(tmp_path).text


def test_no_tokenizer(tmp_path: Path) -> None:
    (copy_demo(tmp_path) / VOCABULARY).unlink()
    problem = only_problem(tmp_path)
    assert problem.subject == "tokenizer" and "neither hy.tiktoken nor tokenizer.json" in problem.text
    assert "copy it from the published checkpoint" in problem.remedy


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    edit_json(copy_demo(tmp_path) / "config.json", vocab_size=2000)
    found = {problem.subject for problem in findings(check_directory(tmp_path))}
    assert found >= {"vocabulary", "config.json", "shapes"}


def test_a_published_shape_needs_the_published_vocabulary(tmp_path: Path) -> None:
    edit_json(copy_demo(tmp_path) / "config.json", vocab_size=129024)
    texts = [problem.text for problem in findings(check_directory(tmp_path))]
    assert any("hy.tiktoken has 1,800 tokens and the published one 127,957" in text for text in texts)


def test_ids_that_config_and_tokenizer_number_differently(tmp_path: Path) -> None:
    edit_json(copy_demo(tmp_path) / "config.json", bos_token_id=1)
    report = check_directory(tmp_path)
    assert report.sound
    (warning,) = findings(report, Status.WARNING)
    assert "bos_token_id is 1 in the checkpoint's configs and 1801 in the tokenizer" in warning.text


def test_a_stop_id_that_is_an_ordinary_token(tmp_path: Path) -> None:
    edit_json(copy_demo(tmp_path) / "generation_config.json", eos_token_id=[1803, 300])
    assert "300 is" in only_problem(tmp_path).text


def test_a_tokenizer_that_changes_text(tmp_path: Path) -> None:
    """Two tokens exchanged: a valid vocabulary, and every text with them comes back right; a byte lost does not."""
    tokenizer_json = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "Why": 1}, "unk_token": "<unk>"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    (copy_demo(tmp_path) / VOCABULARY).unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    found = [problem.subject for problem in findings(check_directory(tmp_path))]
    assert found.count("round trip") >= 4


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages | nothing }}", "fails on one turn"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "loses what was said",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
            "<|im_start|> would be encoded as plain text",
        ),
        ("{% for m in messages %}{{ m.content }}<|extra_9|>{% endfor %}", "answers end with <|extra_9|> (id 1814)"),
    ],
)
def test_a_wrong_template(tmp_path: Path, template: str, text: str) -> None:
    (copy_demo(tmp_path) / "chat_template.jinja").write_text(template)
    problems = findings(check_directory(tmp_path))
    assert {problem.subject for problem in problems} == {"template"}
    assert any(text in problem.text for problem in problems)


def test_a_checkpoints_own_template(tmp_path: Path) -> None:
    own = (
        "{% for m in messages %}{{ m.content }}{{ '<|eos|>' if m.role == 'assistant' else '<|extra_0|>' }}{% endfor %}"
    )
    edit_json(copy_demo(tmp_path) / "tokenizer_config.json", chat_template=own)
    report = check_directory(tmp_path)
    (line,) = [finding for finding in findings(report, Status.OK) if finding.subject == "template"]
    assert line.text.startswith("the checkpoint's")


@pytest.mark.parametrize("in_its_own_file", [True, False])
def test_a_template_with_the_faults_of_the_published_one(tmp_path: Path, in_its_own_file: bool) -> None:
    """It is named, and no problem: this package serves the built-in one in its place."""
    copy_demo(tmp_path)
    if in_its_own_file:
        (tmp_path / "chat_template.jinja").write_text(FAULTY)
    else:
        edit_json(tmp_path / "tokenizer_config.json", chat_template=FAULTY)
    report = check_directory(tmp_path)
    assert report.sound
    (warning,) = findings(report, Status.WARNING)
    assert "ends with <|extra_4|>" in warning.text and "access to attribute 'update'" in warning.text
    assert len(warning.items) == 4
    (line,) = [finding for finding in findings(report, Status.OK) if finding.subject == "template"]
    assert line.text.startswith("the built-in one;")


def test_a_template_of_another_format(tmp_path: Path) -> None:
    (copy_demo(tmp_path) / "chat_template.jinja").write_text(FINE_TUNED)
    report = check_directory(tmp_path)
    assert report.sound
    (warning,) = findings(report, Status.WARNING)
    assert "for one turn" in warning.text and "You are a pirate." in warning.text
    assert "<|startoftext|>海有多深？<|extra_0|>" in warning.text


def test_a_template_that_refuses_a_conversation(tmp_path: Path) -> None:
    refusing = "{% if not messages[0].content %}{{ raise_exception('say something') }}{% endif %}"
    (copy_demo(tmp_path) / "chat_template.jinja").write_text(refusing + CHAT_TEMPLATE)
    report = check_directory(tmp_path)
    assert report.sound
    (warning,) = findings(report, Status.WARNING)
    assert warning.text == "it refuses an empty system message: say something"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", [1803, 4000]),
        ("eos_token_id", "<|eos|>"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.2),
        ("top_k", "20"),
        ("repetition_penalty", 0),
        ("do_sample", "false"),
        ("max_new_tokens", 0),
    ],
)
def test_generation_settings_out_of_range(tmp_path: Path, field: str, value: object) -> None:
    edit_json(copy_demo(tmp_path) / "generation_config.json", **{field: value})
    assert field in {problem.subject for problem in findings(check_directory(tmp_path))}


def test_generation_settings_that_greedy_answers_and_their_length_come_from(tmp_path: Path) -> None:
    """As tests/test_preflight.py finds it served."""
    edit_json(copy_demo(tmp_path) / "generation_config.json", do_sample=False, max_new_tokens=8, temperature=0.7)
    report = check_directory(tmp_path)
    assert report.sound
    (warning,) = findings(report, Status.WARNING)
    assert (warning.subject, warning.text.split(" unless")[0]) == ("max_new_tokens", "answers end after 8 tokens")
    (generation,) = (found for found in findings(report, Status.OK) if found.subject == "generation")
    assert "temperature 0 " in generation.text and "0.7" not in generation.text


def test_no_generation_settings(tmp_path: Path) -> None:
    (copy_demo(tmp_path) / "generation_config.json").unlink()
    report = check_directory(tmp_path)
    assert report.sound
    (warning,) = findings(report, Status.WARNING)
    assert "answers end only at the tokenizer's end token" in warning.text
    (tmp_path / "generation_config.json").write_text("[]")
    assert only_problem(tmp_path).text == "it is not a JSON object: []"
