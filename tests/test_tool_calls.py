"""The grammar of tool calls, as the parser `hunyuan_large` asks for it."""

from typing import Any

from tokenizer_texts import SMALL_VOCAB
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel

from hunyuan_vllm.tokenizer import HYTokenizer
from hunyuan_vllm.tool_calls import HunYuanToolParser


def grammar(parameters: dict[str, Any], choice: Any) -> str:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"messages": [{"role": "user", "content": "?"}], "tools": [tool], "tool_choice": choice}
    request = ChatCompletionRequest.model_validate(body)
    parser = HunYuanToolParser(HYTokenizer(vocab_file=str(SMALL_VOCAB)), request.tools)
    tag = parser.get_structural_tag(request, strict_level=ToolStrictLevel.PARAMETER)
    assert tag is not None
    return tag.model_dump_json()


def test_an_empty_schema_means_any_object() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        assert grammar({}, choice) == grammar({"type": "object"}, choice)
