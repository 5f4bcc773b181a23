"""The built-in chat template, and conversations rendered so that special tokens in messages stay text"""

import json
import re
import secrets
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self, SupportsIndex

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hunyuan_vllm.envs import CHECKPOINT_CHAT_TEMPLATE
from hunyuan_vllm.replies import parsers_for

WITH_TOOLS = Path(__file__).with_name("chat_template_with_tools.jinja")  # for `hunyuan-vllm serve --tools`
TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
START, SYSTEM_END, ANSWER_END = "<|startoftext|>", "<|extra_4|>", "<|eos|>"

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


class Refused(TemplateError):
    """The template itself refuses the conversation, by `raise_exception`."""


def render(template: str, messages: Sequence[dict[str, Any]]) -> str:
    """The prompt of a conversation, rendered as transformers renders it: in a sandbox, without changing an object.

    Raises:
        Refused: the template refuses the conversation.
        TemplateError: it is not a template, or does what the sandbox forbids.
        Exception: whatever else its expressions raise.
    """
    tokens = {"bos_token": START, "eos_token": ANSWER_END, "pad_token": "<|pad|>"}
    return _compiled(template).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
    )


@lru_cache(maxsize=16)
def known_faults(template: str) -> tuple[str, ...]:
    """What a template that writes this model's format is known to get wrong, by what it renders.

    Empty if it makes none of these mistakes, or writes another format: a template that is not the built-in one is not
    wrong for that. One with thinking or calls of its own is left alone, too: the built-in one has neither.
    """
    if parsers_for(template) != (None, None):
        return ()
    system, late = _message("system", "SYSTEM"), _message("system", "LATE")
    user, answer, again = _message("user", "USER"), _message("assistant", "ANSWER"), _message("user", "AGAIN")
    for usual in ([system, user], [system, user, answer, again]):
        if _outcome(template, usual) != render(CHAT_TEMPLATE, usual):
            return ()
    faults = []
    without_system = str(_outcome(template, [user]))
    if f"USER{SYSTEM_END}" in without_system:
        faults.append(f"without a system message the user's text ends with {SYSTEM_END}, like a system prompt")
    elif START + START in without_system:
        faults.append(f"without a system message the prompt begins with {START} twice")
    empty = _outcome(template, [_message("system", ""), user]), _outcome(template, [_message("user", "")])
    failed = next(
        (outcome for outcome in empty if isinstance(outcome, Exception) and outcome.__class__ != Refused), None
    )
    if failed is not None:
        faults.append(f"an empty system message or first text fails: {failed}")
    elif START + START in str(empty[0]):
        faults.append(f"after an empty system message the prompt begins with {START} twice")
    bare = ANSWER_END + "LATE" + START
    for role, what in (("system", "a second system message"), ("tool", "a message of the role tool")):
        if bare in str(_outcome(template, [system, user, answer, late | {"role": role}, again])):
            faults.append(f"{what} is written without any mark")
    return tuple(faults)


def prompt_time(step: float, form: str) -> str:
    """`strftime_now` of chat templates: the local time, which changes every `step` seconds of the day; at once if 0."""
    now = datetime.now()
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    late = (now - midnight) % timedelta(seconds=step) if step else timedelta()
    return (now - late).strftime(form)


def stored_template(directory: Path) -> tuple[str | None, str]:
    """The checkpoint's template, None if it has none, and the file that it is in; as transformers looks for it."""
    if (directory / TEMPLATE_FILE).is_file():
        return (directory / TEMPLATE_FILE).read_text(encoding="utf-8", errors="replace"), TEMPLATE_FILE
    try:
        given = json.loads((directory / TOKENIZER_CONFIG).read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        given = None
    if isinstance(given, list):  # several, each with a name
        given = next((one["template"] for one in given if one["name"] == "default"), None)
    return given if isinstance(given, str) else None, f"chat_template of {TOKENIZER_CONFIG}"


def replacement(faults: Sequence[str]) -> str:
    """One line for a log: that a checkpoint's template is not used, and how it would be."""
    return (
        f"the checkpoint's chat template is wrong ({'; '.join(faults)}), and the built-in one is used instead; "
        f"{CHECKPOINT_CHAT_TEMPLATE}=1 uses the checkpoint's"
    )


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _outcome(template: str, messages: Sequence[dict[str, Any]]) -> str | Exception:
    try:
        return render(template, messages)
    except Exception as error:  # a template's expressions may raise anything
        return error


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, by which templates mark for training what the model says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": partial(prompt_time, 0)}
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike jinja's own filter, it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise Refused(message)


SLASH = (
    "\u0338"  # behind ">" it composes to one character, so a message that begins with it would undo a token before it
)
USUAL = re.compile(r"<\|(.+)\|>")


class RenderedChat(str):
    """A rendered conversation; `plain` are the places of special tokens in it that are plain text."""

    plain: frozenset[int]

    def __new__(cls, text: str, plain: Iterable[int]) -> Self:
        rendered = super().__new__(cls, text)
        rendered.plain = frozenset(plain)
        return rendered

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        """A slice, to which vLLM cuts prompts that are far too long, keeps what is plain."""
        part = super().__getitem__(index)
        if not isinstance(index, slice):
            return part
        start, _, step = index.indices(len(self))
        return RenderedChat(part, (place - start for place in self.plain)) if step == 1 else part


class SpecialTokens:
    """The special tokens of one vocabulary, as they are looked for in text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        usual = {match[1] for token in tokens if (match := USUAL.fullmatch(token))}
        others = sorted((token for token in tokens if not USUAL.fullmatch(token)), key=len, reverse=True)
        alternatives = [re.escape(token) for token in others]
        # The first character of what may be a token, or of the part of one that a template puts together.
        self._risky = re.compile("|".join([rf"<(?=\||\Z)|\A[|{SLASH}]", *(f"(?={one})." for one in alternatives)]))
        inner = "|".join(map(re.escape, sorted(usual)))
        self._token = re.compile("|".join([rf"<\|(?:{inner})\|>", *alternatives]))

    def mark(self, content: Any, mark: str) -> Any:
        """`content` (strings in lists and objects) with `mark` wherever it may bring a special token."""
        if isinstance(content, str):
            return self._risky.sub(lambda match: match[0] + mark, content)
        if isinstance(content, dict):
            return {self.mark(name, mark): self.mark(value, mark) for name, value in content.items()}
        if isinstance(content, list | tuple):
            return [self.mark(item, mark) for item in content]
        return content

    def unmark(self, text: str, mark: str) -> str:
        first, *others = text.split(mark)
        if not others:
            return text
        marks, length = [], len(first)
        for part in others:
            marks.append(length)
            length += len(part)
        clean = first + "".join(others)
        plain = (
            match.start()
            for match in self._token.finditer(clean)
            if bisect_right(marks, match.start()) < bisect_left(marks, match.end())
        )
        return RenderedChat(clean, plain)

    def pieces(self, text: RenderedChat) -> Iterator[tuple[str, int, bool]]:
        """(piece, its place, whether it is a special token), in order; no piece is empty."""
        end = 0
        for match in self._token.finditer(text):
            if match.start() in text.plain:
                continue
            if match.start() > end:
                yield str.__getitem__(text, slice(end, match.start())), end, False
            yield match[0], match.start(), True
            end = match.end()
        if end < len(text):
            yield str.__getitem__(text, slice(end, None)), end, False


def new_mark() -> str:
    """Digits between two code points that no text uses: template filters leave it as it is."""
    mark = f"\ufdd0{secrets.randbelow(10**24):024}\ufdd1"
    assert unicodedata.is_normalized("NFC", mark)
    return mark
