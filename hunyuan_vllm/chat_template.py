"""The built-in chat template, and what a checkpoint's own template is known to get wrong of the same format.

<|startoftext|>system<|extra_4|>user<|extra_0|>assistant<|eos|><|startoftext|>user<|extra_0|>assistant<|eos|> …

The format has one system text, in front: several system messages are joined. Where there is no user message, an answer
to the system message alone is asked for by an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hunyuan_vllm.envs import CHECKPOINT_CHAT_TEMPLATE

__all__ = ["CHAT_TEMPLATE", "WITH_TOOLS", "Refused", "known_faults", "render", "replacement", "stored_template"]

WITH_TOOLS = Path(__file__).with_name("chat_template_with_tools.jinja")  # for `hunyuan-vllm serve --tools`
TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
START, SYSTEM_END, ANSWER_END = "<|startoftext|>", "<|extra_4|>", "<|eos|>"

CHAT_TEMPLATE = r"""
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{ content }}
  {%- elif content -%}
    {%- if content | rejectattr('type', 'equalto', 'text') | list -%}
      {{ raise_exception('This model reads text only: a content part has another type than "text".') }}
    {%- endif -%}
    {{ content | map(attribute='text') | select | join('\n') }}
  {%- endif -%}
{%- endmacro -%}
{%- set turn = namespace(open=false, system='') -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set content = text_of(message['content']) -%}
  {%- if content -%}
    {%- set turn.system = turn.system + ('\n\n' if turn.system else '') + content -%}
  {%- endif -%}
{%- endfor -%}
{%- if turn.system -%}
  {{ '<|startoftext|>' + turn.system + '<|extra_4|>' }}
  {%- set turn.open = true -%}
{%- endif -%}
{%- for message in messages -%}
  {%- set content = text_of(message['content']) -%}
  {%- if message['role'] == 'system' -%}
  {%- elif message['role'] == 'user' -%}
    {{ ('' if turn.open else '<|startoftext|>') + content + '<|extra_0|>' }}
    {%- set turn.open = false -%}
  {%- elif message['role'] == 'assistant' -%}
    {{ content + '<|eos|>' }}
    {%- set turn.open = false -%}
  {%- else -%}
    {#- Not quoted: vLLM logs this, and what clients send is not for logs. -#}
    {{ raise_exception('Unknown role in message ' ~ loop.index ~ '; use system, user or assistant.') }}
  {%- endif -%}
{%- endfor -%}
{%- if turn.open and add_generation_prompt -%}
  {{ '<|extra_0|>' }}
{%- endif -%}
""".lstrip()


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
    wrong for that.
    """
    system, late = _message("system", "SYSTEM"), _message("system", "LATE")
    user, answer, again = _message("user", "USER"), _message("assistant", "ANSWER"), _message("user", "AGAIN")
    for usual in ([system, user], [system, user, answer, again]):
        if _outcome(template, usual) != render(CHAT_TEMPLATE, usual):
            return ()
    faults = []
    without_system = str(_outcome(template, [user]))
    if f"USER{SYSTEM_END}" in without_system:
        faults.append(f"without a system message the user's text is closed by {SYSTEM_END}, as a system prompt is")
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


def stored_template(folder: Path) -> tuple[str | None, str]:
    """The checkpoint's template, None if it has none, and the file that it is in; as transformers looks for it."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8", errors="replace"), TEMPLATE_FILE
    try:
        given = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8")).get("chat_template")
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
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike jinja's own filter, it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise Refused(message)
