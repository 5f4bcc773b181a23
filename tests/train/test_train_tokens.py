"""Token ids of training are those of serving, and only the assistant's words are learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizer_texts import VOCABS

from hunyuan_vllm.demo import path as demo_path
from hunyuan_vllm.evaluation.passages import chat_passage
from hunyuan_vllm.tokenizer import HYTokenizer, load_tokenizer
from hunyuan_vllm.train.messages import BadConversation, Conversation
from hunyuan_vllm.train.tokens import IGNORED, Example, encode

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
CONVERSATIONS = {
    "single turn": [(USER, "Why is sea water salty?"), (ASSISTANT, "Because of salts.")],
    "system": [(SYSTEM, "Be brief."), (USER, "海水为什么是咸的？"), (ASSISTANT, "因为有盐。")],
    "no system": [(SYSTEM, ""), (USER, "Hi"), (ASSISTANT, "Hello.")],
    "three turns": [
        (USER, "1"), (ASSISTANT, "a b"), (USER, " 2\n"), (ASSISTANT, "\n\nc "), (USER, "3"), (ASSISTANT, "d"),
    ],
    "system, two turns": [
        (SYSTEM, "S"), (USER, "e\u0301"), (ASSISTANT, "n\u0303o"), (USER, "'s"), (ASSISTANT, "'ll 7"),
    ],
    "marks and markup": [(USER, "{{ x }} <b> <|extra_7|>"), (ASSISTANT, "<|extra_9|> ok <|")],
}  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> HYTokenizer:
    return load_tokenizer(demo_path())


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation.model_validate({"messages": [{"role": role, "content": text} for role, text in turns]})


def served(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)


def check(given: Conversation, tokenizer: Any, default_system: str) -> None:
    """Against the template's own ids, and against what evaluation scores as the assistant's words."""
    messages = given.as_dicts(default_system)
    example = encode(given, tokenizer, default_system=default_system)
    assert example.input_ids == served(tokenizer, messages)
    scored = set(chat_passage(messages, tokenizer, 2**30).scored)
    wanted = [token if at in scored else IGNORED for at, token in enumerate(example.input_ids)]
    assert example.labels == wanted
    assert example.learned == len(scored)


@pytest.mark.parametrize("default_system", ["You are a helpful assistant.", ""])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_ids_are_those_that_are_served(turns: list[tuple[str, str]], default_system: str, demo: HYTokenizer) -> None:
    check(conversation(*turns), demo, default_system)


@pytest.mark.parametrize("vocab", VOCABS)
def test_with_other_vocabularies(vocab: Path) -> None:
    tokenizer = HYTokenizer(vocab_file=str(vocab))
    for turns in CONVERSATIONS.values():
        check(conversation(*turns), tokenizer, "You are a helpful assistant.")


def test_what_is_learned_in_words(demo: HYTokenizer) -> None:
    given = conversation((SYSTEM, "S"), (USER, "Hi"), (ASSISTANT, "Hello."), (USER, "Bye"), (ASSISTANT, "Bye bye."))
    example = encode(given, demo)
    learned = [token for token in example.labels if token != IGNORED]
    assert demo.decode(learned) == "Hello.<|eos|>Bye bye.<|eos|>"
    assert demo.decode(example.input_ids) == (
        "<|startoftext|>S<|extra_4|>Hi<|extra_0|>Hello.<|eos|><|startoftext|>Bye<|extra_0|>Bye bye.<|eos|>"
    )
    everything = encode(given, demo, train_on_all=True)
    assert everything.input_ids == everything.labels == example.input_ids
    assert everything.learned == len(everything) - 1  # nothing predicts the first token


def test_cutting() -> None:
    example = Example([1, 2, 3, 4], [IGNORED, IGNORED, 3, 4])
    assert example.cut(4) is example and example.learned == 2
    assert example.cut(3) == Example([1, 2, 3], [IGNORED, IGNORED, 3], truncated=True)
    assert example.cut(2).learned == 0


@pytest.mark.parametrize("mark", ["\u0338", "\u0301"])
def test_a_combining_mark_at_the_start_of_an_answer(mark: str, demo: HYTokenizer) -> None:
    """U+0338 composes with the ">" of the special token before it, as in the text that is served; U+0301 does not."""
    given = conversation((USER, "Hi"), (ASSISTANT, f"{mark}a"))
    check(given, demo, "S")
    assert demo.decode([label for label in encode(given, demo).labels if label != IGNORED]).endswith("a<|eos|>")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = load_tokenizer(demo_path())
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|eos|>{% endfor %}"
    with pytest.raises(BadConversation, match="renders earlier turns differently once message 2"):
        encode(conversation((USER, "Hi"), (ASSISTANT, "a")), tokenizer, default_system="")


def test_a_template_that_refuses_names_its_reason() -> None:
    tokenizer = load_tokenizer(demo_path())
    tokenizer.chat_template = "{{ raise_exception('no system messages, please') }}"
    with pytest.raises(BadConversation, match="the chat template refuses it: no system messages, please"):
        encode(conversation((USER, "Hi"), (ASSISTANT, "a")), tokenizer)


def test_a_template_of_the_checkpoints_own(demo: HYTokenizer) -> None:
    """One that puts nothing special between question and answer: the ids are still those of the whole."""
    tokenizer = load_tokenizer(demo_path())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '\n' + m.role + ':' if m.role != 'assistant' else '' }} {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    given = conversation((USER, "1 2"), (ASSISTANT, "3 4"))
    example = encode(given, tokenizer)
    assert example.input_ids == served(tokenizer, given.as_dicts())
