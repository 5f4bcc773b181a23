"""The parsers `hunyuan_v1` as vLLM puts them together: streamed or not, with either vocabulary, before an engine."""

import json
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st
from test_replies import JSON, SIZES, TEXTS, pieces
from tokenizer_texts import SMALL_VOCAB
from v1_templates import A13B, small_vocabulary
from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.parser import ParserManager
from vllm.plugins import load_general_plugins
from vllm.reasoning import ReasoningParserManager
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output import StructuredOutputManager
from xgrammar.testing import _is_grammar_accept_string

from hunyuan_vllm.patches import name_reasoning_as_before
from hunyuan_vllm.tokenizer import HYTokenizer

load_general_plugins()

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
QUESTION = {"role": "user", "content": "What does <think> or </think> mean?"}
REPLY = (
    "<think>\nTwo calls, 两次 <tool_calls>[]\n</think>\n<answer>\n助手：Let me see.\n<tool_calls>"
    '[{"name": "weather", "arguments": {"city": "</answer>"}}, {"name": "now", "arguments": {}}]</tool_calls>'
    "\n</answer>"
)
CALLS = [("weather", '{"city": "</answer>"}'), ("now", "{}")]


LARGE = HYTokenizer(vocab_file=str(SMALL_VOCAB), chat_template=A13B)
SMALL = small_vocabulary([REPLY, "think answer tool calls 助手"] * 4)
BOTH = pytest.mark.parametrize("tokenizer", [LARGE, SMALL], ids=["128k", "120k"])
Message = tuple[str, str, list[tuple[str, str]]]


def asked(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [QUESTION], "tools": TOOLS, **fields})


def parser(tools: str | None = "hunyuan_v1", reasoning: str | None = "hunyuan_v1", tokenizer: Any = LARGE) -> Any:
    made = ParserManager.get_parser(tools, reasoning, enable_auto_tools=True)
    assert made is not None
    return made(tokenizer, asked().tools, model_config=None, chat_template_kwargs={})


def at_once(made: Any, text: str, request: ChatCompletionRequest) -> Message:
    reasoning, content, calls = made.parse(text, request, enable_auto_tools=True)
    return reasoning or "", content or "", [(call.name, call.arguments) for call in calls or []]


def streamed(made: Any, parts: Sequence[str], request: ChatCompletionRequest, prompt: Any = None) -> Message:
    reasoning = content = ""
    calls: list[tuple[str, str]] = []
    for number, part in enumerate(parts, 1):
        delta = made.parse_delta(part, [], request, prompt or [], finished=number == len(parts))
        if delta is None:
            continue
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for call in delta.tool_calls:
            if call.id:
                assert call.index == len(calls) and call.type == "function"
                calls.append((call.function.name, ""))
            name, arguments = calls[call.index]
            calls[call.index] = name, arguments + (call.function.arguments or "")
    return reasoning, content, calls


@given(st.tuples(*[TEXTS] * 3), st.lists(st.dictionaries(TEXTS, JSON, max_size=2), max_size=3), SIZES, st.booleans())
def test_a_stream_ends_as_the_whole_reply_does(texts: Any, arguments: Any, sizes: list[int], tags: bool) -> None:
    before, thinking, answer = texts
    calls = json.dumps([{"name": "f", "arguments": one} for one in arguments], ensure_ascii=False)
    answer = f"{answer}<tool_calls>{calls}</tool_calls>" if arguments else answer
    answer = f"<answer>\n{answer}\n</answer>" if tags else answer
    text = f"{before}<think>\n{thinking}\n</think>\n{answer}"
    reasoning, content, whole_calls = at_once(parser(), text, asked())
    message = streamed(parser(), [*pieces(text, sizes)], asked())
    if whole_calls:  # where white space alone is no content
        content, message = content.strip(), (message[0], message[1].strip(), message[2])
    assert message[:2] == (reasoning, content)
    # Of a call that turns out not to be one, or is cut off, a stream has shown the beginning.
    assert [call for call in message[2] if call in whole_calls] == whole_calls


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_reply_with_everything(size: int) -> None:
    message = "Two calls, 两次 <tool_calls>[]", "Let me see.", CALLS
    parts = [*pieces(REPLY, [size] * (len(REPLY) // size))]
    assert at_once(parser(), REPLY, asked()) == message
    assert streamed(parser(), parts, asked()) == message
    without = parser(tools=None), asked(tools=None)
    assert streamed(*(without[0], ["<answer>\nHi", "\n</ans", "wer>"], without[1])) == ("", "Hi", [])
    thought = parser(reasoning=None)
    shown = "<think>\nTwo calls, 两次 <tool_calls>[]\n</think>\nLet me see."
    assert streamed(thought, parts, asked()) == ("", shown, CALLS)
    assert at_once(parser(reasoning=None), REPLY, asked()) == ("", shown, CALLS)


@pytest.mark.parametrize("choice", ["none", "required", {"type": "function", "function": {"name": "weather"}}])
def test_tool_choices(choice: Any) -> None:
    text = '<think>\nhm\n</think>\n<tool_calls>[{"name": "weather", "arguments": {"city": "京都"}}]</tool_calls>'
    message = "hm", "", [] if choice == "none" else [("weather", '{"city": "京都"}')]
    assert at_once(parser(), text, asked(tool_choice=choice)) == message
    assert streamed(parser(), [*pieces(text, [7] * 20)], asked(tool_choice=choice)) == message


def test_other_tool_parsers_read_on_in_their_own_format() -> None:
    call = '[{"name": "weather", "parameters": {"city": "X"}}]'
    made = parser("hunyuan_a13b"), [*pieces(f"<think>\nhm\n</think>\n{call}", [5] * 20)], asked(tool_choice="required")
    assert streamed(*made) == ("hm", "", [("weather", '{"city": "X"}')])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "X"}}\n</tool_call>'
    made = parser("hunyuan_large"), [*pieces(f"<think>\nhm\n</think>\nok {call}", [5] * 20)], asked()
    assert streamed(*made) == ("hm", "ok", [("weather", '{"city": "X"}')])


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


def prompt(tokenizer: Any, **variables: Any) -> list[int]:
    rendered: list[int] = tokenizer.apply_chat_template(
        [QUESTION], add_generation_prompt=True, return_dict=False, **variables
    )
    return rendered


@BOTH
def test_a_grammar_begins_where_thinking_ends(tokenizer: Any) -> None:
    """However many tokens are looked at together."""
    engine = ReasoningParserManager.get_reasoning_parser("hunyuan_v1")(tokenizer=tokenizer, chat_template_kwargs={})
    assert engine.is_reasoning_end(prompt(tokenizer, enable_thinking=False))
    before = prompt(tokenizer)
    assert not engine.is_reasoning_end(before)
    for reply, tag in ((REPLY, "</think>"), ("<answer>\nyes\n</answer>", "<answer>"), ("yes", None)):
        tokens = ids(tokenizer, reply)
        ends = [tag is not None and tag in tokenizer.decode(tokens[:end]) for end in range(len(tokens) + 1)]
        first = ends.index(True) if True in ends else len(tokens) + 1
        for end in range(1, len(tokens) + 1):
            assert engine.is_reasoning_end(before + tokens[:end]) == (end >= first)
            for new in (1, 2, 5, 40):
                if end - new < first <= end or end < first:
                    seen = before + tokens[:end], tokens[max(end - new, 0) : end]
                    assert engine.is_reasoning_end_streaming(*seen) == (end >= first)


@BOTH
def test_the_engine_holds_drafts_to_a_grammar_from_there_on(tokenizer: Any) -> None:
    manager = object.__new__(StructuredOutputManager)
    manager.enable_in_reasoning, manager.tokenizer = False, tokenizer
    manager.reasoner_cls = ReasoningParserManager.get_reasoning_parser("hunyuan_v1")

    def free(drafts: list[int], **variables: Any) -> int:
        """How many of the drafts, and the token behind them, are the model's own choice."""
        before = prompt(tokenizer, **variables)
        asked_of_engine: Any = SimpleNamespace(
            prompt_token_ids=before,
            all_token_ids=before,
            structured_output_request=SimpleNamespace(reasoning_ended=None, reasoner=None, reasoning_parser_kwargs={}),
        )
        return manager._get_constraint_bounds(asked_of_engine, drafts).constraint_start

    tokens = ids(tokenizer, "<think>\nno\n</think>\n<answer>\n")
    end = next(end for end in range(len(tokens)) if "</think>" in tokenizer.decode(tokens[:end]))
    assert [free(tokens[:count]) for count in range(end)] == [count + 1 for count in range(end)]
    assert [free(tokens[:count]) for count in range(end, len(tokens))] == [end] * (len(tokens) - end)
    assert free(tokens, enable_thinking=False) == 0


@BOTH
def test_tokens_are_told_apart(tokenizer: Any) -> None:
    tokens = ids(tokenizer, REPLY)
    made = parser(tokenizer=tokenizer)
    made.parse(REPLY, asked())
    reasoning = "Two calls, 两次 <tool_calls>[]"
    count = made.count_reasoning_tokens(tokens)
    assert abs(count - len(ids(tokenizer, reasoning))) <= 3
    growing = [made.count_reasoning_tokens(tokens[:end]) for end in range(len(tokens) + 1)]
    assert growing[-1] == count and max(growing) < count + len("</think>")  # tokens of the tag, until it is whole
    content = tokenizer.decode(made.reasoning_parser.extract_content_ids(tokens))
    assert content.strip() == REPLY.partition("</think>")[2].strip()
    for length in range(500, 540, 3):
        long = ids(tokenizer, f"<think>\n{'é字' * length}\n</think>\n<answer>\nyes")
        content = tokenizer.decode(made.reasoning_parser.extract_content_ids(long))
        assert content.strip() == "<answer>\nyes"
    unfinished = ids(tokenizer, "<think>\nTwo")
    assert made.count_reasoning_tokens(unfinished) <= len(ids(tokenizer, "\nTwo"))
    assert made.reasoning_parser.extract_content_ids(unfinished) == []
    for without in ("yes", "<answer>\nyes", "What does <think> mean?"):
        assert made.count_reasoning_tokens(ids(tokenizer, without)) == 0
        assert made.reasoning_parser.extract_content_ids(ids(tokenizer, without)) == ids(tokenizer, without)


@BOTH
def test_thinking_that_the_prompt_has_begun(tokenizer: Any) -> None:
    begun = {"role": "assistant", "content": "<think>\nFirst"}
    marker = "<|extra_0|>" if tokenizer is LARGE else "<｜hy_Assistant｜>"
    reply = ", then\n</think>\n<answer>\nyes\n</answer>"
    expected = ", then", "yes", []
    before = ids(tokenizer, f"{marker}<think>\nFirst")
    made = parser(tokenizer=tokenizer)
    assert streamed(made, [*pieces(reply, [3] * 20)], asked(), before) == expected
    assert made.count_reasoning_tokens(ids(tokenizer, reply)) == len(ids(tokenizer, ", then\n"))
    assert at_once(parser(), reply, asked(messages=[QUESTION, begun])) == expected


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> OpenAIServingChat:
    """vLLM's chat completions before an engine that says what it is told to: `serving.engine_client.says`."""
    directory = tmp_path_factory.mktemp("checkpoint")
    config = json.loads((Path(__file__).parent / "golden" / "cla2_top1" / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    (directory / "chat_template.jinja").write_text(A13B)
    shutil.copy(SMALL_VOCAB, directory / "hy.tiktoken")
    model = ModelConfig(model=str(directory), dtype="float32")
    engine = Engine(model)
    options: Any = {
        "request_logger": None,
        "chat_template": None,
        "chat_template_content_format": "auto",
        "reasoning_parser": "hunyuan_v1",
        "enable_auto_tools": True,
        "tool_parser": "hunyuan_v1",
        "tool_strict_level": "parameter",
    }
    renderer = OnlineRenderer(model, engine.renderer, **options)
    models = OpenAIServingModels(engine, [BaseModelPath(name="m", model_path="m")])  # type: ignore[arg-type]
    name_reasoning_as_before()
    return OpenAIServingChat(engine, models, "assistant", online_renderer=renderer, **options)  # type: ignore[arg-type]


class Engine:
    vllm_config = SimpleNamespace(kv_transfer_config=None)
    errored, input_processor = False, None
    says: list[str]

    def __init__(self, model: ModelConfig) -> None:
        self.model_config = model
        self.renderer = renderer_from_config(VllmConfig(model_config=model))

    def check_admission(self, n: int) -> None:
        pass

    async def generate(
        self, given: Any, sampling: SamplingParams, name: str, **rest: Any
    ) -> AsyncIterator[RequestOutput]:
        self.prompt, self.sampling, self.rest = given["prompt_token_ids"], sampling, rest
        for number, text in enumerate(self.says, 1):
            last = number == len(self.says)
            output = CompletionOutput(0, text, ids(LARGE, text), None, None, finish_reason="stop" if last else None)
            yield RequestOutput(name, None, self.prompt, None, [output], finished=last)


async def test_vllm_answers_alike_streamed_or_not(serving: OpenAIServingChat) -> None:
    engine: Any = serving.engine_client
    engine.says = [REPLY]
    whole: Any = await serving.create_chat_completion(asked(model="m"))
    (choice,) = whole.choices
    assert (choice.message.reasoning, choice.message.content) == ("Two calls, 两次 <tool_calls>[]", "Let me see.")
    assert whole.model_dump()["choices"][0]["message"]["reasoning_content"] == choice.message.reasoning
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == CALLS
    assert choice.finish_reason == "tool_calls" and whole.usage.completion_tokens_details.reasoning_tokens > 0
    engine.says = [*pieces(REPLY, [9] * 30)]
    reasoning, content, calls = "", "", [["", ""], ["", ""]]
    async for event in await serving.create_chat_completion(asked(model="m", stream=True)):  # type: ignore[union-attr]
        if event.startswith("data: {"):
            (choice,) = json.loads(event.removeprefix("data: "))["choices"]
            assert choice["delta"].get("reasoning_content") == choice["delta"].get("reasoning")
            reasoning += choice["delta"].get("reasoning") or ""
            content += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                calls[call["index"]][0] += call["function"].get("name") or ""
                calls[call["index"]][1] += call["function"].get("arguments") or ""
    assert (reasoning, content) == ("Two calls, 两次 <tool_calls>[]", "Let me see.")
    assert [(name, arguments) for name, arguments in calls] == CALLS and choice["finish_reason"] == "tool_calls"


async def test_thinking_is_turned_off_by_the_request(serving: OpenAIServingChat) -> None:
    engine: Any = serving.engine_client
    engine.says = ["<answer>\nyes", "\n</answer>"]
    off = {"model": "m", "tools": None, "stream": True, "chat_template_kwargs": {"enable_thinking": False}}
    events = [event async for event in await serving.create_chat_completion(asked(**off))]  # type: ignore[union-attr]
    assert LARGE.decode(engine.prompt).endswith("<|extra_0|><think>\n\n</think>\n")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "yes"
    assert not any(delta.get("reasoning") for delta in deltas)


async def test_a_call_that_is_asked_for_has_a_grammar(serving: OpenAIServingChat) -> None:
    engine: Any = serving.engine_client
    engine.says = [REPLY]
    call = '{"name": "weather", "arguments": {"city": "京都 [<"}}'
    now = '{"name": "now", "arguments": {}}'
    grammars = []
    for fields in (
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"tool_choice": "auto"},
        {"tool_choice": "required", "parallel_tool_calls": False},
    ):
        await serving.create_chat_completion(asked(model="m", **fields))
        assert engine.rest["reasoning_ended"] is None  # the engine's own parser looks for where it begins
        grammars.append(xgrammar.Grammar.from_structural_tag(engine.sampling.structured_outputs.structural_tag))
    required, named, auto, single = grammars

    def takes(text: str) -> list[bool]:
        return [_is_grammar_accept_string(one, text) for one in (required, named, auto, single)]

    assert takes(f"<tool_calls>[{call}]</tool_calls>") == [True] * 4
    assert takes(f"<tool_calls>[{call}, {now}]</tool_calls>") == [True, False, True, False]
    assert takes("\n<answer>\n助手：No.\n</answer>") == [False, False, True, False]
    assert takes(f"<tool_calls>[{call.replace('city', 'town')}]</tool_calls>") == [False] * 4


async def test_a_loop_with_results_is_rendered(serving: OpenAIServingChat) -> None:
    engine: Any = serving.engine_client
    engine.says = ["<think>\n\n</think>\n<answer>\n助手：18 °C\n</answer>"]
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "京都"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "ok", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "18<|eos|>"},
    ]
    answer: Any = await serving.create_chat_completion(asked(model="m", messages=messages))
    text = LARGE.decode(engine.prompt)
    assert text.endswith(
        '用户：U<|extra_0|>ok<tool_calls>[{"name": "weather", "arguments": {"city": "京都"}}]</tool_calls><|eos|>'
        "<tool_response>18<|eos|></tool_response><|extra_0|>"
    )
    (eos,) = ids(LARGE, "<|eos|>")
    assert engine.prompt.count(eos) == 1
    assert (answer.choices[0].message.reasoning, answer.choices[0].message.content) == (None, "18 °C")
    assert "reasoning_content" not in answer.model_dump()["choices"][0]["message"]
