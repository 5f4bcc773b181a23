"""The built-in chat template, against strings written by hand."""

import json
import shutil
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest
from chat_templates import FAULTY, FINE_TUNED
from jinja2 import TemplateError
from logged import messages_of
from tokenizer_texts import SMALL_VOCAB
from transformers import AutoConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.plugins import load_general_plugins
from vllm.renderers import renderer_from_config
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers import get_tokenizer

from hunyuan_vllm import envs
from hunyuan_vllm import tokenizer as tokenizer_module
from hunyuan_vllm.chat_template import CHAT_TEMPLATE, WITH_TOOLS, known_faults, render
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.tokenizer import HYTokenizer, register_tokenizer

CONFIG = Path(__file__).parent / "golden" / "cla2_top1" / "config.json"


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture(scope="module")
def tokenizer() -> HYTokenizer:
    return HYTokenizer(vocab_file=str(SMALL_VOCAB))


CONVERSATIONS = {
    "user": ([user("Hi")], "<|startoftext|>Hi<|extra_0|>"),
    "system, user": ([system("Be kind."), user("Hi")], "<|startoftext|>Be kind.<|extra_4|>Hi<|extra_0|>"),
    "empty system": ([system(""), user("Hi")], "<|startoftext|>Hi<|extra_0|>"),
    "absent system": ([system(None), user("Hi")], "<|startoftext|>Hi<|extra_0|>"),
    "two turns": (
        [user("海水为什么咸？"), assistant("因为有盐。"), user("谢谢")],
        "<|startoftext|>海水为什么咸？<|extra_0|>因为有盐。<|eos|><|startoftext|>谢谢<|extra_0|>",
    ),
    "system, three turns": (
        [system("S"), user("1"), assistant("a"), user("2"), assistant("b"), user("3")],
        "<|startoftext|>S<|extra_4|>1<|extra_0|>a<|eos|><|startoftext|>2<|extra_0|>b<|eos|><|startoftext|>3<|extra_0|>",
    ),
    "empty system, two turns": (
        [system(""), user("1"), assistant("a"), user("2")],
        "<|startoftext|>1<|extra_0|>a<|eos|><|startoftext|>2<|extra_0|>",
    ),
    "two system messages": (
        [system("a"), system(""), system("b"), user("Hi")],
        "<|startoftext|>a\n\nb<|extra_4|>Hi<|extra_0|>",
    ),
    "a late system message": ([user("Hi"), system("late")], "<|startoftext|>late<|extra_4|>Hi<|extra_0|>"),
    "user twice": ([user("1"), user("2")], "<|startoftext|>1<|extra_0|><|startoftext|>2<|extra_0|>"),
    "parts": (
        [system(parts("Be", "kind.")), user(parts("Hi")), assistant(parts("a", "b")), user("?")],
        "<|startoftext|>Be\nkind.<|extra_4|>Hi<|extra_0|>a\nb<|eos|><|startoftext|>?<|extra_0|>",
    ),
    "empty parts": ([system(parts("")), user(parts("", "Hi"))], "<|startoftext|>Hi<|extra_0|>"),
    "whitespace is kept": (
        [user("  a\n\n"), assistant("\n b "), user(" ")],
        "<|startoftext|>  a\n\n<|extra_0|>\n b <|eos|><|startoftext|> <|extra_0|>",
    ),
    "nothing is escaped": ([user("<b> & {{ x }} 'é'")], "<|startoftext|><b> & {{ x }} 'é'<|extra_0|>"),
}


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize(("messages", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_conversation(tokenizer: HYTokenizer, messages: list[Any], expected: str, generation: bool) -> None:
    """The generation prompt is the trailing <|extra_0|>, so asking for one changes nothing."""
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation) == expected
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
    assert ids == tokenizer.encode(expected, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == expected.count("<|startoftext|>")


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("messages", [*(messages for messages, _ in CONVERSATIONS.values()), [system("S")]])
def test_without_tools_the_template_with_tools_renders_the_same(
    tokenizer: HYTokenizer, messages: list[Any], generation: bool
) -> None:
    plain, other = (
        tokenizer.apply_chat_template(messages, None, chat_template=template, add_generation_prompt=generation)
        for template in (CHAT_TEMPLATE, WITH_TOOLS.read_text())
    )
    assert other["input_ids"] == plain["input_ids"]


def test_an_answer_can_be_continued(tokenizer: HYTokenizer) -> None:
    messages = [user("Count."), assistant("one, two,")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text == "<|startoftext|>Count.<|extra_0|>one, two,"


@pytest.mark.parametrize("content", ["one, two,", parts("one, two,")])
def test_an_answer_at_the_end_is_continued_where_one_is_asked_for(
    renderer: HfRenderer, tokenizer: HYTokenizer, content: Any
) -> None:
    messages = [user("Count."), assistant(content)]
    text = "<|startoftext|>Count.<|extra_0|>one, two,"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    _, (prompt,) = renderer.render_chat([messages], ChatParams(chat_template_kwargs={"add_generation_prompt": True}))
    assert prompt["prompt_token_ids"] == tokenizer.encode(text, add_special_tokens=False)
    closed = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert closed == f"{text}<|eos|>"


@pytest.mark.parametrize("content", ["", " ", None])
def test_an_empty_answer_is_not_continued(tokenizer: HYTokenizer, content: str | None) -> None:
    text = tokenizer.apply_chat_template(
        [user("Count."), assistant(content)], tokenize=False, add_generation_prompt=True
    )
    assert text == f"<|startoftext|>Count.<|extra_0|>{content or ''}<|eos|>"


def test_a_system_message_alone_is_answered(tokenizer: HYTokenizer) -> None:
    def render(generation: bool) -> Any:
        return tokenizer.apply_chat_template([system("S")], tokenize=False, add_generation_prompt=generation)

    assert render(True) == "<|startoftext|>S<|extra_4|><|extra_0|>"
    assert render(False) == "<|startoftext|>S<|extra_4|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("Hi"), {"role": "tool", "content": "42"}], "Unknown role in message 2; use system, user or assistant"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "This model reads text only"),
    ],
)
def test_what_it_refuses(tokenizer: HYTokenizer, messages: list[Any], reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("as_file", [False, True])
def test_the_checkpoints_own_template_wins(tmp_path: Path, as_file: bool) -> None:
    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    register_tokenizer()
    own = "{{ messages[0]['content'] }}!"
    shutil.copy(CONFIG, tmp_path / "config.json")
    shutil.copy(SMALL_VOCAB, tmp_path / "hy.tiktoken")
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(own)
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": own}))
    assert get_tokenizer(tmp_path).apply_chat_template([user("Hi")], tokenize=False) == "Hi!"


def faulty_in(messages: list[Any]) -> str:
    """What FAULTY renders, or what stops it."""
    try:
        return render(FAULTY, messages)
    except TemplateError as error:
        return str(error)


def test_the_faults_that_published_templates_have() -> None:
    """The template of the other tests has them all, and writes the model's format otherwise."""
    assert faulty_in([user("Hi")]) == "<|startoftext|><|startoftext|>Hi<|extra_4|><|extra_0|>"
    assert "access to attribute 'update'" in faulty_in([system(""), user("Hi")])
    assert "access to attribute 'update'" in faulty_in([user("")])
    assert faulty_in([system("S"), user("U"), assistant("A"), {"role": "tool", "content": "42"}]).endswith("<|eos|>42")
    turns = [system("S"), user("U"), assistant("A"), user("V")]
    assert faulty_in(turns) == render(CHAT_TEMPLATE, turns)
    assert len(known_faults(FAULTY)) == 4


SECOND_SYSTEM = CHAT_TEMPLATE.replace("in messages if", "in messages[:1] if").replace(
    "{%- elif message['role'] == 'user'", "{{ '' if loop.first else content }}{%- elif message['role'] == 'user'"
)
EMPTY_SYSTEM = CHAT_TEMPLATE.replace(
    "{%- if turn.system -%}",
    "{%- if not turn.system and messages[0]['role'] == 'system' -%}{{ '<|startoftext|>' }}{%- elif turn.system -%}",
)


@pytest.mark.parametrize(
    ("template", "fault"),
    [(SECOND_SYSTEM, "a second system message"), (EMPTY_SYSTEM, "after an empty system message")],
)
def test_one_of_the_faults_is_enough(template: str, fault: str) -> None:
    (found,) = known_faults(template)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        FINE_TUNED,
        "{{ messages[0]['content'] }}!",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages | nothing }}",
        "{% for m in messages %}",
        "",
        "{% if not messages[0].content %}{{ raise_exception('say something') }}{% endif %}" + CHAT_TEMPLATE,
    ],
)
def test_another_format_is_no_fault(template: str) -> None:
    assert known_faults(template) == ()


def checkpoint(directory: Path, template: str) -> Path:
    shutil.copy(CONFIG, directory / "config.json")
    shutil.copy(SMALL_VOCAB, directory / "hy.tiktoken")
    (directory / "chat_template.jinja").write_text(template)
    return directory


def test_a_template_that_thinks_or_calls_is_no_fault() -> None:
    """Though without tools A13B's writes Hunyuan-Large's format, with the same mistakes."""
    assert known_faults(FAULTY + "{# <think> #}") == known_faults(FAULTY + "{# <tool_calls> #}") == ()


@pytest.mark.parametrize(
    ("step", "expected"),
    [(None, "13:59:00"), ("0", "13:59:58"), ("1", "13:59:58"), ("3600", "13:00:00"), ("1e6", "00:00:00")],
)
def test_the_time_in_prompts_stands_still(step: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no two prompts with it begin alike, and the prefix cache finds nothing."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(2026, 2, 3, 13, 59, 58, 999999)

    monkeypatch.setattr("hunyuan_vllm.chat_template.datetime", Clock)
    if step is not None:
        monkeypatch.setenv(envs.PROMPT_CLOCK, step)
    template = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = HYTokenizer(vocab_file=str(SMALL_VOCAB), chat_template=template)
    for content in ("Hi", "<|eos|>"):
        text = tokenizer.apply_chat_template([user(content)], tokenize=False)
        assert text == f"2026-02-03 {expected}{content}"


def test_vllm_serves_the_built_in_template_instead_of_a_wrong_one(
    tmp_path: Path, tokenizer: HYTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the environment, or vLLM's --chat-template, asks for the checkpoint's own."""
    load_general_plugins()
    model = ModelConfig(model=str(checkpoint(tmp_path, FAULTY)), dtype="float32")
    renderer = renderer_from_config(VllmConfig(model_config=model))

    def prompt(**params: Any) -> list[int]:
        _, (rendered,) = renderer.render_chat([[user("Hi")]], ChatParams(**params))
        ids: list[int] = rendered["prompt_token_ids"]
        return ids

    right, wrong = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in ("<|startoftext|>Hi<|extra_0|>", faulty_in([user("Hi")]))
    )
    with messages_of(tokenizer_module.logger) as said:
        assert prompt(chat_template=FAULTY) == wrong
        assert not said
        assert prompt() == prompt() == right
    (line,) = said
    assert "<|extra_4|>" in line and f"{envs.CHECKPOINT_CHAT_TEMPLATE}=1" in line
    monkeypatch.setenv(envs.CHECKPOINT_CHAT_TEMPLATE, "1")
    assert prompt() == wrong


def test_a_deliberate_format_is_kept(tmp_path: Path) -> None:
    register_tokenizer()
    own = get_tokenizer(checkpoint(tmp_path, FINE_TUNED))
    assert own.apply_chat_template([user("Hi")], tokenize=False).startswith("<|startoftext|>You are a pirate.")


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> HfRenderer:
    """What turns requests into token ids in vLLM, for a checkpoint with nothing but config.json and hy.tiktoken."""
    load_general_plugins()
    directory = tmp_path_factory.mktemp("checkpoint")
    shutil.copy(CONFIG, directory / "config.json")
    shutil.copy(SMALL_VOCAB, directory / "hy.tiktoken")
    return renderer_from_config(VllmConfig(model_config=ModelConfig(model=str(directory), dtype="float32")))


@pytest.mark.parametrize(("messages", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_vllm_renders_the_same(
    renderer: HfRenderer, tokenizer: HYTokenizer, messages: list[Any], expected: str
) -> None:
    _, (prompt,) = renderer.render_chat([messages], ChatParams())
    assert prompt["prompt_token_ids"] == tokenizer.encode(expected, add_special_tokens=False)


def test_vllm_takes_special_tokens_in_a_message_for_text(renderer: HfRenderer, tokenizer: HYTokenizer) -> None:
    quoted = "x<|eos|><|extra_0|>y"
    ids = tokenizer(quoted, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    start, user = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|extra_0|>"])
    _, (prompt,) = renderer.render_chat([[{"role": "user", "content": quoted}]], ChatParams())
    assert prompt["prompt_token_ids"] == [start, *ids, user]
    switched = ChatParams(chat_template_kwargs={"tokenizer_kwargs": {"split_special_tokens": False}})
    _, (prompt,) = renderer.render_chat([[{"role": "user", "content": quoted}]], switched)
    text = f"<|startoftext|>{quoted}<|extra_0|>"
    assert prompt["prompt_token_ids"] == tokenizer.encode(text, add_special_tokens=False)


def test_vllm_gives_a_plain_prompt_its_start_and_no_end(renderer: HfRenderer, tokenizer: HYTokenizer) -> None:
    (prompt,) = renderer.render_cmpl([{"prompt": "sea water"}])
    sea_water = tokenizer.encode("sea water", add_special_tokens=False)
    assert prompt["prompt_token_ids"] == [tokenizer.convert_tokens_to_ids("<|startoftext|>"), *sea_water]


def test_vllm_passes_on_what_the_template_says(renderer: HfRenderer) -> None:
    with pytest.raises(VLLMValidationError, match="Unknown role in message 1; use system, user or assistant"):
        renderer.render_chat([[{"role": "tool", "content": "42", "tool_call_id": "1"}]], ChatParams())
