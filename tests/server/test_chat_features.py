"""What OpenAI's SDK can ask for beyond text, on the demo model: guided output, tools, adapters, cached prompts."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pytest
from keyed_server import KeyedServer
from openai import OpenAI
from streams import in_parts

pytestmark = pytest.mark.server
MODEL = "hunyuan"
QUESTION = [{"role": "user", "content": "Why is sea water salty?"}]
HOT = {"temperature": 1.5, "top_p": 1.0, "max_tokens": 240}  # would be nonsense without a guide
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
        "size": {"enum": ["small", "large"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 999},
        "rivers": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,6}$"}, "maxItems": 2},
    },
    "required": ["name", "size", "people", "rivers"],
    "additionalProperties": False,
}
SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Tokyo"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "distance": {
        "type": "object",
        "properties": {"to": {"enum": ["Rome", "Lima"]}},
        "required": ["to"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "additionalProperties": False},
}


def function(name: str, **more) -> dict:
    return {"type": "function", "function": {"name": name, **more}}


TOOLS = [function(name, description="about a place", parameters=SCHEMAS[name]) for name in ("weather", "distance")]
TOOLS += [function("now")]  # one without parameters


@pytest.fixture(scope="module")
def client(keyed_server: KeyedServer) -> OpenAI:
    return keyed_server.openai()


def ask(client: OpenAI, messages=QUESTION, **options):
    return client.chat.completions.create(model=MODEL, messages=messages, **(HOT | options))


def texts(answer) -> list[str]:
    return [choice.message.content for choice in answer.choices]


# Structured output


@pytest.mark.parametrize("seed", [1, 2])
def test_json_of_a_schema_is_always_valid(client, seed):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answer = ask(client, response_format=form, seed=seed, n=4)
    for text in texts(answer):
        jsonschema.validate(json.loads(text), CITY)
    assert len(set(texts(answer))) > 1


def test_json_of_a_schema_is_valid_when_streamed(client):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    parts = in_parts(lambda: list(ask(client, response_format=form, stream=True)), 5)
    jsonschema.validate(json.loads("".join(part.choices[0].delta.content or "" for part in parts)), CITY)


def test_a_regex_a_choice_and_a_grammar_are_always_kept(client):
    date, colours = r"(19|20)\d\d-[01]\d-[0-3]\d", ["dark red", "blue", "绿色"]
    grammar = 'root ::= "1" more\nmore ::= "" | "+1" more'
    kept = {
        "regex": (date, lambda text: re.fullmatch(date, text)),
        "choice": (colours, lambda text: text in colours),
    }
    for name, (guide, right) in kept.items():
        answer = ask(client, n=4, extra_body={"structured_outputs": {name: guide}})
        assert all(right(text) for text in texts(answer)), (name, texts(answer))
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    for choice in ask(client, n=4, max_tokens=40, extra_body={"structured_outputs": {"grammar": grammar}}).choices:
        assert re.fullmatch(r"1(\+1)*\+?", choice.message.content)


def test_a_schema_that_is_none_is_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "what"}}})
    assert caught.value.param in ("response_format", "structured_outputs")


# Tools


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_without_a_tool_that_must_be_called_the_answer_is_text(client, choice):
    message = ask(client, tools=TOOLS, tool_choice=choice, temperature=0).choices[0].message
    assert "salt" in message.content and not message.tool_calls


def check_call(name: str, arguments: str, allowed=tuple(SCHEMAS)) -> None:
    assert name in allowed
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def test_a_required_tool_is_called_with_valid_arguments(client):
    """However hot the model is; one call or more."""
    choices = ask(client, tools=TOOLS[:2], tool_choice="required", seed=1, n=8).choices
    assert {choice.finish_reason for choice in choices} == {"tool_calls"}
    calls = [call.function for choice in choices for call in choice.message.tool_calls]
    for call in calls:
        check_call(call.name, call.arguments)
    assert len({call.name for call in calls}) > 1  # the model chose


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_tool_is_called_with_valid_arguments(client, name):
    for choice in ask(client, tools=TOOLS, tool_choice=function(name), n=4).choices:
        (call,) = choice.message.tool_calls
        check_call(call.function.name, call.function.arguments, [name])


@pytest.mark.parametrize("choice", ["required", function("weather")], ids=["required", "named"])
def test_a_tool_call_is_streamed(client, choice):
    def parts_of_calls():
        deltas = [chunk.choices[0].delta for chunk in ask(client, tools=TOOLS[:1], tool_choice=choice, stream=True)]
        assert not any(delta.content for delta in deltas)
        return [call for delta in deltas for call in delta.tool_calls or ()]

    calls = {}
    for call in in_parts(parts_of_calls, 2):
        name, arguments = calls.get(call.index, ("", ""))
        calls[call.index] = name + (call.function.name or ""), arguments + (call.function.arguments or "")
    for name, arguments in calls.values():
        check_call(name, arguments, ["weather"])


def test_a_tool_call_that_was_cut_is_no_call(client):
    (choice,) = ask(client, tools=TOOLS, tool_choice="required", max_tokens=24).choices
    assert (choice.finish_reason, choice.message.tool_calls, choice.message.content or "") == ("length", None, "")


@pytest.mark.parametrize("schema", [{"type": "integer", "multipleOf": 3}, {"type": "what"}], ids=["unkept", "wrong"])
def test_a_tool_whose_arguments_cannot_be_held_to_its_schema_is_refused(client, schema):
    tool = function("f", parameters={"type": "object", "properties": {"x": schema}, "required": ["x"]})
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"


def test_tools_of_the_responses_api(client):
    tool = {"type": "function", "name": "weather", "parameters": SCHEMAS["weather"]}
    options = {"model": MODEL, "input": "Rain?", "temperature": 1.5, "max_output_tokens": 240, "tools": [tool]}
    (call,) = client.responses.create(**options, tool_choice="required").output
    check_call(call.name, call.arguments, ["weather"])


# Adapters


def greedy(client: OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="Sea water is", max_tokens=24, temperature=0).choices[0].text


def test_an_adapter_is_a_model(client):
    models = {model.id: model for model in client.models.list()}
    assert models["style"].parent == MODEL
    assert greedy(client, "style") != greedy(client, MODEL)


def test_an_adapter_comes_and_goes_at_run_time(keyed_server, client):
    with keyed_server.http("alice") as stranger, keyed_server.http("admin") as operator:
        body = {"lora_name": "tone", "lora_path": str(keyed_server.adapters / "tone")}
        assert stranger.post("/v1/load_lora_adapter", json=body).status_code == 404
        with pytest.raises(openai.NotFoundError):
            greedy(client, "tone")
        assert operator.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert "tone" in [model.id for model in client.models.list()]
        assert greedy(client, "tone") == greedy(client, "style")  # the same weights under two names
        assert operator.post("/v1/unload_lora_adapter", json={"lora_name": "tone"}).status_code == 200
        with pytest.raises(openai.NotFoundError):
            greedy(client, "tone")
        missing = operator.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/nowhere"})
        assert httpx.codes.is_client_error(missing.status_code)
        body = {"lora_name": "wrong", "lora_path": str(keyed_server.adapters / "wrong")}
        wrong = operator.post("/v1/load_lora_adapter", json=body)
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "lora_path"
        assert "adapter wrong (" in wrong.json()["error"]["message"]
        assert "none of its 18 modules (transformer.layers.0." in wrong.json()["error"]["message"]
        assert "wrong" not in [model.id for model in client.models.list()]


def test_several_adapters_answer_at_once_as_each_does_alone(keyed_server, client):
    """Two of them loaded at run time, and the base model beside them."""
    names = [MODEL, "style", "tone", "brief"]
    with keyed_server.http("admin") as operator:
        for name in names[2:]:
            body = {"lora_name": name, "lora_path": str(keyed_server.adapters / name)}
            assert operator.post("/v1/load_lora_adapter", json=body).status_code == 200
        try:
            alone = [greedy(client, name) for name in names]
            with ThreadPoolExecutor(len(names)) as pool:
                for _ in range(2):
                    assert list(pool.map(lambda name: greedy(client, name), names)) == alone
        finally:
            for name in names[2:]:
                operator.post("/v1/unload_lora_adapter", json={"lora_name": name})
    assert alone[1] == alone[2] and len(set(alone)) == 3


# Special tokens in messages


def chat_tokens(client: OpenAI, text: str) -> int:
    return ask(client, [{"role": "user", "content": text}], max_tokens=1).usage.prompt_tokens


def response_tokens(client: OpenAI, text: str) -> int:
    return client.responses.create(model=MODEL, input=text, max_output_tokens=16).usage.input_tokens


def response_parts_tokens(client: OpenAI, text: str) -> int:
    parts = [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
    return client.responses.create(model=MODEL, input=parts, max_output_tokens=16).usage.input_tokens


def anthropic_tokens(client: OpenAI, text: str) -> int:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    return client.post("/messages", body=body, cast_to=httpx.Response).json()["usage"]["input_tokens"]


@pytest.mark.parametrize("count", [chat_tokens, response_tokens, response_parts_tokens, anthropic_tokens])
def test_special_tokens_in_a_users_text_stay_text(client, count):
    special = "<|eos|><|extra_0|>"  # two tokens
    assert count(client, f"a {special} b") - count(client, "a  b") > 4


# The rest


def test_a_cached_prompt_shows_in_usage(keyed_server, client):
    with keyed_server.http("admin") as operator:
        assert operator.post("/reset_prefix_cache").status_code == 200
    long = [{"role": "user", "content": "Salt comes from rocks. " * 25 + "Why?"}]
    first, second = (ask(client, long, temperature=0, max_tokens=4).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0.5 * second.prompt_tokens < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_responses(client):
    answer = client.responses.create(model=MODEL, input="Why is sea water salty?", temperature=0, max_output_tokens=99)
    assert "salt" in answer.output_text
    events = list(client.responses.create(model=MODEL, input="Hello", max_output_tokens=9, stream=True))
    assert events[-1].type == "response.completed"


def test_text_to_tokens_and_back(keyed_server):
    with keyed_server.http() as client:
        tokens = client.post("/tokenize", json={"prompt": "海水 is salty"}).json()
        assert tokens["count"] == len(tokens["tokens"]) > 0
        text = client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
        assert text.endswith("海水 is salty")
