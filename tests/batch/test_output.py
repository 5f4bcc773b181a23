"""The output file after every kind of end: nothing lost, nothing twice, nothing of others touched."""

import json
import os
from contextlib import closing
from pathlib import Path

import pytest

from hunyuan_vllm.batch.output import Output, Record, Settings, failed
from hunyuan_vllm.batch.requests import BadLine, index_file
from hunyuan_vllm.server.middleware.errors import Problem
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.jsonl import Line, read_lines

SETTINGS = Settings("model", {"temperature": 0.5})
LINES = [{"prompt": "eins"}, {"prompt": "二", "id": 2}, "no json", {"prompt": "four"}]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([json.dumps(LINES[0]), "", json.dumps(LINES[1]), "no json", json.dumps(LINES[3])]))
    return path


def record(line: Line, error: bool = False) -> Record:
    """What a run writes for a line; an answer has the same form as an error, but for the error."""
    made = failed(line, SETTINGS, BadLine(Problem("prompt", "prompt: too 长")))
    return made if error else Record(made.text.replace(b'"error":{', b'"error":null,"was":{'), False)


def pending(output: Output | Path, source: Path, settings=SETTINGS, **options) -> list[int]:
    """The lines left, by an open output or by the file of one."""
    if isinstance(output, Path):
        with closing(Output(output)) as opened:
            return pending(opened, source, settings, **options)
    state = output.resume(index_file(source), settings, **options)
    return [number for number, left in enumerate(state.pending) if left]


def write(path, *records: Record) -> None:
    output = Output(path)
    output.append(records)
    output.close()


def test_a_new_file_has_every_line_pending(tmp_path, source):
    output = Output(tmp_path / "out")
    assert pending(output, source) == [1, 3, 4, 5]


def test_written_lines_are_not_pending(tmp_path, source):
    first, second, broken, _ = read_lines(source)
    write(tmp_path / "out", record(second), record(broken, error=True))
    output = Output(tmp_path / "out")
    state = output.resume(index_file(source), SETTINGS)
    assert [number for number, left in enumerate(state.pending) if left] == [1, 5]
    assert state.failed == 1


def test_a_record_cut_at_any_byte_is_as_if_never_begun(tmp_path, source):
    first, second, *_ = read_lines(source)
    path, whole, torn = tmp_path / "out", record(first).text, record(second).text
    for cut in range(len(torn)):
        path.write_bytes(whole + torn[:cut] + (b"\0" * 5 if cut % 3 == 0 else b""))
        output = Output(path)
        assert pending(output, source) == [3, 4, 5]
        assert path.read_bytes() == whole
        output.append([record(second)])
        assert pending(output, source) == [4, 5]
        output.close()


def test_a_second_run_is_refused_until_the_first_ends(tmp_path, source):
    first = Output(tmp_path / "out")
    with pytest.raises(UserError, match="another run is writing"):
        Output(tmp_path / "out")
    first.close()
    Output(tmp_path / "out").close()


def test_retry_drops_the_errors_and_keeps_the_lock(tmp_path, source):
    first, second, broken, fourth = read_lines(source)
    path = tmp_path / "out"
    write(path, record(first), record(broken, error=True), record(second), record(fourth, error=True))
    os.chmod(path, 0o640)
    (tmp_path / ".out.retry").write_bytes(b"left by a run that was killed")
    output = Output(path)
    assert pending(output, source, retry_failed=True) == [4, 5]
    assert path.read_bytes() == record(first).text + record(second).text
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out"]
    with pytest.raises(UserError, match="another run is writing"):
        Output(path)
    output.append([record(fourth)])
    output.close()
    assert pending(path, source) == [4]


def test_an_edited_line_is_noticed(tmp_path, source):
    first, second, broken, _ = read_lines(source)
    write(tmp_path / "out", record(second), record(broken, error=True))
    text = source.read_text()
    source.write_text(text.replace("\\u4e8c", "drei"))
    with pytest.raises(UserError, match="line 3 of the input has changed.*another output file"):
        pending(tmp_path / "out", source)
    source.write_text(text.replace("no json", '{"prompt": "repaired"}'))
    with pytest.raises(UserError, match="line 4 of the input has changed.*--retry-failed"):
        pending(tmp_path / "out", source)
    assert pending(tmp_path / "out", source, retry_failed=True) == [1, 4, 5]


def test_spaces_and_new_lines_at_the_end_are_no_edit(tmp_path, source):
    write(tmp_path / "out", *map(record, read_lines(source)))
    source.write_text(source.read_text().replace('"prompt": ', '"prompt"  :') + '\n{"prompt": "new"}\n')
    assert pending(tmp_path / "out", source) == [6]


def test_lines_removed_from_the_input_are_noticed(tmp_path, source):
    write(tmp_path / "out", *map(record, read_lines(source)))
    source.write_text(json.dumps(LINES[0]) + "\n")
    with pytest.raises(UserError, match="line 3 of the input has changed"):
        pending(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Settings("other", {"temperature": 0.5}), "model model, this run has other"),
        (Settings("model", {}), r"defaults \{'temperature': 0.5\}, this run has \{\}"),
    ],
)
def test_answers_under_other_settings_are_not_mixed(tmp_path, source, settings, says):
    write(tmp_path / "out", record(next(read_lines(source))))
    with pytest.raises(UserError, match=f"was written with {says}"):
        pending(tmp_path / "out", source, settings=settings)


def test_a_line_that_is_there_twice_is_noticed(tmp_path, source):
    first = record(next(read_lines(source)))
    write(tmp_path / "out", first, first)
    with pytest.raises(UserError, match="line 1 twice"):
        pending(tmp_path / "out", source)


@pytest.mark.parametrize(
    "content", ["a diary", "a diary\n", '{"messages": []}\n', "[1]\n", '{"line": 0, "input": 1}\n']
)
def test_a_file_of_someone_else_is_left_alone(tmp_path, source, content):
    path = tmp_path / "out"
    path.write_text(content)
    with pytest.raises(UserError, match="is not the output of a batch run"):
        pending(path, source)
    assert path.read_text() == content


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        Output(tmp_path / "none" / "out")
