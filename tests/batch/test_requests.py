"""From a line to a request: every form, the defaults, and the field that each mistake is said to be in."""

import json

import pytest

from hunyuan_vllm.batch.requests import BadLine, Index, Request, build, index_file, read_requests
from hunyuan_vllm.util.jsonl import Line

HELLO = [{"role": "user", "content": "Hello"}]


def batch_api(**changes) -> dict:
    whole = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": HELLO}} | changes
    return {name: value for name, value in whole.items() if value is not None}


def built(given, number=1, **defaults):
    body = build(Line(number, given), defaults).body
    return vars(body)


def test_forms():
    assert built({"messages": HELLO, "id": 3, "top_k": 5})["top_k"] == 5
    assert built({"prompt": "a", "custom_id": "x"})["prompt"] == "a"
    assert built({"prompt": [1, 2, 3]})["prompt"] == [1, 2, 3]
    assert built(batch_api())["messages"] == HELLO
    assert built(batch_api(url="/v1/completions", body={"prompt": "a"}, method=None))["prompt"] == "a"


def test_a_line_wins_over_the_defaults_and_null_does_not():
    defaults = {"temperature": 0.5, "max_tokens": 9, "stop": ["x"]}
    ours = built({"messages": HELLO, "temperature": 0, "max_tokens": None}, **defaults)
    assert (ours["temperature"], ours["max_tokens"], ours["stop"]) == (0, 9, ["x"])


def test_a_plain_prompt_is_not_cut_after_16_tokens():
    assert built({"prompt": "a"})["max_tokens"] is None
    assert built({"prompt": "a"}, max_tokens=5)["max_tokens"] == 5
    assert built(batch_api(url="/v1/completions", body={"prompt": "a"}))["max_tokens"] == 16


def test_every_line_has_its_own_seed():
    assert [built({"prompt": "a"}, number, seed=100)["seed"] for number in (1, 2)] == [101, 102]
    assert built({"prompt": "a", "seed": 100}, 2, seed=100)["seed"] == 100


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        ({"messages": HELLO, "temperature": -1}, "temperature", "non-negative"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature", 'valid number.*not "hot"'),
        ({"messages": HELLO, "top_p": 2}, "top_p", "top_p must be in"),
        ({"messages": HELLO, "n": 0}, "n", "at least 1"),
        ({"messages": HELLO, "max_tokens": -5}, "max_tokens", "at least 1"),
        ({"messages": HELLO, "max_completion_tokens": 20, "min_tokens": 30}, "min_tokens", "max_tokens=20"),
        ({"messages": HELLO, "stop_token_ids": ["a"]}, "stop_token_ids.0", "valid integer"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": "x"}, "top_logprobs", "integer"),
        ({"messages": HELLO, "temprature": 1}, "temprature", "temperature is"),
        ({"messages": HELLO, "stream": True}, "stream", "does not stream"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": None}, "messages", "list|required"),
        ({"messages": [*HELLO, {"content": "x"}]}, "messages.1.role", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string.*not 5"),
        ({"prompt": 5}, "prompt", "string.*not 5"),
        ({"prompt": "a", "messages": HELLO}, "messages", "both"),
        ({"text": "a"}, "messages", "neither"),
        ([1], None, "not a JSON object"),
        (batch_api(custom_id=None), "custom_id", "required"),
        (batch_api(custom_id=5), "custom_id", "string.*not 5"),
        (batch_api(method="GET"), "method", "'POST'.*GET"),
        (batch_api(url="/v1/embeddings"), "url", "'/v1/chat/completions' or '/v1/completions'.*embeddings"),
        (batch_api(body=[]), "body", "object"),
        (batch_api(body={"messages": HELLO, "top_k": "x"}), "top_k", "integer"),
        (batch_api(extra=1), "extra", "not permitted"),
    ],
)
def test_a_mistake_is_named_with_its_field(given, field, says):
    with pytest.raises(BadLine, match=says) as caught:
        built(given)
    assert caught.value.problem.field == field
    assert field is None or field in str(caught.value)


def test_a_reasonable_limit_is_not_a_mistake():
    assert built({"messages": HELLO, "max_completion_tokens": 20, "min_tokens": 10})["min_tokens"] == 10
    assert built({"messages": HELLO, "min_tokens": 10})["min_tokens"] == 10


def test_only_pending_lines_and_each_id_once(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [{"prompt": "a", "id": "x"}, {"prompt": "b"}, {"prompt": "c", "id": "x"}, {"prompt": "d"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    index: Index = index_file(path)
    found = list(read_requests(path, index, {}, bytearray([0, 1, 0, 1])))
    assert [line.number for line, _ in found] == [1, 3]
    assert isinstance(found[0][1], Request)
    assert "'x' is also that of line 1" in str(found[1][1])
