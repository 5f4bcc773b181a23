"""What is scored of a text, a chat and the built-in text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hunyuan_vllm import demo
from hunyuan_vllm.evaluation.passages import (
    BUILT_IN_TEXT,
    Passage,
    chat_passage,
    held_out_questions,
    limited,
    read_passages,
    text_passages,
)
from hunyuan_vllm.tokenizer import HYTokenizer, load_tokenizer
from hunyuan_vllm.util.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "train" / "demo"))

import export_held_out  # noqa: E402
from corpus.dialogue import Chat, Exchange  # noqa: E402
from encoding import Encoder  # noqa: E402

CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "2 + 3 = ?"},
    {"role": "assistant", "content": "2 + 3 = 5"},
    {"role": "user", "content": "海水为什么是咸的？"},
    {"role": "assistant", "content": "河流带来盐。"},
]


@pytest.fixture(scope="module")
def tokenizer() -> HYTokenizer:
    return load_tokenizer(demo.path())


def test_what_the_assistant_wrote_counts(tokenizer: HYTokenizer) -> None:
    """As the training recipe's own encoder marks it."""
    exchanges = tuple(Exchange(CHAT[i]["content"], CHAT[i + 1]["content"]) for i in (1, 3))
    ids, written = Encoder(demo.path() / "hy.tiktoken").chat(Chat(CHAT[0]["content"], exchanges))
    assert chat_passage(CHAT, tokenizer, 512) == Passage(ids, [i for i, mine in enumerate(written) if mine])


def test_a_chat_is_cut_at_the_context(tokenizer: HYTokenizer) -> None:
    whole = chat_passage(CHAT, tokenizer, 512)
    cut = chat_passage(CHAT, tokenizer, whole.scored[2])
    assert cut == Passage(whole.ids[: whole.scored[2]], whole.scored[:2])


def test_windows_hold_the_whole_text_once(tokenizer: HYTokenizer) -> None:
    text = BUILT_IN_TEXT.read_text(encoding="utf-8")
    passages = text_passages(text, tokenizer, 100)
    assert all(len(passage.ids) <= 100 and passage.ids[0] == tokenizer.bos_token_id for passage in passages)
    assert all(passage.scored == list(range(1, len(passage.ids))) for passage in passages)
    assert tokenizer.decode([id for passage in passages for id in passage.ids[1:]]) == text


def test_the_built_in_text_is_bilingual_and_long_enough() -> None:
    text = BUILT_IN_TEXT.read_text(encoding="utf-8")
    assert sum("一" <= character <= "鿿" for character in text) > 1000
    assert len(text.encode("ascii", "ignore").split()) > 800


def test_jsonl_may_mix_chats_and_texts(tokenizer: HYTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n\n" + json.dumps({"text": "The sea."}) + "\n")
    chat, text = read_passages(file, tokenizer, 512)
    assert chat == chat_passage(CHAT, tokenizer, 512)
    assert tokenizer.decode(text.ids[1:]) == "The sea."


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, "none.txt cannot be read: No such file"),
        ("empty.txt", b" \n", "empty.txt is empty"),
        ("latin.txt", "Meer für alle".encode("latin-1"), "latin.txt is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{oops}\n', "line 2 of .* is not JSON"),
        ("other.jsonl", b'{"prompt": "a"}\n', "line 1 of .* is neither"),
        ("silent.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n', "chat 1 of .*no message has the role"),
        ("boss.jsonl", b'{"messages": [{"role": "boss", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
         "chat 1 of .*the chat template refuses"),
    ],
)  # fmt: skip
def test_a_file_of_no_use_is_one_line(
    name: str, content: bytes | None, says: str, tokenizer: HYTokenizer, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_passages(tmp_path / name, tokenizer, 512)
    assert "\n" not in str(caught.value)


def test_a_limit_counts_scored_tokens() -> None:
    passages = [Passage([5, 6, 7, 8], [2, 3]), Passage([5, 6, 7], [1, 2]), Passage([5, 6], [1])]
    assert limited(passages, 3) == [Passage([5, 6, 7, 8], [2, 3]), Passage([5, 6], [1])]
    assert limited(passages, 2) == passages[:1]
    assert limited(passages, None) == passages


def test_the_held_out_questions_are_those_of_the_recipe() -> None:
    assert len({(question.group, question.language) for question in held_out_questions()}) == 28
    rows = list(export_held_out.rows())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert export_held_out.TARGET.read_text(encoding="utf-8") == text
    for row in rows:
        assert row["choices"][row["gold"]] == row["answer"]
        assert len(set(row["choices"])) == 4
