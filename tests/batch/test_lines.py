"""The input file: what counts as a line, what identifies it, and what is noticed of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json

from hunyuan_vllm.batch.requests import digest, index_file
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.jsonl import read_lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)
UTF8_JSON = JSON.filter(lambda value: "\\ud" not in json.dumps(value))  # a lone surrogate has no bytes in UTF-8


def write(path, *lines: bytes):
    path.write_bytes(b"\n".join(lines))
    return path


def test_numbers_count_blank_lines(tmp_path):
    path = write(tmp_path / "in", b'\xef\xbb\xbf{"id": 1}\r', b"", b"  \t", '{"id": "海"}'.encode())
    assert [(line.number, line.given, line.id) for line in read_lines(path)] == [
        (1, {"id": 1}, 1),
        (4, {"id": "海"}, "海"),
    ]
    index = index_file(path)
    assert index.requests == 2
    assert [bool(number) for number in index.digests] == [True, False, False, True]


@pytest.mark.parametrize(
    "raw", [b"not json", b'{"a": 1', b"{'a': 1}", b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}', b'{"a": 1} {"a": 2}']
)
def test_a_line_that_is_not_json_is_kept_as_text(tmp_path, raw):
    (line,) = read_lines(write(tmp_path / "in", raw))
    assert line.broken
    assert line.given == raw.decode(errors="replace")
    json.dumps(line.given, ensure_ascii=False).encode()


@given(UTF8_JSON)
def test_the_digest_survives_writing_and_reading(value):
    assert digest(from_json(json.dumps(value, ensure_ascii=False))) == digest(value)
    assert digest(value) != digest([value])


def test_ids_that_repeat_an_earlier_one(tmp_path):
    lines = [
        '{"id": "a"}',
        '{"id": "b"}',
        "",
        '{"custom_id": "a"}',
        '{"id": 7}',
        '{"id": "7"}',
        "{}",
        "{}",
        '{"id": "a"}',
    ]
    index = index_file(write(tmp_path / "in", *map(str.encode, lines)))
    assert index.repeated == {4: 1, 6: 5, 9: 1}


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        index_file(write(tmp_path / "in", b"", b" "))
    with pytest.raises(UserError, match="cannot be read"):
        index_file(tmp_path / "none")
