"""Lines of training data: what is accepted, and what is said of the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hunyuan_vllm.train.messages import BadConversation, Conversation, form_of, parse_conversation
from hunyuan_vllm.util.jsonl import parse_line


def system(content: Any = "S") -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any = "u") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "a") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


HUMAN, GPT = {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}


def read(given: Any, number: int = 3) -> Conversation:
    raw = given if isinstance(given, bytes) else json.dumps(given, ensure_ascii=False).encode()
    line = parse_line(number, raw)
    assert line is not None
    return parse_conversation(line)


def test_accepted() -> None:
    read({"messages": [user(), assistant()]})
    read({"messages": [system(""), user(), assistant(), user(), assistant(" \n b")], "id": 7, "source": {"x": 1}})
    joined = read({"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant()]})
    assert joined.messages[0].content == "a\nb"


def test_the_system_prompt_where_there_is_none() -> None:
    plain = read({"messages": [user(), assistant()]})
    assert plain.as_dicts() == [system("You are a helpful assistant."), user(), assistant()]
    assert plain.as_dicts(default_system="") == [user(), assistant()]
    for own in ("S", ""):
        assert read({"messages": [system(own), user(), assistant()]}).as_dicts()[0] == system(own)


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (b'{"messages": [}', "it is not JSON: Expecting value: line 1 column 15 (char 14)"),
        (b"\xff\xfe", "it is not JSON: "),
        ([user(), assistant()], "it is not a JSON object: a line is {"),
        (None, "it is not a JSON object: a line is {"),
        ({"instruction": "x"},
         'it has no "messages", nor the fields of another known form; it has instruction: a line is {'),
        ({}, 'it has no "messages", nor the fields of another known form; it has no field: a line is {'),
        ({"instruction": "x", "output": "y", "prompt": "x", "completion": "y"},
         "it fits two forms, alpaca and prompt-completion: leave the fields of one out"),
        ({"conversations": "x"}, "conversations is not a list"),
        ({"conversations": [{"from": "observation", "value": "x"}]},
         "role of message 1: Input should be 'system', 'user' or 'assistant'"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}, "content of message 1: Field required"),
        ({"conversations": [GPT]}, "message 1 is of the assistant, and it is the user's turn"),
        ({"instruction": "x", "output": None}, "content of message 2: Input should be a valid string"),
        ({"instruction": "x", "input": 3, "output": "y"}, "instruction and input are not texts"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "history is not a list of [question, answer]"),
        ({"prompt": "x", "completion": 1}, "content of message 2: Input should be a valid string"),
        ({"prompt": "x<|eos|>", "completion": "y"}, "content of message 1: it contains <|eos|>"),
        ("\"汉字\"".encode("gb18030"), "it is not JSON: 'utf-8' codec can't decode byte"),
        ({"messages": "Hi"}, "messages: Input should be a valid list"),
        ({"messages": []}, "it has no user and assistant messages"),
        ({"messages": [system()]}, "it has no user and assistant messages"),
        ({"messages": [user(), "Hi"]}, "message 2: Input should be a valid dictionary"),
        ({"messages": [{"role": "user"}, assistant()]}, "content of message 1: Field required"),
        ({"messages": [{"content": "u"}, assistant()]}, "role of message 1: Field required"),
        ({"messages": [user(), {"role": "bot", "content": "a"}]},
         "role of message 2: Input should be 'system', 'user' or 'assistant'"),
        ({"messages": [user(None), assistant()]}, "content of message 1: Input should be a valid string"),
        ({"messages": [user(3), assistant()]}, "content of message 1: Input should be a valid string"),
        ({"messages": [user({"text": "x"}), assistant()]}, "content of message 1: Input should be a valid string"),
        ({"messages": [user([{"type": "image_url"}]), assistant()]},
         'content of message 1: a part is not {"type": "text", "text": "..."}: the model reads text only'),
        ({"messages": [user(), assistant() | {"tool_calls": [{"id": "1"}]}]},
         "tool_calls of message 2: Extra inputs are not permitted"),
        ({"messages": [user(), assistant("a <|eos|> b")]},
         "content of message 2: it contains <|eos|>, which is a special token: remove it"),
        ({"messages": [user("<｜hy_User｜>"), assistant()]}, "content of message 1: it contains <｜hy_User｜>"),
        ({"messages": [user(), system(), assistant()]},
         "message 2 is a system message, which must be the only one and the first"),
        ({"messages": [system(), system(), user(), assistant()]},
         "message 2 is a system message, which must be the only one and the first"),
        ({"messages": [system(), assistant()]}, "message 2 is of the assistant, and it is the user's turn"),
        ({"messages": [user(), user(), assistant()]}, "message 2 is of the user, and it is the assistant's turn"),
        ({"messages": [system(), user(), assistant(), assistant()]},
         "message 4 is of the assistant, and it is the user's turn"),
        ({"messages": [user(), assistant(" \n")]}, "message 2 (assistant) is empty"),
        ({"messages": [user(""), assistant()]}, "message 1 (user) is empty"),
        ({"messages": [user(), assistant() | {"weight": 0}]}, "each answer has weight 0, so nothing is learned"),
        ({"messages": [user(), assistant() | {"weight": 2}]}, "weight of message 2: Input should be 0 or 1"),
        ({"messages": [user(), assistant(), user()]}, "it ends with the user's message: the last"),
    ],
)  # fmt: skip
def test_refused(given: Any, cause: str) -> None:
    with pytest.raises(BadConversation) as error:
        read(given)
    assert str(error.value).startswith(cause)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "messages", "form"),
    [
        ({"conversations": [HUMAN, GPT, HUMAN, GPT], "id": 1}, [user(), assistant(), user(), assistant()], "sharegpt"),
        ({"conversations": [{"from": "system", "value": "S"}, HUMAN, GPT]},
         [system(), user(), assistant()], "sharegpt"),
        ({"conversations": [user(), assistant()], "system": "S"}, [system(), user(), assistant()], "sharegpt"),
        ({"conversations": [HUMAN | {"weight": None}, GPT], "system": ""}, [user(), assistant()], "sharegpt"),
        ({"instruction": "u", "input": "", "output": "a"}, [user(), assistant()], "alpaca"),
        ({"instruction": "u", "input": None, "output": "a", "system": None}, [user(), assistant()], "alpaca"),
        ({"instruction": "u", "input": "v", "output": "a"}, [user("u\nv"), assistant()], "alpaca"),
        ({"instruction": "w", "output": "b", "system": "S", "history": [["u", "a"]]},
         [system(), user(), assistant(), user("w"), assistant("b")], "alpaca"),
        ({"prompt": "u", "completion": "a", "source": "x"}, [user(), assistant()], "prompt-completion"),
        ({"prompt": [system(), user()], "completion": [assistant()]},
         [system(), user(), assistant()], "prompt-completion"),
        ({"messages": [user(), assistant()], "prompt": "p", "completion": "c"}, [user(), assistant()], "messages"),
    ],
)  # fmt: skip
def test_other_forms_are_converted(given: dict[str, Any], messages: list[Any], form: str) -> None:
    assert read(given).as_dicts(default_system="") == messages
    assert form_of(given) == form


def test_fields_of_a_message_that_hold_nothing_are_no_reason_to_refuse_it() -> None:
    nothing = {"name": None, "tool_calls": None, "function_call": {}, "refusal": "", "annotations": []}
    named = {"name": "Ann", "weight": 1}
    conversation = read({"messages": [user() | named, assistant() | nothing]})
    assert conversation.as_dicts(default_system="") == [user(), assistant()]


@pytest.mark.parametrize("start", [b'[{"messages": [', b'[{"instruction": "x", "output": "y"}]'])
def test_a_file_that_is_one_json_array(start: bytes) -> None:
    with pytest.raises(BadConversation, match=r"looks like one JSON array: write one object per line \(jq -c"):
        read(start, number=1)
