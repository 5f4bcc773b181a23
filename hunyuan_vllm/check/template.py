"""The chat template: that it renders, in which format, that its markup is made of special tokens, and that answers end
where it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hunyuan_vllm.chat_template import CHAT_TEMPLATE, Refused, known_faults, render, stored_template
from hunyuan_vllm.envs import CHECKPOINT_CHAT_TEMPLATE
from hunyuan_vllm.findings import Section, some

if TYPE_CHECKING:
    from hunyuan_vllm.tokenizer import HYTokenizer

__all__ = ["check_template"]

MARKUP = re.compile(r"<\|[^|<>\s]+\|>")
SYSTEM, NO_SYSTEM = {"role": "system", "content": "Answer briefly."}, {"role": "system", "content": ""}
QUESTION, ANSWER = {"role": "user", "content": "海有多深？"}, {"role": "assistant", "content": "About 3,700 m."}
CONVERSATIONS = {
    "one turn": [QUESTION],
    "a system message": [SYSTEM, QUESTION],
    "an empty system message": [NO_SYSTEM, QUESTION],
    "several turns": [SYSTEM, QUESTION, ANSWER, QUESTION],
    "several turns without a system message": [QUESTION, ANSWER, QUESTION],
}
REMEDY = "copy {source} from the published checkpoint again; without it the built-in template is used"
SHOWN = 120  # characters of a prompt


def check_template(folder: Path, tokenizer: HYTokenizer, stops: list[Any], section: Section) -> None:
    """Render conversations and look at the result; `stops` are the ids at which generation ends."""
    stored, source = stored_template(folder)
    if faults := known_faults(stored or ""):
        section.warning(
            "template",
            f"{source} is wrong, and the built-in template is served instead: {'; '.join(faults)}",
            f"none needed; {CHECKPOINT_CHAT_TEMPLATE}=1 serves the checkpoint's. Other software needs a right one",
            faults,
        )
    served = CHAT_TEMPLATE if faults or stored is None else stored
    remedy = REMEDY.format(source=source)
    rendered = _rendered(served, remedy, section)
    markup = sorted({token for text in rendered.values() for token in MARKUP.findall(text)})
    if split := [token for token in markup if len(tokenizer.encode(token, add_special_tokens=False)) != 1]:
        text = f"{some(split)} would be spelt out in letters: not special tokens of this tokenizer"
        section.problem("template", text, f"it was made for another model; {remedy}", split)
    _check_end(tokenizer, stops, rendered.get("several turns", ""), remedy, section)
    if section.sound:
        _compare(rendered, source, section)
        whose = "the checkpoint's" if served == stored else "the built-in one"
        if stored is None:
            whose += ", as the checkpoint has none"
        section.ok("template", f"{whose}; {', '.join(CONVERSATIONS)} render, with {some(markup, 5)} as single ids")


def _rendered(template: str, remedy: str, section: Section) -> dict[str, str]:
    """The prompts of the conversations that render."""
    rendered = {}
    for name, messages in CONVERSATIONS.items():
        try:
            rendered[name] = render(template, messages)
        except Refused as error:
            section.warning("template", f"it refuses {name}: {error}", "leave it if the model was trained so")
            continue
        except Exception as error:  # whatever a template's author raises, jinja's own errors among them
            section.problem("template", f"it fails on {name}: {error}", remedy)
            continue
        if lost := [message["content"] for message in messages if message["content"] not in rendered[name]]:
            section.problem("template", f"it loses what was said in {name}: {lost[0]!r}", remedy)
    return rendered


def _compare(rendered: dict[str, str], source: str, section: Section) -> None:
    """Report where prompts are not in the format that the published model was trained on."""
    wanted = {name: render(CHAT_TEMPLATE, messages) for name, messages in CONVERSATIONS.items()}
    if different := [name for name, text in rendered.items() if text != wanted[name]]:
        first = different[0]
        section.warning(
            "template",
            f"{source} does not write the format of Hunyuan-Large for {', '.join(different)}: {first} is "
            f"{rendered[first]!r:.{SHOWN}} and not {wanted[first]!r:.{SHOWN}}",
            "leave it if the model was trained with it; else remove it, and the built-in template is used",
        )


def _check_end(tokenizer: HYTokenizer, stops: list[Any], text: str, remedy: str, section: Section) -> None:
    """The first token behind an answer is what the model was trained to end answers with."""
    end = MARKUP.match(text.partition(ANSWER["content"])[2].lstrip())
    if not end or not stops:
        return
    (token, *_) = tokenizer.encode(end[0], add_special_tokens=False)
    if token not in stops:
        text = f"answers end with {end[0]} (id {token}), and generation ends at {stops}: it would run on"
        section.problem("template", text, f"add {token} to eos_token_id in generation_config.json, or {remedy}")
