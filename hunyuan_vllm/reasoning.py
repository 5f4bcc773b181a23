"""The reasoning parser `hunyuan_v1`: the thinking of Hunyuan V1 models, and the answer without its tags.

It works on text, so for both vocabularies, and for any number of tokens at once.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.reasoning.abs_reasoning_parsers import ReasoningParser
from vllm.tokenizers import TokenizerLike

from hunyuan_vllm.replies import ANSWER, ANSWER_END, ROLE, THINK, THINK_END, ReplyReader

PART = 512  # tokens that are looked through at a time
BEGINNING = 24  # tokens at most of white space, role and a tag, with which a reply begins


class HunYuanReasoningParser(ReasoningParser):
    """`<think>`, reasoning, `</think>`, then the answer, within `<answer>` or not.

    In vLLM's server it reads a reply up to the first tool call, of which the tool parser reads on. That is what vLLM
    calls engine-based streaming: what may be a tag is held back, and given out at the end.
    """

    engine_based_streaming = True

    def __init__(self, tokenizer: TokenizerLike, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._serves = "model_config" in kwargs  # which the engine's structured outputs do not give
        self._open(thinking=False)

    @property
    def reasoning_start_str(self) -> str:
        return self._written(THINK)

    @property
    def reasoning_end_str(self) -> str:
        return self._written(THINK_END)

    def _written(self, tag: str) -> str:
        """The tag, with the line break behind it where the two share a token.

        vLLM looks for the tokens of this, and writes them to end thinking at `thinking_token_budget`. A line break of
        its own would come when a grammar already holds, which begins behind the tag.
        """
        ids, line = (self.model_tokenizer.encode(text, add_special_tokens=False) for text in (tag, f"{tag}\n"))
        return tag if line[: len(ids)] == ids else f"{tag}\n"

    def _open(self, thinking: bool) -> None:
        self._end: int | None
        self._opened = thinking
        self._counted, self._end = 0, None
        self._reader = ReplyReader(thinking)

    def extract_reasoning(
        self, model_output: str, request: ChatCompletionRequest | ResponsesRequest
    ) -> tuple[str | None, str | None]:
        self._open(_continues_thinking(request))
        reasoning, content = self._reader.read(model_output, last=True)
        content += self._reader.rest
        return reasoning or None, content or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        return _delta(*self._reader.read(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        """What was held back: the tool parser's part, or the end of the reply."""
        if self._reader.stopped:
            rest, self._reader.rest = self._reader.rest, ""
            return _delta("", rest)
        return _delta(*self._reader.read("", last=True))

    def has_engine_confirmed_reasoning_end(self) -> bool:
        """Whether the tool parser reads on. Not where thinking ends: of an answer the tags have to be removed."""
        return self._reader.stopped

    def adjust_initial_state_from_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        text, _ = self._reply(prompt_token_ids)
        self._open(_thinks(text))

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether an answer follows `input_ids`: a prompt, with or without what has been generated.

        In vLLM's server a yes means that replies are shown as they are, so there it is left open: None has the engine
        ask its own parser where a grammar begins.
        """
        if self._serves:
            return None  # type: ignore[return-value]
        return self._answers(input_ids)

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether thinking has ended within `delta_ids`, which `input_ids` ends with."""
        return self._answers(input_ids, tail=BEGINNING + len(list(delta_ids)))

    def _answers(self, ids: Sequence[int], tail: int = 0) -> bool:
        text, whole = self._reply(ids, tail)
        return THINK_END in text or (whole and _begins_with(ANSWER, text))

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        first = self._first(input_ids)
        if first is None:
            return input_ids
        end = self._place(THINK_END, input_ids, first)
        return input_ids[end[1] :] if end else []

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Of a reply from its beginning. It may be asked again as the reply grows, and looks at what is new then."""
        first = self._first(token_ids)
        if first is None:
            return 0
        if len(token_ids) < self._counted:
            self._counted, self._end = 0, None
        if self._end is None:
            end = self._place(THINK_END, token_ids, max(first, self._counted - len(THINK_END)))
            self._end = end and end[0]
        self._counted = len(token_ids)
        return max((len(token_ids) if self._end is None else self._end) - first, 0)

    def _first(self, ids: Sequence[int]) -> int | None:
        """The place of the first token of thinking; None where there is none."""
        if self._opened:
            return 0
        if not _begins_with(THINK, self.model_tokenizer.decode(ids[:BEGINNING])):
            return None
        opened = self._place(THINK, ids[:BEGINNING])
        return opened and opened[1]

    def _place(self, tag: str, ids: Sequence[int], at: int = 0) -> tuple[int, int] | None:
        """How many tokens come before `tag`, and how many with it; None if it is not there from token `at` on."""
        for start in range(at, len(ids), PART):
            part = list(ids[start : start + PART + len(tag)])
            if tag not in self.model_tokenizer.decode(part):
                continue
            # Tokens as a vocabulary writes them: a tag is the same there as in text.
            tokens: list[str] = self.model_tokenizer.convert_ids_to_tokens(part)
            begin, ends = "".join(tokens).index(tag), list(accumulate(map(len, tokens)))
            return start + bisect_right(ends, begin), start + bisect_left(ends, begin + len(tag)) + 1
        return None

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.model_tokenizer.get_added_vocab()
        return frozenset(id_ for token, id_ in added.items() if token not in (THINK, THINK_END, ANSWER, ANSWER_END))

    def _reply(self, ids: Sequence[int], tail: int = 0) -> tuple[str, bool]:
        """The text behind the last special token, which ends what is not the reply, and whether it is all of that.

        Args:
            tail: how many tokens at the end are looked at; 0 for all.
        """
        first = max(len(ids) - tail, 0) if tail else 0
        start = next((at + 1 for at in range(len(ids) - 1, first - 1, -1) if ids[at] in self._special_ids), None)
        text: str = self.model_tokenizer.decode(ids[first if start is None else start :])
        return text, start is not None or first == 0


def _begins_with(tag: str, text: str) -> bool:
    return text.lstrip().removeprefix(ROLE).lstrip().startswith(tag)


def _thinks(text: str) -> bool:
    return _begins_with(THINK, text) and THINK_END not in text


def _continues_thinking(request: ChatCompletionRequest | ResponsesRequest) -> bool:
    """Whether the last message is the beginning of a reply that thinks, which the model goes on with."""
    last = request.messages[-1] if isinstance(request, ChatCompletionRequest) and request.messages else {}
    content = last.get("content") if isinstance(last, dict) and last.get("role") == "assistant" else None
    return isinstance(content, str) and _thinks(content)


def _delta(reasoning: str, content: str) -> DeltaMessage | None:
    parts = {name: text for name, text in (("reasoning", reasoning), ("content", content)) if text}
    return DeltaMessage(**parts) if parts else None
