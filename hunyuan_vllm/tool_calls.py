"""The tool parser `hunyuan_large`, for a model without a tool format of its own: Hermes' markup, calls that end.

vLLM's grammars for tools allow any amount of white space within the arguments, whatever `disable_any_whitespace` says
(vllm-project/vllm#54497), and a model that was not trained for calls writes line breaks there until its room is used
up. They let a function without parameters have any JSON value, and pass over what they cannot enforce of a schema.
"""

from __future__ import annotations

from vllm.entrypoints.generate.base.protocol import ExtractedToolCallInformation
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from vllm.tool_parsers.utils import is_complete_json
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features
from xgrammar import StructuralTag
from xgrammar.structural_tag import JSONSchemaFormat

__all__ = ["HunYuanToolParser"]

LONGEST_SPACE = 1  # characters in a row; the least that xgrammar takes
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_PARAMETERS = {"type": "object"}


class HunYuanToolParser(Hermes2ProToolParser):
    """Calls as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number one after the other."""

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
        for arguments in [] if tag is None else _arguments(tag):
            arguments.max_whitespace_cnt = LONGEST_SPACE
            if isinstance(arguments.json_schema, bool):  # no parameters, or none that are to be kept
                pinned = strict_level == ToolStrictLevel.PARAMETER
                arguments.json_schema = NO_PARAMETERS if pinned else ANY_PARAMETERS
            elif not arguments.json_schema:  # which is any JSON: white space without end, but arguments are an object
                arguments.json_schema = ANY_PARAMETERS
            elif request.tool_choice != "auto" and has_xgrammar_unsupported_json_features(arguments.json_schema):
                raise VLLMValidationError(
                    "parameters have what a call cannot be held to (multipleOf, uniqueItems, contains, pattern with "
                    "lengths, a rare format, patternProperties beside properties, allOf of several): leave it out",
                    parameter="tools",
                )
        return tag

    def extract_tool_calls(self, model_output: str, request: ChatCompletionRequest) -> ExtractedToolCallInformation:
        """The calls that came to their end. Of one that `max_tokens` cut nothing is shown."""
        before, start, last = model_output.rpartition(self.tool_call_start_token)
        if not start or self.tool_call_end_token in last or is_complete_json(last):
            return super().extract_tool_calls(model_output, request)
        found = super().extract_tool_calls(before, request)
        # As if there were calls in any case: where there are none vLLM shows the whole output as text.
        content = found.content or None
        return ExtractedToolCallInformation(tools_called=True, tool_calls=found.tool_calls, content=content)


def _arguments(tag: StructuralTag) -> list[JSONSchemaFormat]:
    """What `tag` says of the arguments of each function, in each way that a call may be written."""
    return [call.content for call in getattr(tag.format, "tags", ())]
