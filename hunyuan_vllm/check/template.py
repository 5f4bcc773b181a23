"""The chat template: that it renders, that its markup is made of special tokens, and that answers end where it says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hunyuan_vllm.chat_template import CHAT_TEMPLATE
from hunyuan_vllm.findings import Section, some

if TYPE_CHECKING:
    from hunyuan_vllm.tokenizer import HYTokenizer

__all__ = ["check_template"]

MARKUP = re.compile(r"<\|[^|<>\s]+\|>")
SYSTEM = {"role": "system", "content": "Answer briefly."}
QUESTION, ANSWER = {"role": "user", "content": "海有多深？"}, {"role": "assistant", "content": "About 3,700 m."}
CONVERSATIONS = {
    "one turn": [QUESTION],
    "a system message": [SYSTEM, QUESTION],
    "several turns": [SYSTEM, QUESTION, ANSWER, QUESTION],
}
OWN = "copy tokenizer_config.json and chat_template.jinja from the published checkpoint again"


def check_template(tokenizer: HYTokenizer, stops: list[Any], section: Section) -> None:
    """Render conversations and look at the result; `stops` are the ids at which generation ends."""
    built_in = tokenizer.chat_template == CHAT_TEMPLATE
    remedy = f"{OWN}; without them the built-in template is used"
    rendered = {}
    for name, messages in CONVERSATIONS.items():
        try:
            rendered[name] = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # whatever a template's author raises, jinja's own errors among them
            section.problem("template", f"it fails on {name}: {error}", remedy)
            continue
        if lost := [message["content"] for message in messages if message["content"] not in rendered[name]]:
            section.problem("template", f"it loses what was said in {name}: {lost[0]!r}", remedy)
    markup = sorted({token for text in rendered.values() for token in MARKUP.findall(text)})
    if split := [token for token in markup if len(tokenizer.encode(token, add_special_tokens=False)) != 1]:
        text = f"{some(split)} would be spelt out in letters: not special tokens of this tokenizer"
        section.problem("template", text, f"it was made for another model; {remedy}", split)
    _check_end(tokenizer, stops, rendered.get("several turns", ""), section)
    if section.sound:
        whose = "the built-in one, as the checkpoint has none" if built_in else "the checkpoint's"
        section.ok("template", f"{whose}; {', '.join(CONVERSATIONS)} render, with {some(markup, 5)} as single ids")


def _check_end(tokenizer: HYTokenizer, stops: list[Any], text: str, section: Section) -> None:
    """The first token behind an answer is what the model was trained to end answers with."""
    end = MARKUP.match(text.partition(ANSWER["content"])[2].lstrip())
    if not end or not stops:
        return
    (token, *_) = tokenizer.encode(end[0], add_special_tokens=False)
    if token not in stops:
        text = f"answers end with {end[0]} (id {token}), and generation ends at {stops}: it would run on"
        section.problem("template", text, f"add {token} to eos_token_id in generation_config.json, or {OWN}")
