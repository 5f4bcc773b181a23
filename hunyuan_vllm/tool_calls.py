"""The tool parsers: `hunyuan_v1` for the format of Hunyuan V1 models, and `hunyuan_large`, Hermes' markup, for a model
without a tool format of its own.

vLLM's grammars for tools allow any amount of white space within the arguments, whatever `disable_any_whitespace` says
(vllm-project/vllm#54497), and a model that was not trained for calls writes line breaks there until its room is used
up. They let a function without parameters have any JSON value, and pass over what they cannot enforce of a schema.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tokenizers import TokenizerLike
from vllm.tool_parsers.abstract_tool_parser import Tool, ToolParser
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
from vllm.tool_parsers.structural_tag_registry import (
    SimplifiedToolChoice,
    get_function_parameters,
    register_vllm_structural_tag,
)
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from vllm.tool_parsers.utils import is_complete_json
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features
from xgrammar import StructuralTag
from xgrammar.openai_tool_call_schema import BuiltinToolParam, FunctionToolParam
from xgrammar.structural_tag import JSONSchemaFormat, TagFormat, TagsWithSeparatorFormat, TriggeredTagsFormat

from hunyuan_vllm.replies import CALLS, CALLS_END, CallReader

LONGEST_SPACE = 1  # characters in a row; the least that xgrammar takes
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_PARAMETERS = {"type": "object"}


class _BoundedArguments(ToolParser):
    """A tool parser whose grammars hold arguments to an object without long white space."""

    def get_structural_tag(
        self,
        request: ChatCompletionRequest | ResponsesRequest,
        *,
        reasoning: bool = False,
        strict_level: ToolStrictLevel = ToolStrictLevel.AUTO,
    ) -> StructuralTag | None:
        """The grammar of the calls that `request` may be answered with; None where it may be answered freely.

        Raises:
            VLLMValidationError: a call is asked for, and the grammar could not hold its arguments to their schema.
        """
        tag = super().get_structural_tag(request, reasoning=reasoning, strict_level=strict_level)
        for arguments in [] if tag is None else _arguments(tag.format):
            arguments.max_whitespace_cnt = LONGEST_SPACE
            if isinstance(arguments.json_schema, bool) or not arguments.json_schema:
                # No parameters, or none that are to be kept. An empty schema would allow any name, of any length.
                pinned = strict_level == ToolStrictLevel.PARAMETER
                arguments.json_schema = NO_PARAMETERS if pinned else ANY_PARAMETERS
            elif request.tool_choice != "auto" and has_xgrammar_unsupported_json_features(arguments.json_schema):
                raise VLLMValidationError(
                    "parameters use what cannot be enforced in a call (multipleOf, uniqueItems, contains, pattern with "
                    "lengths, a rare format, patternProperties beside properties, allOf of several): leave it out",
                    parameter="tools",
                )
        return tag


class HunYuanToolParser(_BoundedArguments, Hermes2ProToolParser):
    """Calls as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number one after the other."""

    def extract_tool_calls(self, model_output: str, request: ChatCompletionRequest) -> ExtractedToolCallInformation:
        """The calls that came to their end. Of one that `max_tokens` cut nothing is shown."""
        before, start, last = model_output.rpartition(self.tool_call_start_token)
        if not start or self.tool_call_end_token in last or is_complete_json(last):
            return super().extract_tool_calls(model_output, request)
        found = super().extract_tool_calls(before, request)
        # As if there were calls in any case: where there are none vLLM shows the whole output as text.
        content = found.content or None
        return ExtractedToolCallInformation(tools_called=True, tool_calls=found.tool_calls, content=content)


class HunYuanV1ToolParser(_BoundedArguments):
    """Calls as `<tool_calls>[{"name": …, "arguments": {…}}, …]</tool_calls>`, wherever in an answer.

    What vLLM calls engine-based streaming: what may be a tag is held back, and given out at the end.
    """

    structural_tag_model = "hunyuan_v1"
    engine_based_streaming = True
    skip_reasoning_parsing = False  # vLLM sets it where there is no reasoning parser: then this reads whole replies

    def __init__(self, tokenizer: TokenizerLike, tools: list[Tool] | None = None) -> None:
        super().__init__(tokenizer, tools)
        self._reader: CallReader | None = None
        self._shown: dict[int, str] = {}  # the arguments shown so far, by the place of the call

    def extract_tool_calls(self, model_output: str, request: ChatCompletionRequest) -> ExtractedToolCallInformation:
        """The calls that came to their end, their arguments as the model wrote them, and the text around."""
        reader = CallReader(whole=self.skip_reasoning_parsing, calls=bool(request.tools))
        _, content = reader.read(model_output, last=True)
        calls = [
            ToolCall(type="function", function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in reader.calls
            if call.done
        ]
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls, content=content or None)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: ChatCompletionRequest,
    ) -> DeltaMessage | None:
        if self._reader is None:
            self._reader = CallReader(whole=self.skip_reasoning_parsing, calls=bool(request.tools))
        return self._read(delta_text)

    def finish_streaming(self) -> DeltaMessage | None:
        return self._read("", last=True)

    def _read(self, text: str, last: bool = False) -> DeltaMessage | None:
        if self._reader is None:
            return None
        _, content = self._reader.read(text, last)
        calls = []
        for place, call in enumerate(self._reader.calls):
            if not call.name or (shown := self._shown.get(place)) == call.arguments:
                continue
            self._shown[place] = call.arguments
            index = list(self._shown).index(place)
            if shown is not None:
                arguments = DeltaFunctionCall(arguments=call.arguments.removeprefix(shown))
                calls.append(DeltaToolCall(index=index, function=arguments))
                continue
            begun = DeltaFunctionCall(name=call.name, arguments=call.arguments)
            calls.append(DeltaToolCall(index=index, id=make_tool_call_id(), type="function", function=begun))
        return DeltaMessage(content=content or None, tool_calls=calls) if content or calls else None


@register_vllm_structural_tag("hunyuan_v1")
def _v1_structural_tag(
    tools: list[FunctionToolParam],
    builtin_tools: list[BuiltinToolParam],
    tool_choice: SimplifiedToolChoice,
    reasoning: bool,
    token_suffix: str = "",
) -> StructuralTag:
    calls = [
        TagFormat(
            begin=f'{{"name": {json.dumps(tool.function.name, ensure_ascii=False)}, "arguments": ',
            content=JSONSchemaFormat(json_schema=get_function_parameters(tool.function)),
            end="}",
        )
        for tool in tools
    ]
    several = TagsWithSeparatorFormat(
        tags=calls, separator=", ", at_least_one=True, stop_after_first=tool_choice == "forced"
    )
    whole = TagFormat(begin=f"{CALLS}[", content=several, end=f"]{CALLS_END}")
    if tool_choice == "auto":
        return StructuralTag(format=TriggeredTagsFormat(triggers=[CALLS], tags=[whole]))
    return StructuralTag(format=whole)


def _arguments(part: Any) -> Iterator[JSONSchemaFormat]:
    """What a structural tag says of the arguments of each function, in each way that a call may be written."""
    if isinstance(part, JSONSchemaFormat):
        yield part
    for inner in [getattr(part, "content", None), *getattr(part, "tags", ())]:
        if inner is not None:
            yield from _arguments(inner)
