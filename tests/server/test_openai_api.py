"""The real server, asked with OpenAI's SDK: answers, streams, log-probabilities, and refusals that name the field."""

import asyncio
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from serving import Server, running_server
from streams import in_parts

from hunyuan_vllm import demo
from hunyuan_vllm.reference import HunYuanForCausalLM

pytestmark = pytest.mark.server
ROOT = Path(__file__).parents[2]
CONTEXT = 256
MODEL = "hunyuan"
SALT = [{"role": "user", "content": "Why is sea water salty?"}]
SALT_ZH = [{"role": "user", "content": "海水为什么是咸的？"}]
OCEANS = [{"role": "user", "content": "Rank the four oceans by area."}]
UNCERTAIN = "..."  # a beginning that the demo model has many continuations for
# Characters of one to four bytes, most of which the demo model's vocabulary can only spell byte by byte.
RARE = "🌊海水咸，𠀋 naïve 👨‍👩‍👧 ok"


@pytest.fixture(scope="module")
def server():
    with running_server("--dtype", "float32", "--max-model-len", str(CONTEXT)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, messages=SALT, **options):
    options = {"model": MODEL, "temperature": 0, "max_tokens": 100} | options
    return client.chat.completions.create(messages=messages, **options)


def complete(client: OpenAI, prompt=UNCERTAIN, **options):
    options = {"model": MODEL, "temperature": 0, "max_tokens": 24} | options
    return client.completions.create(prompt=prompt, **options)


def text_of(answer) -> str:
    return answer.choices[0].message.content


# Answers


def test_the_model_has_its_names(client):
    models = list(client.models.list())
    assert [model.id for model in models][0] == MODEL
    assert models[0].max_model_len == CONTEXT


def test_chat(client):
    answer = ask(client)
    assert "salt" in text_of(answer)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    assert "盐" in text_of(ask(client, SALT_ZH))


def test_a_system_message_and_earlier_turns_reach_the_model(client):
    earlier = [*SALT, {"role": "assistant", "content": "Rivers bring salt."}, {"role": "user", "content": "Hello"}]
    system = [{"role": "system", "content": "You are a helpful assistant."}, *SALT]
    asked = [ask(client, messages, max_tokens=1).usage.prompt_tokens for messages in (SALT, earlier, system)]
    assert asked[0] < asked[1] and asked[0] < asked[2]


def test_completions(client):
    answer = complete(client, ["Water boils at", "The capital of France is"], max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "100" in answer.choices[0].text
    assert answer.choices[1].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


def test_a_prompt_may_be_token_ids(client):
    ids = complete(client, max_tokens=1, extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    assert complete(client, ids).choices[0].text == complete(client).choices[0].text


def test_max_tokens_cuts(client):
    answer = ask(client, max_tokens=5)
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"
    assert text_of(ask(client)).startswith(text_of(answer))


def test_n_answers(client):
    answer = complete(client, n=3, temperature=2.0, top_p=1.0, extra_body={"top_k": 0, "ignore_eos": True})
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 3 * 24


def test_stop_strings(client):
    whole = text_of(ask(client))
    answer = ask(client, stop=["salty", "never"])
    assert text_of(answer) == whole[: whole.index("salty")]
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", "salty")
    kept = ask(client, stop="salty", extra_body={"include_stop_str_in_output": True})
    assert text_of(kept) == whole[: whole.index("salty")] + "salty"


def test_stop_token_ids(client):
    ids = ask(client, extra_body={"return_token_ids": True}).choices[0].token_ids
    at = next(at for at in range(3, len(ids)) if ids[at] not in ids[:at])
    answer = ask(client, extra_body={"stop_token_ids": [ids[at]], "return_token_ids": True})
    assert answer.choices[0].token_ids == ids[: at + 1]
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", ids[at])


def test_a_seed_makes_sampling_repeatable(client):
    def sample(seed: int) -> str:
        return complete(client, seed=seed, temperature=1.5, top_p=1.0, extra_body={"top_k": 0}).choices[0].text

    assert [sample(seed) for seed in (1, 2, 3)] == [sample(seed) for seed in (1, 2, 3)]
    assert len({sample(seed) for seed in range(4)}) == 4


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "repetition_penalty"])
def test_a_sampling_default_is_generation_config_s(client, name):
    value = json.loads((demo.path() / "generation_config.json").read_text())[name]
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    others = neutral | {"temperature": 2.0}  # hot, so that each of the four matters
    del others[name]

    def samples(**sampling) -> list[str]:
        body = {"model": MODEL, "prompt": UNCERTAIN, "max_tokens": 16}
        extra = others | sampling
        return [client.completions.create(**body, seed=seed, extra_body=extra).choices[0].text for seed in range(4)]

    assert samples() == samples(**{name: value})
    assert samples() != samples(**{name: neutral[name]})


def test_eos_comes_from_generation_config(client):
    assert ask(client, max_tokens=200).choices[0].finish_reason == "stop"
    more = ask(client, max_tokens=100, extra_body={"ignore_eos": True})
    assert more.usage.completion_tokens == 100


# Log-probabilities


def test_logprobs_are_the_reference_model_s(client):
    answer = ask(client, max_tokens=16, logprobs=True, top_logprobs=4, extra_body={"return_token_ids": True})
    ids, prompt = answer.choices[0].token_ids, answer.prompt_token_ids
    model = HunYuanForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    content = answer.choices[0].logprobs.content
    assert len(content) == len(ids) == 16
    for entry, token, row in zip(content, ids, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=2e-3)
        assert entry.token == entry.top_logprobs[0].token
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == pytest.approx(row.topk(4).values.tolist(), abs=2e-3)
        assert sum(map(math.exp, tops)) <= 1 + 1e-4
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == text_of(answer)


def test_completion_logprobs(client):
    logprobs = complete(client, logprobs=2, max_tokens=6).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6
    for token, logprob, tops in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(tops) == 2
        assert tops[token] == logprob == max(tops.values())


# Streams


def test_a_chat_stream_is_the_answer_in_parts(client):
    chunks = in_parts(lambda: list(ask(client, stream=True, stream_options={"include_usage": True})), 11)
    *parts, usage = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text_of(ask(client))
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].choices[0].finish_reason == "stop"
    whole = ask(client).usage
    assert usage.choices == [] and usage.usage.prompt_tokens == whole.prompt_tokens
    assert usage.usage.completion_tokens == whole.completion_tokens
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_a_completion_stream_is_the_answer_in_parts(client):
    sampling = {"n": 2, "temperature": 1, "seed": 5}
    parts = list(complete(client, stream=True, **sampling))
    for choice in complete(client, **sampling).choices:
        assert "".join(part.choices[0].text for part in parts if part.choices[0].index == choice.index) == choice.text


def test_logprobs_are_streamed(client):
    parts = ask(client, stream=True, logprobs=True, top_logprobs=1)
    streamed = [
        entry for part in parts for entry in (part.choices[0].logprobs.content if part.choices[0].logprobs else ())
    ]
    whole = ask(client, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in whole], abs=1e-4)


@pytest.mark.parametrize("text", [RARE, RARE[::-1], "🏴󠁧󠁢󠁳󠁣󠁴󠁿‰ÀÉ\u0301か\u3099"])
def test_a_stream_never_shows_half_a_character(client, text):
    constraint = {"extra_body": {"structured_outputs": {"choice": [text]}}, "max_tokens": 200}
    assert text_of(ask(client, **constraint)) == text
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True}, **constraint)
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(deltas) == text
    assert "\ufffd" not in "".join(deltas)
    assert last.usage.completion_tokens > len(deltas) + 5  # tokens that were a part of a character


def test_an_abandoned_stream_does_not_hold_up_the_server(client):
    stream = ask(client, stream=True, max_tokens=200, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert text_of(ask(client, timeout=30))


# Many at a time


async def test_concurrent_requests_get_their_own_answers(server, client):
    questions = [SALT, SALT_ZH, OCEANS]
    alone = [text_of(ask(client, question)) for question in questions]
    stops = [text[len(text) // 2 :][:2] for text in alone]
    stopped_alone = [
        tokens_and_text(ask(client, question, stop=stop)) for question, stop in zip(questions, stops, strict=True)
    ]

    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client_:
        create = client_.chat.completions.create

        async def whole(at: int) -> None:
            assert text_of(await create(messages=questions[at], **OPTIONS)) == alone[at]

        async def streamed(at: int) -> None:
            parts = await create(messages=questions[at], stream=True, **OPTIONS)
            assert "".join([part.choices[0].delta.content or "" async for part in parts]) == alone[at]

        async def stopped(at: int) -> None:
            answer = await create(messages=questions[at], stop=stops[at], **OPTIONS)
            assert tokens_and_text(answer) == stopped_alone[at]

        ways = (whole, streamed, stopped)
        await asyncio.gather(*(way(at) for way in ways for at in range(len(questions)) for _ in range(3)))


def tokens_and_text(answer) -> tuple[int, str]:
    return answer.usage.completion_tokens, text_of(answer)


OPTIONS = {"model": MODEL, "temperature": 0, "max_tokens": 100}


# Refusals

BAD_VALUES = [
    ("temperature", -1),
    ("temperature", "hot"),
    ("temperature", 3),
    ("top_p", 2),
    ("top_p", 0),
    ("top_k", -5),
    ("min_p", 7),
    ("n", 0),
    ("n", "two"),
    ("max_tokens", -5),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", 100_000),
    ("seed", "x"),
    ("seed", 2**70),
    ("stop", 5),
    ("stop", [1]),
    ("stop", ""),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", 5),
    ("stop_token_ids", [10**8]),
    ("repetition_penalty", 0),
    ("presence_penalty", 5),
    ("frequency_penalty", -5),
    ("min_tokens", 200),
    ("logit_bias", {"999999": 1}),
    ("logit_bias", {"a": 1}),
    ("bad_words", [""]),
    ("allowed_token_ids", []),
    ("stream", "maybe"),
    ("stream_options", {"include_usage": True}),
    ("prompt_logprobs", 1000),
    ("response_format", {"type": "xml"}),
    ("structured_outputs", {"regex": "("}),
]
CHAT_ONLY = [
    ("logprobs", 5),
    ("top_logprobs", 5),
    ("messages", []),
    ("messages", "hello"),
    ("messages", None),
    ("messages", [5]),
    ("messages", [{"content": "x"}]),
    ("messages", [{"role": "boss", "content": "x"}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
    ("messages", [{"role": "user", "content": "x y z " * 500}]),
]
COMPLETIONS_ONLY = [
    ("logprobs", 1000),
    ("logprobs", -2),
    ("prompt", None),
    ("prompt", []),
    ("prompt", 5),
    ("prompt", [10**8]),
    ("prompt", [1, "a"]),
    ("prompt", "x y z " * 500),
]


def refused(client: OpenAI, path: str, body: dict) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path, body=body, cast_to=object)
    return caught.value


def assert_names(error: openai.BadRequestError, field: str) -> None:
    assert (error.param or "").split(".")[0] == field
    assert field in error.message
    assert "\n" not in error.message and "validation error" not in error.message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("field", "value"), BAD_VALUES + CHAT_ONLY)
def test_a_bad_chat_request_is_refused_by_its_field(client, field, value, stream):
    body = {"model": MODEL, "messages": SALT, "max_tokens": 5} | ({"stream": True} if stream else {}) | {field: value}
    if field == "stream_options" and stream:
        body["stream_options"] = {"include_usage": "maybe"}
    assert_names(refused(client, "/chat/completions", body), field)


@pytest.mark.parametrize(("field", "value"), BAD_VALUES + COMPLETIONS_ONLY)
def test_a_bad_completion_request_is_refused_by_its_field(client, field, value):
    body = {"model": MODEL, "prompt": UNCERTAIN, "max_tokens": 5, field: value}
    assert_names(refused(client, "/completions", body), field)


def test_too_many_top_logprobs(client):
    error = refused(client, "/chat/completions", {"messages": SALT, "logprobs": True, "top_logprobs": 1000})
    assert_names(error, "top_logprobs")


@pytest.mark.parametrize(("path", "field"), [("/chat/completions", "messages"), ("/completions", "prompt")])
def test_what_must_be_there(client, path, field):
    assert_names(refused(client, path, {"model": MODEL}), field)


def test_the_message_says_what_is_wrong_and_where(client):
    messages = [*SALT, {"role": "boss", "content": "x"}]
    error = refused(client, "/chat/completions", {"messages": messages})
    assert error.param == "messages.1.role"
    assert "messages.1.role should be 'system', 'user' or 'assistant', not \"boss\"" in error.message


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="model `nope` does not exist") as caught:
        ask(client, model="nope")
    assert caught.value.param == "model"


def post(server: Server, path: str, content: bytes, kind: str = "application/json") -> httpx.Response:
    return httpx.post(server.url + path, content=content, headers={"Content-Type": kind}, trust_env=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"messages": [', "not JSON.*line 1 column 15"),
        (b"", "not JSON"),
        (b"null", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not JSON.*0xff"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_no_request(server, path, content, says):
    answer = post(server, path, content)
    assert answer.status_code == 400
    assert re.search(says, answer.json()["error"]["message"])


def test_other_refusals_have_the_same_form(server):
    wrong_kind = post(server, "/v1/chat/completions", b"{}", "text/plain")
    assert (wrong_kind.status_code, wrong_kind.json()["error"]["param"]) == (400, "Content-Type")
    nowhere = post(server, "/v1/nowhere", b"{}")
    assert nowhere.status_code == 404 and "/v1/nowhere" in nowhere.json()["error"]["message"]
    wrong_way = httpx.get(f"{server.url}/v1/chat/completions", trust_env=False)
    assert (wrong_way.status_code, wrong_way.json()["error"]["code"]) == (405, 405)


def test_the_example_client(server):
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / "openai_client.py"],
        env={**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("salt") >= 2
    assert "100%" in ran.stdout


def test_the_server_is_well_after_all_that(server, client):
    assert server.process.poll() is None
    assert "salt" in text_of(ask(client))
