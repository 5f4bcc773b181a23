"""The fields that a request may have: vLLM's, and those that common clients send

vLLM ignores unknown fields, so a misspelt one would have no effect and give no error.
"""

import difflib
import os
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from importlib import import_module
from typing import Any, Final

from pydantic import BaseModel

_VLLM: Final = "vllm.entrypoints"
# By path: vLLM's models of a request (of several, any), and the parameters that the clients' SDKs have.
MODELS: Final[dict[str, tuple[str, ...]]] = {
    "/v1/chat/completions": (f"{_VLLM}.openai.chat_completion.protocol:ChatCompletionRequest",),
    "/v1/completions": (f"{_VLLM}.openai.completion.protocol:CompletionRequest",),
    "/v1/responses": (f"{_VLLM}.openai.responses.protocol:ResponsesRequest",),
    "/v1/messages": (f"{_VLLM}.anthropic.protocol:AnthropicMessagesRequest",),
    "/v1/messages/count_tokens": (f"{_VLLM}.anthropic.protocol:AnthropicCountTokensRequest",),
    "/tokenize": (
        f"{_VLLM}.serve.tokenize.protocol:TokenizeChatRequest",
        f"{_VLLM}.serve.tokenize.protocol:TokenizeCompletionRequest",
    ),
    "/detokenize": (f"{_VLLM}.serve.tokenize.protocol:DetokenizeRequest",),
}
PARAMETERS: Final[dict[str, str]] = {
    "/v1/chat/completions": "openai.types.chat.completion_create_params:CompletionCreateParamsBase",
    "/v1/completions": "openai.types.completion_create_params:CompletionCreateParamsBase",
    "/v1/responses": "openai.types.responses.response_create_params:ResponseCreateParamsBase",
    "/v1/messages": "anthropic.types.beta.message_create_params:MessageCreateParamsBase",
    "/v1/messages/count_tokens": "anthropic.types.beta.message_count_tokens_params:MessageCountTokensParams",
}
GUIDED: Final = {  # vLLM's fields until 0.11, and their names within `structured_outputs` now
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}
DROPPED: Final = ("guided_decoding_backend",)  # the server's choice now, with the same output
# Labels that clients attach for their provider: without effect here, on any route.
LABELS: Final = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
UNSUPPORTED: Final = {
    "conversation": "conversation is not supported: this server stores none; send it in input",
    "functions": "functions is not supported: use tools",
    "function_call": "function_call is not supported: use tool_choice",
    "best_of": "best_of is not supported: use n, and choose among the answers",
    "enable_thinking": "enable_thinking is not a field of the request: put it in chat_template_kwargs",
    "extra_body": "extra_body is an argument of OpenAI's Python client: put its fields in the request itself",
    "max_new_tokens": "max_new_tokens is not a field of the request: use max_tokens",
}
STORE_VARIABLE: Final = "VLLM_ENABLE_RESPONSES_API_STORE"


class Refused(Exception):
    """A request that does not reach the engine.

    Attributes:
        field: what it is about, as in "messages.0.content"; None: the request as a whole.
        reason: its name in the metrics.
    """

    def __init__(
        self, field: str | None, message: str, reason: str = "field", status: HTTPStatus = HTTPStatus.BAD_REQUEST
    ) -> None:
        super().__init__(message)
        self.field, self.message, self.reason, self.status = field, message, reason, status


def request_model(path: str) -> type[BaseModel] | None:
    """vLLM's model of a request to `path`; None if there is not exactly one."""
    names = MODELS.get(path, ())
    return _named(names[0]) if len(names) == 1 else None


def read_fields(path: str, request: Mapping[str, Any], lenient: bool = False) -> Mapping[str, Any]:
    """The request, with fields of older versions under their current names.

    Args:
        lenient: unknown fields are ignored, as vLLM does.
    """
    if path not in MODELS:
        return request
    request = _without_guided(path, request)
    if request.get("previous_response_id") is not None and os.environ.get(STORE_VARIABLE) != "1":
        raise Refused(
            "previous_response_id",
            "previous_response_id: this server stores no responses; send the conversation in input",
        )
    if lenient:
        return request
    for name in request:
        if name in UNSUPPORTED and request[name] is not None and name not in _vllm_fields(path):
            raise Refused(name, UNSUPPORTED[name])
        if name not in _known(path) and name not in UNSUPPORTED:
            near = difflib.get_close_matches(name, sorted(_known(path)), n=1)
            raise Refused(name, f"{name} is not a field of this request{f': did you mean {near[0]}?' if near else ''}")
    return request


def _without_guided(path: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
    old = {name for name in request if name in GUIDED or name in DROPPED} - _vllm_fields(path)
    if not old or "structured_outputs" not in _vllm_fields(path):
        return request
    guided = {GUIDED[name]: request[name] for name in old if name in GUIDED and request[name] is not None}
    request = {name: value for name, value in request.items() if name not in old}
    if not guided:
        return request
    if request.get("structured_outputs") is not None:
        name = min(old)
        raise Refused(name, f"{name} is an older form of structured_outputs: give only one of them")
    return {**request, "structured_outputs": guided}


@cache
def _vllm_fields(path: str) -> frozenset[str]:
    models = [_named(name) for name in MODELS[path]]
    fields = ((name, field) for model in models for name, field in model.model_fields.items())
    return frozenset(known for name, field in fields for known in (name, field.alias) if known)


@cache
def _known(path: str) -> frozenset[str]:
    clients = _named(PARAMETERS[path]).__annotations__ if path in PARAMETERS else {}
    return _vllm_fields(path) | (clients.keys() - UNSUPPORTED.keys() - {"betas"}) | LABELS


def _named(name: str) -> Any:
    module, _, symbol = name.partition(":")
    return getattr(import_module(module), symbol)
