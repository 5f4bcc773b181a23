"""What a request may ask the engine to prepare, and what is refused by name."""

from typing import Any

import pytest

from hunyuan_vllm.server.middleware.bounds import check_bounds
from hunyuan_vllm.server.middleware.fields import Refused

RULES = "root ::= r0\n" + "\n".join(f'r{i} ::= r{i + 1} | "a{i}"' for i in range(2000)) + '\nr2000 ::= "x"'


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a"]}
    return schema


def lengths(least: int, fields: int) -> dict[str, Any]:
    texts = {f"f{i}": {"type": "string", "maxLength": least + i} for i in range(fields)}
    return {"type": "object", "properties": texts}


def tool(schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


@pytest.mark.parametrize(
    ("request_", "field", "limit"),
    [
        ({"structured_outputs": {"grammar": RULES}}, "structured_outputs.grammar", "16384"),
        ({"structured_outputs": {"regex": "abc" * 60_000}}, "structured_outputs.regex", "8192"),
        ({"structured_outputs": {"regex": "(a?b?)" * 100}}, "structured_outputs.regex", "128"),
        ({"structured_outputs": {"regex": "a{0,3}" * 129}}, "structured_outputs.regex", "128"),
        ({"structured_outputs": {"regex": "(a?b?)" * 33}}, "structured_outputs.regex", "64"),
        ({"structured_outputs": {"regex": "[^a]?" * 17}}, "structured_outputs.regex", "16"),
        ({"structured_outputs": {"grammar": "root ::= " + "[^a]? " * 17}}, "structured_outputs.grammar", "16"),
        ({"structured_outputs": {"json": lengths(100, 6)}}, "structured_outputs.json", "512"),
        ({"text": {"schema": {"pattern": ".{200}.{201,}.{1,202}.{,203}.{" + "9" * 5000 + "}"}}}, "text", "512"),
        ({"structured_outputs": {"choice": ["x"] * 1025}}, "structured_outputs.choice", "1024"),
        ({"structured_outputs": {"choice": ["x" * 1024] * 65}}, "structured_outputs.choice", "65536"),
        ({"structured_outputs": {"json": nested(10)}}, "structured_outputs.json", "65536"),
        ({"structured_outputs": {"json": '{"pattern": "' + "a?" * 129 + '"}'}}, "structured_outputs.json", "128"),
        ({"structured_outputs": {"structural_tag": "x" * 70_000}}, "structured_outputs.structural_tag", "65536"),
        ({"response_format": {"json_schema": {"schema": nested(10)}}}, "response_format", "65536"),
        ({"response_format": {"schema": {"patternProperties": {"a?" * 129: {}}}}}, "response_format", "128"),
        ({"text": {"format": {"schema": {"enum": ["x" * 10] * 6000}}}}, "text", "65536"),
        ({"tools": [tool({}), tool(nested(10))]}, "tools.1", "65536"),
        ({"tools": [tool(nested(9))] * 7}, "tools", "262144"),
        ({"stop": ["x"] * 65}, "stop", "64"),
        ({"stop": ["x" * 1025]}, "stop", "1024"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences", "64"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "1024"),
        ({"bad_words": ["x"] * 1025}, "bad_words", "1024"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
    ],
)  # fmt: skip
def test_what_is_beyond_a_bound_is_refused_by_name(request_: dict[str, Any], field: str, limit: str) -> None:
    with pytest.raises(Refused, match=f"at most {limit}$") as refused:
        check_bounds(request_)
    assert refused.value.field == field
    assert refused.value.message.startswith(field)


@pytest.mark.parametrize(
    "request_",
    [
        {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}, "stop": ["a", "b"], "logit_bias": {"1": -100}},
        {"structured_outputs": {"regex": r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2})?", "choice": None}},
        {"structured_outputs": {"regex": "(a?b?)" * 32}},
        {"structured_outputs": {"json": lengths(1000, 4)}, "response_format": lengths(10, 20)},
        {"tools": [tool({"properties": {f"f{i}": {"pattern": ".*", "maxLength": 300} for i in range(60)}})]},
        {"structured_outputs": {"json": nested(5)}, "tools": [tool(nested(3))] * 20},
        {"structured_outputs": 5, "tools": 5, "stop": 5, "response_format": "json", "logit_bias": None, "text": []},
        {"structured_outputs": {"json": "{", "regex": 5, "choice": {"a": 1}, "grammar": []}, "tools": [5, None]},
    ],
)
def test_what_is_within_or_of_a_wrong_type_passes(request_: dict[str, Any]) -> None:
    check_bounds(request_)
