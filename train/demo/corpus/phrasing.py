"""The many ways in which people put one question: politeness, punctuation, capitals, an introduction, a remark behind.

Wrappers marked as fresh never occur in training: the evaluation uses them to ask in words that the model has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from .task import Language

__all__ = ["introduce", "rephrase", "rephrase_fresh", "rephrase_indirect"]

_OPENERS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Please tell me: ",
        "Can you tell me: ",
        "Can you tell me ",
        "Could you tell me ",
        "Could you tell me: ",
        "Please tell me ",
        "Tell me, ",
        "Tell me ",
        "Do you know ",
        "Do you know: ",
        "I want to know ",
        "I would like to know: ",
        "I want to ask: ",
        "Hi, ",
        "Hi! ",
        "Hello, ",
        "Hello! ",
        "Hey, ",
        "Question: ",
        "Q: ",
        "I have a question: ",
        "I have a question. ",
        "Please answer: ",
        "Please answer this question: ",
        "Answer this: ",
        "Excuse me, ",
        "Please explain: ",
        "Please, ",
        "So ",
        "Well, ",
        "OK, ",
        "My question is: ",
        "I wonder ",
    ),
    "zh": (
        "请问",
        "请问，",
        "请问：",
        "请告诉我",
        "请告诉我，",
        "请告诉我：",
        "告诉我",
        "我想知道",
        "我想知道，",
        "我想问一下，",
        "想问一下",
        "问一下，",
        "麻烦问一下，",
        "你好，",
        "你好！",
        "您好，",
        "你好，请问",
        "请回答：",
        "请回答，",
        "回答问题：",
        "问题：",
        "问：",
        "我有一个问题：",
        "能不能告诉我",
        "能告诉我",
        "可以告诉我",
        "你知道",
        "请解释：",
        "那么，",
        "请你回答：",
    ),
}
_CLOSERS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        " Please.",
        " Thanks.",
        " Thank you!",
        " Thanks!",
        " Answer briefly.",
        " Please answer briefly.",
        " Please answer in one sentence.",
        " Output the result directly.",
        " Just give the answer.",
        " Please explain.",
        " I am curious.",
        " Please help.",
        " Tell me.",
    ),
    "zh": (
        "谢谢。",
        "谢谢！",
        "请简单回答。",
        "请直接回答。",
        "直接输出结果。",
        "直接给出答案。",
        "请用一句话回答。",
        "请告诉我。",
        "我很好奇。",
        "请回答。",
        "简单说一下。",
        "请解释一下。",
    ),
}
_COMMANDS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Please ",
        "Can you ",
        "Could you ",
        "Could you please ",
        "Can you please ",
        "Would you ",
        "Help me ",
        "I want you to ",
    ),
    "zh": ("请", "请你", "麻烦", "帮我", "请帮我", "能不能", "你能", "麻烦你"),
}
_INDIRECT: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Can you tell me {}?",
        "Could you tell me {}?",
        "Could you please tell me {}?",
        "Can you please tell me {}?",
        "Please tell me {}.",
        "Can you explain {}?",
        "Could you explain {}?",
        "Please explain {}.",
        "Explain {}.",
        "Tell me {}.",
        "Do you know {}?",
        "I want to know {}.",
        "I would like to know {}.",
        "I'd like to know {}.",
        "I wonder {}.",
        "Explain to me {}.",
        "Would you tell me {}?",
        "Can you help me understand {}?",
    ),
    "zh": (
        "你知道{}吗？",
        "能告诉我{}吗？",
        "可以告诉我{}吗？",
        "你能告诉我{}吗？",
        "你可以告诉我{}吗？",
        "能不能告诉我{}？",
        "请解释{}。",
        "请解释一下{}。",
        "解释一下{}。",
        "我想知道{}。",
        "告诉我{}。",
        "请告诉我{}。",
        "能解释一下{}吗？",
        "你能解释一下{}吗？",
        "请说明{}。",
        "请说说{}。",
        "说一说{}。",
        "想了解一下{}。",
    ),
}
_FRESH_OPENERS: Final[dict[Language, tuple[str, ...]]] = {
    "en": ("Quick question: ", "My friend asks: ", "Good morning, please answer: ", "May I ask ", "Let me ask you: "),
    "zh": ("早上好，请问", "朋友问我：", "请教一下，", "老师您好，", "那请你说说，"),
}
_FRESH_CLOSERS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (" Keep it short.", " Many thanks.", " Please tell me now."),
    "zh": ("多谢。", "请说一下答案。", "麻烦你了。"),
}
_IMPERATIVES: Final[dict[Language, tuple[str, ...]]] = {
    "en": ("Rank", "List", "Sort", "Order", "Arrange", "Name", "Recite", "Translate", "Write", "Explain", "Give"),
    "zh": ("按", "把", "将", "给", "列出", "对", "依", "背", "说出", "写", "画", "唱", "推荐", "解释", "介绍"),
}
_END_MARKS: Final = "?.!？。！"


def rephrase(question: str, language: Language, rng: Random) -> str:
    """A natural variation of a plain question, in a training wrapper."""
    if _is_command(question, language) and rng.random() < 0.35:
        command = rng.choice(_COMMANDS[language])
        asks = command.startswith(("Can", "Could", "Would", "能", "你能"))
        stem = _lower_first(question.rstrip(_END_MARKS), language)
        end = {"en": "?", "zh": "吗？"}[language] if asks else question[len(question.rstrip(_END_MARKS)) :]
        return _casing(command + stem + _loosen(end, language, rng), language, rng)
    return _wrap(question, language, rng, _OPENERS[language], _CLOSERS[language], opener_share=0.35, closer_share=0.12)


def introduce(question: str, language: Language, rng: Random) -> str:
    """The question behind an introduction, or typed carelessly: nothing that a task works on changes."""
    draw = rng.random()
    if draw < 0.4:
        return rng.choice(_OPENERS[language]) + _lower_first(question, language)
    return _lower_first(question, language) if draw < 0.7 else question.rstrip(_END_MARKS)


def rephrase_fresh(question: str, language: Language, rng: Random) -> str:
    """A variation in a wrapper that training never uses."""
    opener_share = rng.choice((0.0, 1.0))
    openers, closers = _FRESH_OPENERS[language], _FRESH_CLOSERS[language]
    return _wrap(question, language, rng, openers, closers, opener_share, closer_share=1.0 - opener_share)


def rephrase_indirect(clause: str, language: Language, rng: Random) -> str:
    """A question built around an indirect clause such as "why the sea is salty"."""
    return _ending(_casing(rng.choice(_INDIRECT[language]).format(clause), language, rng), language, rng)


def _wrap(
    question: str,
    language: Language,
    rng: Random,
    openers: Sequence[str],
    closers: Sequence[str],
    opener_share: float,
    closer_share: float,
) -> str:
    text = question
    if rng.random() < opener_share:
        text = rng.choice(openers) + (_lower_first(text, language) if rng.random() < 0.7 else text)
    if rng.random() < closer_share:
        text = (text if text[-1] in _END_MARKS else text + {"en": "?", "zh": "？"}[language]) + rng.choice(closers)
    return _ending(_casing(text, language, rng), language, rng)


def _is_command(question: str, language: Language) -> bool:
    return question.startswith(_IMPERATIVES[language])


def _lower_first(text: str, language: Language) -> str:
    return text if language == "zh" or text.startswith(("I ", "Li ")) else text[:1].lower() + text[1:]


def _casing(text: str, language: Language, rng: Random) -> str:
    """Mostly as written; sometimes without the first capital, all lower case, rarely all capitals."""
    draw = rng.random()
    if language == "zh" or draw < 0.68:
        return text
    if draw < 0.84:
        return _lower_first(text, language)
    return text.lower() if draw < 0.985 else text.upper()


def _ending(text: str, language: Language, rng: Random) -> str:
    stem = text.rstrip(_END_MARKS)
    return stem + _loosen(text[len(stem) :], language, rng)


def _loosen(mark: str, language: Language, rng: Random) -> str:
    """The closing mark as it is typed in practice: right, missing, doubled, or from the other language's keyboard."""
    draw = rng.random()
    if draw < 0.6:
        return mark
    if draw < 0.9:
        return ""
    if language == "zh":
        return rng.choice(("?", "？", "。", "呢？" if mark == "？" else "。"))
    return rng.choice(("?", ".", " ?", "??", "!"))
