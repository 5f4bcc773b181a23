"""From calibration text to rows of token ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hunyuan_vllm import demo
from hunyuan_vllm.quantize import texts
from hunyuan_vllm.quantize.texts import calibration_tokens, pack, read_documents
from hunyuan_vllm.tokenizer import register_tokenizer
from hunyuan_vllm.util.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    register_tokenizer()
    return AutoTokenizer.from_pretrained(demo.path())


def tokens_of(given: Path | None, limit: int = 100_000) -> texts.Tokens:
    return calibration_tokens(demo.path(), 2048, given, limit)


def test_documents_are_packed_apart() -> None:
    packed = pack([[5, 6, 7], [8, 9], [10, 11, 12]], limit=100, vocab_size=20)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    mask = packed.mask[0, 0]
    assert mask[4].tolist() == [False, False, False, True, True, False, False, False]
    assert mask[2, :3].all() and not mask[1, 2] and mask.diagonal().all()


def test_rows_are_of_one_length_and_no_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "ROW", 4)
    packed = pack([[1, 2, 3], [4, 5, 6], [7, 8], [9, 9, 9, 9]], limit=10, vocab_size=20)
    # The second document is cut at its row's end, and the third row, which is not full, is left out.
    assert packed.ids.tolist() == [[1, 2, 3, 4], [7, 8, 9, 9]]
    assert packed.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert pack([[1, 2, 3]], limit=2, vocab_size=20).ids.tolist() == [[1, 2]]


def test_ids_beyond_the_vocabulary_and_no_ids() -> None:
    with pytest.raises(UserError, match="gives id 20, the model has 20 tokens"):
        pack([[3, 20]], limit=10, vocab_size=20)
    with pytest.raises(UserError, match="has no token"):
        pack([[], []], limit=10, vocab_size=20)


def test_the_built_in_text_is_chinese_and_english_and_long_enough(tokenizer) -> None:
    packed = tokens_of(None, 8192)
    assert packed.ids.shape == (7, 1024)
    text = tokenizer.decode(packed.ids.flatten())
    chinese = sum("一" <= character <= "鿿" for character in text)
    assert chinese > 1200 and sum(character.isascii() and character.isalpha() for character in text) > 6000
    # Every document begins as one does for the model.
    starts = packed.ids[packed.positions == 0]
    assert (starts == tokenizer.bos_token_id).all() and len(starts) > 30


def test_plain_text_is_cut_into_documents(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "ROW", 16)
    file = tmp_path / "text.txt"
    file.write_text("one two three four five six seven eight nine ten " * 20)
    packed = tokens_of(file, 64)
    assert packed.ids.shape == (4, 16) and (packed.ids[:, 0] == tokenizer.bos_token_id).all()
    plain = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    assert packed.ids[:, 1:].flatten().tolist() == plain[:60]


def test_chats_go_through_the_template(tmp_path: Path, tokenizer) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": messages, "id": 7}) + "\n\n" + json.dumps({"text": "Plain."}) + "\n")
    packed = tokens_of(file)
    chat = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert packed.ids[0].tolist() == [*chat, *tokenizer("Plain.")["input_ids"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b'{"text": "a"}\n\n{"text": ', "line 3 of .*x.jsonl is not JSON"),
        (b'{"text": "a"}\n[1]\n', "line 2 of .* is neither"),
        (b'{"text": "a"}\n{"messages": []}\n', "line 2 of .* is neither"),
        (b'{"messages": [{"content": "a"}]}\n', "line 1 of .* is neither"),
        (b'{"text": 5}\n', "line 1 of .* is neither"),
    ],
)
def test_broken_files_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(file, 100))


def test_other_files_of_no_use(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.txt cannot be read: No such file"):
        list(read_documents(tmp_path / "absent.txt", 100))
    binary = tmp_path / "x.txt"
    binary.write_bytes(b"abc\xff\xfe")
    with pytest.raises(UserError, match="x.txt is not UTF-8 text: .* at byte 3"):
        list(read_documents(binary, 100))
    binary.write_bytes(b"  \n")
    with pytest.raises(UserError, match="is empty"):
        list(read_documents(binary, 100))


def test_a_chat_the_template_refuses(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "a"}\n{"messages": [{"role": "tool", "content": "x"}]}\n')
    with pytest.raises(UserError, match="chat 2 .* does not fit the template: Unknown role in message"):
        tokens_of(file)


def test_a_checkpoint_without_tokenizer(tiny: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer of .* does not load"):
        calibration_tokens(tiny, 320, None, 100)


def test_the_digest_tells_rows_apart() -> None:
    same, also = pack([[1, 2], [3, 4]], 9, 9), pack([[1, 2], [3, 4]], 9, 9)
    assert same.digest() == also.digest() != pack([[1, 2, 3, 4]], 9, 9).digest()
    assert torch.equal(same.ids, pack([[1, 2, 3, 4]], 9, 9).ids)
