"""`serve --tools` for Hunyuan-Large, whose own template has no tools: asked with OpenAI's SDK."""

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI
from serving import running_server

pytestmark = pytest.mark.server
SALT = [{"role": "user", "content": "Why is sea water salty?"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with running_server("--max-model-len", "1024", "--tools") as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, messages: list = SALT, **options):
    options = {"model": "hunyuan", "temperature": 0, "max_tokens": 100} | options
    return client.chat.completions.create(messages=messages, **options)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_by_the_models_choice(client: OpenAI, stream: bool) -> None:
    call = '{"name": "weather", "arguments": {"city": "Paris"}}'
    # The demo model knows no tools: this makes it call one.
    constraint = {"structured_outputs": {"choice": [f"<tool_call>{call}</tool_call>"]}}
    given = ask(client, tools=[WEATHER], tool_choice="auto", extra_body=constraint, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in given if chunk.choices]
        last = choices[-1]  # with text of its own where several tokens came at once
        calls = [called.function for choice in choices for called in choice.delta.tool_calls or ()]
        assert not any(choice.delta.content for choice in choices)
    else:
        (last,) = given.choices
        calls = [called.function for called in last.message.tool_calls]
        assert not last.message.content
    assert [called.name for called in calls if called.name] == ["weather"]
    assert json.loads("".join(called.arguments or "" for called in calls)) == {"city": "Paris"}
    assert last.finish_reason == "tool_calls"


def test_definitions_calls_and_results_are_in_the_prompt(client: OpenAI) -> None:
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "18 degrees"}

    def tokens(messages, **options) -> int:
        return ask(client, messages, max_tokens=1, **options).usage.prompt_tokens

    plain, with_tools = tokens(SALT), tokens(SALT, tools=[WEATHER], tool_choice="auto")
    assert with_tools > plain + 50
    with_call = tokens([*SALT, called, *SALT], tools=[WEATHER], tool_choice="auto")
    assert with_call > with_tools + plain
    with_result = tokens([*SALT, called, result], tools=[WEATHER], tool_choice="auto")
    assert with_result > tokens([*SALT, called, {**result, "content": ""}], tools=[WEATHER], tool_choice="auto")
