"""A server of a checkpoint whose chat template thinks and calls tools: what `serve` makes of that by itself."""

import asyncio
import json
import shutil
from collections.abc import Iterator

import httpx
import jsonschema
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from serving import Server, running_server
from v1_templates import A13B

from hunyuan_vllm import demo

pytestmark = pytest.mark.server
CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["京都", "Paris"]},
        "days": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
QUESTION = {"role": "user", "content": "Why is sea water salty?"}
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
# Within the bounds of a request, and half a minute of work for the compiler.
SLOW_GRAMMAR = "".join(
    f"r{rule} ::= {' '.join(f'[^{letter}]?' for letter in 'abcdefgh')} r{rule + 1}\n" for rule in range(16)
)
SLOW_GRAMMAR = f'root ::= r0\n{SLOW_GRAMMAR}r16 ::= "x"\n'
HOT = {"temperature": 1.5, "top_p": 1.0, "max_tokens": 200}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, which was not trained to think, with a template of the family that does."""
    directory = shutil.copytree(demo.path(), tmp_path_factory.mktemp("models") / "thinking")
    (directory / "chat_template.jinja").write_text(A13B)
    with running_server(str(directory), "--max-model-len", "2048") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


def ask(client: OpenAI, *messages: dict, **options):
    return client.chat.completions.create(model="hunyuan", messages=[QUESTION, *messages], **(HOT | options))


def arguments_of(chunks: list) -> tuple[str, str]:
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert len(calls) > 2 and {call.index for call in calls} == {0}
    return calls[0].function.name, "".join(call.function.arguments or "" for call in calls)


@pytest.mark.parametrize("seed", [1, 2])
def test_without_thinking_a_grammar_holds_from_the_first_token(client: OpenAI, seed: int) -> None:
    answer = ask(client, response_format=FORM, seed=seed, extra_body=OFF)
    jsonschema.validate(json.loads(answer.choices[0].message.content), CITY)
    responded = client.responses.create(
        model="hunyuan", input="?", text={"format": {"type": "json_schema", "name": "city", "schema": CITY}},
        extra_body=OFF, temperature=1.5, max_output_tokens=200,
    )  # fmt: skip
    jsonschema.validate(json.loads(responded.output_text), CITY)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_asked_for_comes(client: OpenAI, choice) -> None:
    options = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "extra_body": OFF}
    (call,) = ask(client, **options).choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), CITY)
    name, arguments = arguments_of([*ask(client, stream=True, **options)])
    assert name == "weather"
    jsonschema.validate(json.loads(arguments), CITY)
    done = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 °C"}
    assert ask(client, done, result, tools=TOOLS, extra_body=OFF).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_holds_where_the_budget_ends_thinking(client: OpenAI, stream: bool) -> None:
    begun = {"role": "assistant", "content": "<think>\nSalt"}
    # At least 12 tokens, for this model may end its turn before it has thought for 6.
    bounds = {"thinking_token_budget": 6, "min_tokens": 12}
    answer = ask(client, begun, response_format=FORM, stream=stream, extra_body=bounds)
    messages = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    reasoning = "".join(getattr(message, "reasoning", None) or "" for message in messages)
    assert reasoning == "".join(getattr(message, "reasoning_content", None) or "" for message in messages)
    assert reasoning and "think>" not in reasoning
    jsonschema.validate(json.loads("".join(message.content or "" for message in messages)), CITY)


async def test_a_slow_grammar_of_one_client_does_not_stall_another(server: Server) -> None:
    plain = {"model": "hunyuan", "prompt": "1", "max_tokens": 4}

    async def post(client: AsyncOpenAI, body: dict[str, object]) -> int:
        return (await client.post("/completions", body=body, cast_to=httpx.Response)).status_code

    async def is_answered_meanwhile(one: AsyncOpenAI, other: AsyncOpenAI, grammar: str) -> bool:
        compiling = asyncio.create_task(post(one, {**plain, "structured_outputs": {"grammar": grammar}}))
        await asyncio.sleep(0.2)  # the grammar reaches the engine first
        assert await post(other, plain) == 200
        overtaken = not compiling.done()
        try:
            await compiling
        except BadRequestError as refused:
            assert "took too long to compile" in refused.message
        return overtaken

    one, other = (AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) for _ in range(2))
    async with one, other:
        for client in (one, other):
            await post(client, plain)  # a client's first request takes it long
        for attempt in "xyz":  # on a busy machine this process may itself be late
            if await is_answered_meanwhile(one, other, SLOW_GRAMMAR.replace('"x"', f'"{attempt}"')):
                return
    pytest.fail("the other client was answered only after the grammar was compiled")
