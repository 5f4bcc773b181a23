"""Which fields of a request are taken, renamed and refused."""

from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from hunyuan_vllm.server.middleware.fields import Refused, read_fields, request_model

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
def test_every_field_of_vllm_is_taken(path: str) -> None:
    model = request_model(path)
    assert model is not None
    request = dict.fromkeys(model.model_fields)
    assert read_fields(path, request) is request


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, ["store", "metadata", "user", "service_tier", "safety_identifier", "prompt_cache_key",
                "verbosity", "reasoning_effort", "modalities", "prediction", "web_search_options",
                "parallel_tool_calls", "vllm_xargs"]),
        (COMPLETIONS, ["store", "metadata", "user", "service_tier", "vllm_xargs"]),
        (RESPONSES, ["store", "metadata", "context_management", "stream_options", "vllm_xargs"]),
        (MESSAGES, ["service_tier", "container", "mcp_servers", "thinking"]),
        ("/tokenize", ["prompt", "messages", "tools"]),
        ("/detokenize", ["tokens"]),
        ("/v1/load_lora_adapter", ["anything"]),
    ],
)  # fmt: skip
def test_what_clients_send_beside_is_taken(path: str, fields: list[str]) -> None:
    request = dict.fromkeys(fields, "x")
    assert read_fields(path, request) is request


@pytest.mark.parametrize(
    ("path", "field", "said"),
    [
        (CHAT, "temprature", "did you mean temperature?"),
        (COMPLETIONS, "max_token", "did you mean max_tokens?"),
        (RESPONSES, "max_output_token", "did you mean max_output_tokens?"),
        (MESSAGES, "stop_sequence", "did you mean stop_sequences?"),
        (CHAT, "zzz", "is not a field of this request"),
        (CHAT, "functions", "use tools"),
        (CHAT, "function_call", "use tool_choice"),
        (CHAT, "enable_thinking", "chat_template_kwargs"),
        (COMPLETIONS, "best_of", "use n"),
        (RESPONSES, "conversation", "input"),
        (RESPONSES, "previous_response_id", "input"),
        ("/tokenize", "promt", "did you mean prompt?"),
    ],
)
def test_others_are_refused_by_name(path: str, field: str, said: str) -> None:
    with pytest.raises(Refused, match=f"^{field}.*{said}".replace("?", r"\?")) as refused:
        read_fields(path, {"model": "hunyuan", field: "x"})
    assert refused.value.field == field


def test_a_lenient_server_passes_over_them() -> None:
    request = {"temprature": 1, "functions": [], "best_of": 2}
    assert read_fields(CHAT, request, lenient=True) is request


def test_null_asks_for_nothing() -> None:
    read_fields(CHAT, {"functions": None, "function_call": None})
    read_fields(RESPONSES, {"previous_response_id": None})


def test_responses_that_are_kept_can_be_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    read_fields(RESPONSES, {"previous_response_id": "resp_1"})


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"guided_json": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'root ::= "a"', "guided_decoding_backend": "x"}, {"grammar": 'root ::= "a"'}),
        ({"guided_json": {}, "guided_whitespace_pattern": " "}, {"json": {}, "whitespace_pattern": " "}),
    ],
)
def test_guided_fields_become_structured_outputs(old: dict[str, Any], new: dict[str, Any], lenient: bool) -> None:
    message = {"messages": [{"role": "user", "content": "?"}]}
    read = read_fields(CHAT, {**message, **old}, lenient)
    assert read == {**message, "structured_outputs": new}
    parsed = ChatCompletionRequest.model_validate(read).structured_outputs
    assert parsed is not None and all(getattr(parsed, name) == value for name, value in new.items())


def test_guided_fields_that_are_null_constrain_nothing() -> None:
    assert read_fields(CHAT, {"guided_json": None, "n": 1, "guided_decoding_backend": "x"}) == {"n": 1}


def test_one_constraint_at_a_time() -> None:
    with pytest.raises(Refused, match="guided_regex"):
        read_fields(CHAT, {"guided_regex": "a", "structured_outputs": {"regex": "b"}})
