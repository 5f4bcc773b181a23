"""The tokenizer and the chat template of a checkpoint"""

import json
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hunyuan_vllm.chat_template import CHAT_TEMPLATE, Refused, known_faults, render, stored_template
from hunyuan_vllm.check.configs import ConfigFile, ids_of, stop_ids
from hunyuan_vllm.envs import CHECKPOINT_CHAT_TEMPLATE
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.text import some

if TYPE_CHECKING:
    from transformers import TokenizersBackend

TIKTOKEN, TOKENIZER_JSON = "hy.tiktoken", "tokenizer.json"
TEXTS = {
    "Chinese": "海水为什么是咸的？因为河流把盐带进了大海，约3.5%。",
    "English": "Why is sea water salty? Rivers carry salt into the sea; it's about 3.5%.",
    "code": "def f(x: int) -> str:\n\treturn f'{x:>8}'  # tabs,  two spaces\r\n\n",
    "emoji": "👩‍🔬🌊 naïve café e\u0301, ﷽ 한국어",
}
PUBLISHED_LINES = {129024: 127957, 128167: 127957}  # vocab_size → lines of the published hy.tiktoken


def check_tokenizer(
    directory: Path, config: ConfigFile, generation: dict[str, Any], section: Section
) -> "TokenizersBackend | None":
    """Load it and try it; None if it cannot be loaded."""
    names = [name for name in (TIKTOKEN, TOKENIZER_JSON) if (directory / name).exists()]
    if not names:
        text = f"there is neither {TIKTOKEN} nor {TOKENIZER_JSON}, so text cannot be served"
        remedy = "copy it from the published checkpoint, or serve with --tokenizer DIRECTORY"
        section.problem("tokenizer", text, remedy)
        return None
    try:
        tokenizer = _load(directory)
    except Exception as error:  # each library underneath has errors of its own, `tokenizers` a bare Exception
        section.problem("tokenizer", f"it cannot be loaded: {error}", f"download {' and '.join(names)} again")
        return None
    copy = f"copy {names[0]} from the published checkpoint again"
    _check_round_trip(tokenizer, copy, section)
    if config.network is not None:
        _check_size(directory / TIKTOKEN, tokenizer, config.network.vocab_size, copy, section)
    _check_special_ids(names[0] == TIKTOKEN, tokenizer, config, generation, copy, section)
    if section.sound:
        texts = f"{', '.join(TEXTS)} and special tokens"
        section.ok("tokenizer", f"{len(tokenizer):,} tokens from {names[-1]}; {texts} decode to what was encoded")
    return tokenizer


def _load(directory: Path) -> "TokenizersBackend":
    """With our class where a server takes it: for hy.tiktoken, and where no other class is named."""
    from transformers import TokenizersBackend

    from hunyuan_vllm.tokenizer import HYTokenizer

    try:
        named = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        named = None
    ours = (directory / TIKTOKEN).exists() or named in (None, "HYTokenizer", "HYTokenizerFast")
    loaded: TokenizersBackend = (HYTokenizer if ours else TokenizersBackend).from_pretrained(directory)
    return loaded


def _check_round_trip(tokenizer: "TokenizersBackend", copy: str, section: Section) -> None:
    special = list(tokenizer.all_special_tokens)
    texts = TEXTS | {"special tokens": "".join(f"{token}x" for token in special)}
    for name, text in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(ids, skip_special_tokens=False)
        if back not in (text, unicodedata.normalize("NFC", text)):
            section.problem("round trip", f"{name} changes: {text!r:.60} becomes {back!r:.60}", copy)
    split = [token for token in special if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
    if split:
        section.problem("special tokens", f"{len(split):,} are not one id each", copy, split)


def _check_size(vocabulary: Path, tokenizer: "TokenizersBackend", rows: int, copy: str, section: Section) -> None:
    """Compare with the `rows` of the network's embedding, and for hy.tiktoken with the published file."""
    if len(tokenizer) > rows:
        text = f"it has {len(tokenizer):,} tokens and the network {rows:,} embeddings: the last tokens would fail"
        section.problem("vocabulary", text, "use the tokenizer and config.json of the same checkpoint")
    published = PUBLISHED_LINES.get(rows)
    lines = len(vocabulary.read_bytes().split()) // 2 if vocabulary.exists() else published  # token and rank
    if published and lines != published:
        text = f"{TIKTOKEN} has {lines:,} tokens and the published one {published:,}, so special ids are shifted"
        section.problem("vocabulary", text, copy)


def _check_special_ids(
    published: bool, tokenizer: Any, config: ConfigFile, generation: dict[str, Any], copy: str, section: Section
) -> None:
    """Compare the tokenizer's special ids with the configs'; `published`: its ids are those of hy.tiktoken."""
    stops = stop_ids(config, generation)
    source = "generation_config.json" if "eos_token_id" in generation else "config.json"
    if stops and tokenizer.eos_token_id not in stops:
        text = f"{tokenizer.eos_token} is id {tokenizer.eos_token_id}, and {source} ends answers at {_list(stops)}"
        if not published:
            remedy = f"leave it if the chat template's answers end at {_list(stops)}; otherwise correct {source}"
            section.warning("special ids", text, remedy)
            return
        section.problem("special ids", text, f"{copy}, or the {source} that belongs to it")
        return
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if odd := [stop for stop in stops if stop not in special]:
        seen = ", ".join(f"{stop} is {_token(tokenizer, stop)}" for stop in odd)
        section.problem("special ids", f"{source} ends answers at ids that are not special tokens: {seen}", copy)
    stated = {"pad_token_id": generation.get("pad_token_id")}
    if not config.is_v1:  # published V1 configs have other ids, which nothing reads
        stated |= {name: config.fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in stated.items():
        has = getattr(tokenizer, name)
        if value is not None and has is not None and has not in ids_of(value):
            text = f"{name} is {_list(ids_of(value))} in the checkpoint's configs and {has} in the tokenizer"
            section.warning("special ids", text, f"if the tokenizer is right, correct {name}; otherwise {copy}")


def _token(tokenizer: "TokenizersBackend", token: Any) -> str:
    if not isinstance(token, int) or not 0 <= token < len(tokenizer):
        return "not in the vocabulary"
    return repr(tokenizer.decode([token]))


def _list(ids: list[Any]) -> str:
    return " or ".join(map(str, ids))


MARKUP = re.compile(r"<([|｜])[^|｜<>\s]+\1>")
SYSTEM, NO_SYSTEM = {"role": "system", "content": "Answer briefly."}, {"role": "system", "content": ""}
QUESTION, ANSWER = {"role": "user", "content": "海有多深？"}, {"role": "assistant", "content": "About 3,700 m."}
CONVERSATIONS = {
    "one turn": [QUESTION],
    "a system message": [SYSTEM, QUESTION],
    "an empty system message": [NO_SYSTEM, QUESTION],
    "several turns": [SYSTEM, QUESTION, ANSWER, QUESTION],
    "several turns without a system message": [QUESTION, ANSWER, QUESTION],
}
MAX_SHOWN = 120  # characters of a prompt


def check_template(
    directory: Path, tokenizer: "TokenizersBackend", config: ConfigFile, stops: list[Any], section: Section
) -> None:
    """Render conversations and check the result; `stops` are the ids at which generation ends."""
    stored, source = stored_template(directory)
    if faults := known_faults(stored or ""):
        section.warning(
            "template",
            f"{source} is wrong, so the built-in template is used instead: {'; '.join(faults)}",
            f"none needed; {CHECKPOINT_CHAT_TEMPLATE}=1 uses the checkpoint's. Other software needs a correct one",
            faults,
        )
    served = CHAT_TEMPLATE if faults or stored is None else stored
    remedy = f"copy {source} from the published checkpoint again"
    if not config.is_v1:
        remedy += "; without it the built-in template is used"
    rendered = _rendered(served, remedy, section)
    markup = sorted({match[0] for text in rendered.values() for match in MARKUP.finditer(text)})
    if split := [token for token in markup if len(tokenizer.encode(token, add_special_tokens=False)) != 1]:
        text = f"{some(split)} would be encoded as plain text: not special tokens of this tokenizer"
        section.problem("template", text, f"it was made for another model; {remedy}", split)
    _check_end(tokenizer, stops, rendered.get("several turns", ""), remedy, section)
    if section.sound:
        if not config.is_v1:
            _compare(rendered, source, section)
        whose = "the checkpoint's" if served == stored else "the built-in one"
        if stored is None:
            whose += ", as the checkpoint has none"
        section.ok("template", f"{whose}; {', '.join(CONVERSATIONS)} render, with {some(markup, 5)} as single ids")


def _rendered(template: str, remedy: str, section: Section) -> dict[str, str]:
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
    """Report prompts that differ from the format that Hunyuan-Large was trained on."""
    wanted = {name: render(CHAT_TEMPLATE, messages) for name, messages in CONVERSATIONS.items()}
    if different := [name for name, text in rendered.items() if text != wanted[name]]:
        first = different[0]
        section.warning(
            "template",
            f"{source} differs from the format of Hunyuan-Large for {', '.join(different)}: {first} is "
            f"{rendered[first]!r:.{MAX_SHOWN}} instead of {wanted[first]!r:.{MAX_SHOWN}}",
            "leave it if the model was trained with it; otherwise remove it, and the built-in template is used",
        )


def _check_end(tokenizer: "TokenizersBackend", stops: list[Any], text: str, remedy: str, section: Section) -> None:
    """The first token behind an answer is the one with which the model was trained to end answers."""
    end = MARKUP.match(text.partition(ANSWER["content"])[2].lstrip())
    if not end or not stops:
        return
    (token, *_) = tokenizer.encode(end[0], add_special_tokens=False)
    if token not in stops:
        text = f"answers end with {end[0]} (id {token}), but generation ends at {stops}: it would continue"
        section.problem("template", text, f"add {token} to eos_token_id in generation_config.json, or {remedy}")
