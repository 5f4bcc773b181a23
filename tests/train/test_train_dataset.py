"""A file as a dataset: every conversation once, cut and counted, and read again only where it is needed."""

from __future__ import annotations

import json
import logging
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from hunyuan_vllm.demo import path as demo_path
from hunyuan_vllm.tokenizer import HYTokenizer, load_tokenizer
from hunyuan_vllm.train.dataset import BadLine, ConversationDataset, Encoding, PackedDataset, scan
from hunyuan_vllm.util.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> HYTokenizer:
    return load_tokenizer(demo_path())


def line(user: str, assistant: str) -> str:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def write(directory: Path, *lines: str, start: bytes = b"") -> Path:
    file = directory / "data.jsonl"
    file.write_bytes(start + "\n".join(lines).encode())
    return file


def varied(directory: Path, count: int) -> Path:
    rng = random.Random(5)
    return write(
        directory,
        *(line(f"{number}", " ".join(rng.choices("abcdefg", k=rng.randint(1, 60)))) for number in range(count)),
    )


def test_conversations_in_order_blank_lines_and_bom_skipped(tmp_path: Path, tokenizer: HYTokenizer) -> None:
    file = write(tmp_path, line("一", "1"), "", "  ", line("二", "2\n2"), line("三", "3"), start=b"\xef\xbb\xbf")
    dataset = ConversationDataset(file, Encoding(tokenizer, default_system=""))
    texts = [tokenizer.decode(dataset[index].input_ids) for index in (2, 0, 1)]
    assert [text[15:16] for text in texts] == ["三", "一", "二"]
    assert list(dataset.scan.numbers) == [1, 4, 5]
    assert list(dataset.lengths) == [len(dataset[index]) for index in range(3)]


def test_all_bad_lines_are_named_before_anything_is_trained(tmp_path: Path, tokenizer: HYTokenizer) -> None:
    file = write(tmp_path, line("a", "b"), "{", line("a", ""), *["[]"] * 5)
    with pytest.raises(UserError) as error:
        ConversationDataset(file, Encoding(tokenizer))
    said = str(error.value)
    assert f"{file}: line 2: it is not JSON" in said and "; line 3: message 2 (assistant) is empty; line 4: " in said
    assert said.endswith(f"; and 2 more (hunyuan-vllm data check {file} lists them all)")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file(tmp_path: Path, tokenizer: HYTokenizer, content: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="is empty: it needs one conversation per line"):
        ConversationDataset(tmp_path / "data.jsonl", Encoding(tokenizer))


def test_a_file_that_is_not_there(tmp_path: Path, tokenizer: HYTokenizer) -> None:
    with pytest.raises(UserError, match="none.jsonl cannot be read: No such file or directory"):
        ConversationDataset(tmp_path / "none.jsonl", Encoding(tokenizer))


def test_cut_conversations_are_counted_and_those_without_an_answer_left_out(
    tmp_path: Path, tokenizer: HYTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long_question = line(" ".join("abcdefgh"), "x")
    file = write(tmp_path, line("a", "b"), long_question, line("a", " ".join("abcdefgh")))
    with caplog.at_level(logging.WARNING):
        dataset = ConversationDataset(file, Encoding(tokenizer, max_seq_length=8, default_system=""))
    assert f"{file}: 2 of 3 conversations are cut at 8 tokens" in caplog.text
    assert f"{file}: 1 are skipped, since cutting leaves no answer to learn" in caplog.text
    assert len(dataset) == 2 and [one.truncated for one in dataset] == [False, True]
    assert [len(one) for one in dataset] == list(dataset.lengths) and len(dataset[1]) == 8
    assert dataset[1].learned > 0
    with pytest.raises(UserError, match="no conversation has an answer within --max_seq_length 3: raise it"):
        ConversationDataset(file, Encoding(tokenizer, max_seq_length=3))


def test_a_file_that_changes_under_training(tmp_path: Path, tokenizer: HYTokenizer) -> None:
    file = write(tmp_path, line("a", "b"), line("c", "d"))
    dataset = ConversationDataset(file, Encoding(tokenizer))
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match="changed during training"):
        dataset[1]


def test_several_processes_find_the_same(tmp_path: Path, tokenizer: HYTokenizer) -> None:
    file = varied(tmp_path, 700)
    file.write_bytes(file.read_bytes() + b"\n{\n" + line("a", "b").encode())
    one, two = (scan(file, Encoding(tokenizer, 64), processes=processes) for processes in (1, 2))
    assert one == two and len(one) == 701
    assert one.bad == [
        BadLine(701, "it is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)")
    ]


def test_progress_reaches_the_size(tmp_path: Path, tokenizer: HYTokenizer) -> None:
    file = varied(tmp_path, 600)
    steps: list[int] = []
    scan(file, Encoding(tokenizer), advance=steps.append)
    assert len(steps) == 3 and sum(steps) == file.stat().st_size


def test_packing_uses_each_conversation_once_and_fills_rows(tmp_path: Path, tokenizer: HYTokenizer) -> None:
    dataset = ConversationDataset(varied(tmp_path, 400), Encoding(tokenizer, max_seq_length=128))
    packed = PackedDataset(dataset, seed=1)
    rows = [packed[index] for index in range(len(packed))]
    assert max(sum(map(len, row)) for row in rows) <= 128
    found = Counter(tuple(one.input_ids) for row in rows for one in row)
    assert found == Counter(tuple(dataset[index].input_ids) for index in range(400))
    assert packed.filled > 0.9
    assert packed.filled == pytest.approx(sum(dataset.lengths) / (128 * len(rows)))
    again, other = PackedDataset(dataset, seed=1), PackedDataset(dataset, seed=2)
    assert again[0] == packed[0] and other[0] != packed[0]
