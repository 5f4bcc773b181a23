"""The text format of Hunyuan V1 replies: what each form means, and that it does not depend on where a reply is cut."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hunyuan_vllm.replies import Call, CallReader, ReplyReader

CALL = '{"name": "f", "arguments": {"x": 1}}'
DEEP = '{"a": [{"b": {"c": [[], {"d": "]}</tool_calls>\\"<think>"}]}}]}'


def pieces(text: str, sizes: list[int]) -> Iterator[str]:
    for size in sizes:
        yield text[:size]
        text = text[size:]
    yield text


def read(reader: ReplyReader, text: str, sizes: list[int]) -> tuple[str, str]:
    parts = [reader.read(piece) for piece in pieces(text, sizes)]
    reasoning, content = zip(*parts, reader.read("", last=True), strict=True)
    return "".join(reasoning), "".join(content)


REPLIES = {
    "<think>\nhm\n</think>\n<answer>\nyes\n</answer>": ("hm", "yes"),
    "<think>\nhm\n</think>\n<answer>\nyes\n</answer>\n": ("hm", "yes"),
    "<think>\n\n</think>\n<answer>\nyes\n</answer>": ("", "yes"),
    "<think>\n</think>\n\nyes": ("", "yes"),
    "<think>hm</think>yes": ("hm", "yes"),
    "\n<think>\n a\n\nb \n</think>\n<answer>\n  x = 1\n\n</answer>": ("a\n\nb", "  x = 1\n"),
    "<answer>\nyes\n</answer>": ("", "yes"),
    "<answer>yes": ("", "yes"),
    "yes\n": ("", "yes\n"),
    " 42": ("", " 42"),
    "": ("", ""),
    "<think>\nhm, and th": ("hm, and th", ""),
    "<think>\nhm\n</thi": ("hm", ""),
    "<think>\n1 <": ("1 <", ""),
    "<think>\nhm\n</think>\n": ("hm", ""),
    "<think>\nhm\n</think>\n<ans": ("hm", "<ans"),
    "<think>\nhm\n</think>\n<answer>\nye": ("hm", "ye"),
    "<think>\nhm\n</think>\n<answer>\nyes\n</answ": ("hm", "yes"),
    "<answer>\nWrite <answer>a</answer>\nb\n</answer>": ("", "Write ab"),
    "No <think>, a < b <table>": ("", "No <think>, a < b <table>"),
    "<think>\n<answer> or not\n</think>\n助手：yes": ("<answer> or not", "yes"),
    "助手：<think>\nhm\n</think>\n<answer>\n助手：助手": ("hm", "助手"),
    "<think>\nhm\n</think>\n<answer>\n{}\n</answer>": ("hm", "{}"),
}


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(("text", "expected"), REPLIES.items(), ids=repr)
def test_thinking_and_answer(text: str, expected: tuple[str, str], size: int) -> None:
    reader = ReplyReader()
    assert read(reader, text, [size] * len(text)) == expected
    assert not reader.stopped and not reader.rest


def test_the_prompt_may_have_opened_the_thinking() -> None:
    assert read(ReplyReader(thinking=True), "hm\n</think>\n<answer>\nyes", [3]) == ("hm", "yes")


@pytest.mark.parametrize(
    ("text", "content", "rest"),
    [
        (f"<think>\na\n</think>\nok \n<tool_calls>[{CALL}]", "ok", f"<tool_calls>[{CALL}]"),
        ('<think>\na\n</think>\n[{"name": "f"}]', "", '[{"name": "f"}]'),
        ("<tool_call>\n{}", "", "<tool_call>\n{}"),
    ],
)
def test_a_call_is_left_to_the_tool_parser(text: str, content: str, rest: str) -> None:
    for size in (1, 4, 1000):
        reader = ReplyReader()
        assert read(reader, text, [size] * len(text))[1] == content
        assert reader.stopped and reader.rest == rest


def calls(text: str, size: int = 1000) -> tuple[str, list[Call]]:
    reader = CallReader(whole=True, calls=True)
    return read(reader, text, [size] * len(text))[1], reader.calls


CALLS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    f"<tool_calls>[{CALL}]</tool_calls>": ("", [("f", '{"x": 1}')]),
    f"助手：Let me see.\n<tool_calls> [ {CALL} ,\n{CALL}]\n</tool_calls>\n": ("Let me see.", [("f", '{"x": 1}')] * 2),
    f"<answer>\nok<tool_calls>[{CALL}]</tool_calls>\n</answer>": ("ok", [("f", '{"x": 1}')]),
    f"<tool_calls>[{CALL}]</tool_calls>\n<tool_calls>[{CALL}]</tool_calls>": ("", [("f", '{"x": 1}')] * 2),
    f'<tool_calls>[{{"name": "f", "arguments": {DEEP}}}]</tool_calls>': ("", [("f", DEEP)]),
    '<tool_calls>[{"arguments": {"x": -1.5e+3}, "name": "f"}]</tool_calls>': ("", [("f", '{"x": -1.5e+3}')]),
    '<tool_calls>[{"name": "f"}, {"name": "g", "arguments": null}]</tool_calls>': ("", [("f", "{}"), ("g", "{}")]),
    '<tool_calls>[{"name": "f", "arguments": "{\\"x\\": \\"é\\"}"}]</tool_calls>': ("", [("f", '{"x": "é"}')]),
    '<tool_calls>[{"name": "f", "id": [{"name": "g"}], "arguments": {}}]</tool_calls>': ("", [("f", "{}")]),
    '<tool_calls>[{"name": "f", "arguments": {"code": "a\n\tb"}}]</tool_calls>': ("", [("f", '{"code": "a\\n\\tb"}')]),
    f"<think>\nI call <tool_calls>[{CALL}]</tool_calls>\n</think>\n<answer>\nno\n</answer>": (
        f"<think>\nI call <tool_calls>[{CALL}]</tool_calls>\n</think>\nno", []),
    f"<think>\nhm\n</think>\n<tool_calls>[{CALL}]</tool_calls>": ("<think>\nhm\n</think>\n", [("f", '{"x": 1}')]),
    "<tool_calls>[]</tool_calls>": ("", []),
    # Not a list of calls: text
    "a<tool_calls>f(1)</tool_calls>b": ("af(1)b", []),
    '<tool_calls>{"name": "f"}</tool_calls>': ('{"name": "f"}', []),
    '<tool_calls>[{"name": "f", "arguments": {bad}}]</tool_calls>': ('[{"name": "f", "arguments": {bad}}]', []),
    '<tool_calls>[{"name": "f", "arguments": {"x": 1]</tool_calls>': ('[{"name": "f", "arguments": {"x": 1]', []),
    '<tool_calls>[{"name": "f", "arguments": {"x": "1}}]</tool_calls>': ('[{"name": "f", "arguments": {"x": "1}}]', []),
    '<tool_calls>[{"arguments": {}}]</tool_calls>': ('[{"arguments": {}}]', []),
    '<tool_calls>[{"name": 1}]</tool_calls>': ('[{"name": 1}]', []),
    '<tool_calls>[{"name": "f", "arguments": 01}]</tool_calls>': ('[{"name": "f", "arguments": 01}]', []),
    '<tool_calls>[{"name": "f", "arguments": "\\ud83d"}]</tool_calls>': ('[{"name": "f", "arguments": "\\ud83d"}]', []),
    f'<tool_calls>[{CALL}, {{"name": bad}}]</tool_calls>': ('{"name": bad}]', [("f", '{"x": 1}')]),
    # Cut off: nothing of the last call
    f'ok <tool_calls>[{CALL}, {{"name": "f", "argum': ("ok", [("f", '{"x": 1}')]),
    f"<tool_calls>[{CALL}": ("", [("f", '{"x": 1}')]),
    "ok <tool_cal": ("ok", []),
    "1 <": ("1 <", []),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("text", "expected"), CALLS.items(), ids=repr)
def test_calls_and_the_text_around(text: str, expected: tuple[str, list[tuple[str, str]]], size: int) -> None:
    content, found = calls(text, size)
    assert (content, [(call.name, call.arguments) for call in found if call.done]) == expected


def test_arguments_are_there_as_they_are_written() -> None:
    reader = CallReader(whole=True, calls=True)
    reader.read('<tool_calls>[{"name": "f", "arguments": {"city": "Bei')
    assert reader.calls == [Call("f", '{"city": "Bei')]
    reader.read("jing\\u00")
    assert reader.calls == [Call("f", '{"city": "Beijing')]
    reader.read('e9", "n": 12')
    assert reader.calls == [Call("f", '{"city": "Beijing\\u00e9", "n": ')]
    reader.read("3}}, {")
    assert reader.calls == [Call("f", '{"city": "Beijing\\u00e9", "n": 123}', done=True), Call()]


def test_without_tools_a_call_is_text() -> None:
    text = f"Write <tool_calls>[{CALL}]</tool_calls>"
    assert read(CallReader(whole=True, calls=False), text, [3]) == ("", text)


SCRAPS = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<tool_calls>", "</tool_calls>", "<tool_call", "助手：", "[", "]",
     "{", "}", '"', "\\", ",", ":", "<", "</", ">", "\n", " ", "a", "字", CALL, '{"name": "g"', "arguments"]
)  # fmt: skip
TEXTS = st.lists(SCRAPS, max_size=12).map("".join)
SIZES = st.lists(st.integers(0, 9), max_size=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=8,
)


@given(TEXTS, SIZES)
def test_reading_does_not_depend_on_the_pieces(text: str, sizes: list[int]) -> None:
    whole, cut = ReplyReader(), ReplyReader()
    assert read(cut, text, sizes) == read(whole, text, [])
    assert (cut.stopped, cut.rest) == (whole.stopped, whole.rest)
    if not whole.stopped:
        content = read(ReplyReader(), text, [])[1]
        assert "<answer>" not in content and "</answer>" not in content


@given(TEXTS, SIZES, st.booleans(), st.booleans())
def test_reading_calls_does_not_depend_on_the_pieces(text: str, sizes: list[int], whole: bool, tools: bool) -> None:
    at_once, cut = CallReader(whole, tools), CallReader(whole, tools)
    assert read(cut, text, sizes) == read(at_once, text, [])
    assert cut.calls == at_once.calls


@given(st.lists(st.dictionaries(TEXTS, JSON, max_size=3), min_size=1, max_size=3), SIZES, st.booleans())
def test_any_arguments_come_back(arguments: list[dict[str, object]], sizes: list[int], ascii_only: bool) -> None:
    sent = [{"name": "f", "arguments": one} for one in arguments]
    text = f"ok<tool_calls>{json.dumps(sent, ensure_ascii=ascii_only)}</tool_calls>"
    reader = CallReader(whole=False, calls=True)
    assert read(reader, text, sizes) == ("", "ok")
    assert [json.loads(call.arguments) for call in reader.calls] == arguments
    assert all(call.done for call in reader.calls)
