"""The text format of Hunyuan V1 replies, read a piece at a time, split anywhere.

    <think>
    …
    </think>
    <answer>
    助手：…<tool_calls>[{"name": …, "arguments": {…}}, …]</tool_calls>
    </answer>

Every part may be missing. Reading works on text alone: neither vocabulary has tokens for these tags.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

THINK, THINK_END = "<think>", "</think>"
ANSWER, ANSWER_END = "<answer>", "</answer>"
CALLS, CALLS_END = "<tool_calls>", "</tool_calls>"
ANY_CALLS, ANY_CALLS_END = "<tool_call", "</tool_call"  # Hermes' tags begin with these, too
ROLE = "助手："  # "assistant:", in which the prompt with tools asks for answers

LEADS = (THINK, ANSWER, ROLE)
ANSWER_TAGS = re.compile(r"<answer>\n?|</answer>\s*")
ANSWER_OR_CALL_TAGS = re.compile(rf"{ANSWER_TAGS.pattern}|<tool_calls>|</tool_calls>\s*")
ANSWER_TAGS_OR_ANY_CALL = re.compile(rf"{ANSWER_TAGS.pattern}|</?tool_call")
CERTAIN = 5  # characters of a tag that is cut off, from which on it is taken for one


def parsers_for(template: str) -> tuple[str | None, str | None]:
    """The names of the reasoning parser and the tool parser for what a chat template makes a model write; None where it
    writes nothing of the kind."""
    return "hunyuan_v1" if THINK in template else None, "hunyuan_v1" if CALLS in template else None


class ReplyReader:
    """Separates thinking from the answer, without their tags.

    It stops at the first tool call of the answer (`stopped`), or where the answer is bare JSON, and leaves the rest in
    `rest`: that is for a tool parser.

    Args:
        thinking: the prompt has opened the thinking already.
    """

    tags = ANSWER_TAGS_OR_ANY_CALL
    unfinished_tags: tuple[str, ...] = (ANSWER, ANSWER_END, ANY_CALLS, ANY_CALLS_END)
    opening_tags: tuple[str, ...] = (ANY_CALLS, ANY_CALLS_END)

    def __init__(self, thinking: bool = False) -> None:
        self.rest = ""  # read and not yet given out
        self._read_on: Callable[[bool], bool] = self._thinking if thinking else self._beginning
        self._thought = self._in_answer_tags = False
        self._reasoning = self._content = ""
        self._reasoning_begun = False

    @property
    def stopped(self) -> bool:
        return self._read_on == self._stop

    def read(self, text: str, last: bool = False) -> tuple[str, str]:
        """The reasoning and the content that `text` adds. With `last` nothing is held back any longer."""
        self.rest += text
        self._reasoning = self._content = ""
        while self._read_on(last):
            pass
        return self._reasoning, self._content

    def _beginning(self, last: bool) -> bool:
        """Before the answer's text: what may open is thinking, the answer's tag or its role."""
        text = self.rest.lstrip()
        if not last and any(lead.startswith(text) for lead in LEADS):
            return False
        if text.startswith(THINK):
            self.rest = text.removeprefix(THINK)
            self._read_on = self._thinking
        elif text.startswith(ANSWER):
            self.rest = text.removeprefix(ANSWER).removeprefix("\n")
            self._in_answer_tags = True
        elif text.startswith(ROLE):
            self.rest = text.removeprefix(ROLE)
        else:
            if self._thought and not self._in_answer_tags:
                self.rest = text
            self._read_on = self._answer_or_json(text)
        return True

    def _answer_or_json(self, text: str) -> Callable[[bool], bool]:
        # Other tool parsers have vLLM enforce a call as bare JSON, which no answer's tag surrounds then.
        return self._stop if text[:1] in ("[", "{") and not self._in_answer_tags else self._answer

    def _thinking(self, last: bool) -> bool:
        text, end, rest = self.rest.partition(THINK_END)
        if end:
            self.rest = rest
            self._thought = True
            self._read_on = self._beginning
            self._reason(text.rstrip())
            return True
        text = self._certain_text((THINK_END,), last)
        self._reason(text.rstrip() if last else text)
        return False

    def _reason(self, text: str) -> None:
        if not self._reasoning_begun:
            text = text.lstrip()
        self._reasoning_begun |= bool(text)
        self._reasoning += text

    def _answer(self, last: bool) -> bool:
        found = self.tags.search(self.rest)
        if found is None:
            self._content += self._certain_text(self.unfinished_tags, last)
            return False
        before, tag, after = self.rest[: found.start()], found[0].strip(), self.rest[found.end() :]
        text = before.rstrip()
        self._content += text
        if tag in self.opening_tags:
            self._open_calls(found)
            return True
        if not after and not last:  # the white space behind it may go on
            self.rest = self.rest[len(text) :]
            return False
        space = before[len(text) :]
        self.rest = (space.removesuffix("\n") if tag == ANSWER_END else space) + after
        return True

    def _open_calls(self, tag: re.Match[str]) -> None:
        self.rest = self.rest[tag.start() :]
        self._read_on = self._stop

    def _stop(self, last: bool) -> bool:
        return False

    def _certain_text(self, tags: tuple[str, ...], last: bool) -> str:
        """What has no part in a tag; what may have, with the white space before it, stays in `rest`."""
        start = self.rest.rfind("<")
        if start < 0 or not any(tag.startswith(self.rest[start:]) for tag in tags):
            start = len(self.rest)
        text = self.rest[:start].rstrip()
        self.rest = self.rest[len(text) :]
        if last:
            text += "" if len(self.rest.strip()) >= CERTAIN else self.rest
            self.rest = ""
        return text


@dataclass
class Call:
    """A call; `arguments` is JSON text, of a call that is not done its beginning."""

    name: str = ""
    arguments: str = ""
    done: bool = False


class CallReader(ReplyReader):
    """Separates the calls (`calls`) from the text around them. Thinking is text here, with its tags; no call is in it.

    What should be the list of calls and is not becomes text, without its tags. Of a call that is cut off nothing does.

    Args:
        whole: the reply is read from its beginning; otherwise an answer from somewhere within.
        calls: there may be calls; otherwise their tags are text.
    """

    opening_tags = (CALLS,)

    def __init__(self, whole: bool, calls: bool) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.tags = ANSWER_OR_CALL_TAGS if calls else ANSWER_TAGS
        self.unfinished_tags = (ANSWER, ANSWER_END, CALLS, CALLS_END) if calls else (ANSWER, ANSWER_END)
        if not whole:
            self._read_on = self._answer

    def read(self, text: str, last: bool = False) -> tuple[str, str]:
        thought_before, reasoning_before = self._thought, self._reasoning_begun
        reasoning, content = super().read(text, last)
        if self._reasoning_begun and not reasoning_before:
            reasoning = f"{THINK}\n{reasoning}"
        if self._reasoning_begun and self._thought and not thought_before:
            reasoning = f"{reasoning}\n{THINK_END}\n"
        return "", reasoning + content

    def _answer_or_json(self, text: str) -> Callable[[bool], bool]:
        return self._answer

    def _open_calls(self, tag: re.Match[str]) -> None:
        self.rest = self.rest[tag.end() :]
        self._list = CallList(self.calls)
        self._read_on = self._list_of_calls

    def _list_of_calls(self, last: bool) -> bool:
        calls = self._list
        self.rest = calls.read(self.rest)
        if calls.closed:
            self._read_on = self._space
            return True
        text = calls.unfinished + self.rest
        if calls.malformed or (last and CALLS_END in text):
            self.rest = text.lstrip(", \n")
            self._read_on = self._answer
            return True
        return False

    def _space(self, last: bool) -> bool:
        """Between the list and what follows, its end tag as a rule."""
        self.rest = self.rest.lstrip()
        if not self.rest and not last:
            return False
        self._read_on = self._answer
        return True


# The next token of JSON, outside a string and within one. A number ends where something else begins.
TOKEN = re.compile(
    r'\s+|[][{}:,"]|(?:true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)(?=[\s,\]}])', re.ASCII
)
IN_STRING = re.compile(r'[^"\\\x00-\x1f]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|["\x00-\x1f]')
UNFINISHED_TOKEN = re.compile(r"[-+.\w]*", re.ASCII)
UNFINISHED_IN_STRING = re.compile(r"(?:\\(?:u[0-9a-fA-F]{0,3})?)?")


class CallList:
    """`[{"name": …, "arguments": {…}}, …]`, checked token by token, so that a call's arguments may be shown while they
    are being written. Control characters in strings, which JSON forbids and models write, are escaped.
    """

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.closed = self.malformed = False
        self.unfinished = ""  # the text since the last call that is done
        self._open: list[str] = []
        self._expected = "value"  # value, value or ], key, key or }, :, more
        self._string: str | None = None  # the text so far of the string that is being read
        self._key = ""  # of the call's member that is being read
        self._copying = False  # what is being read belongs to arguments

    def read(self, text: str) -> str:
        """The rest of `text`, behind the list or from where it is malformed or unfinished."""
        at = 0
        while not self.closed:
            in_string = self._string is not None
            found = (IN_STRING if in_string else TOKEN).match(text, at)
            if found is None:
                unfinished = UNFINISHED_IN_STRING if in_string else UNFINISHED_TOKEN
                self.malformed = unfinished.fullmatch(text, at) is None
                break
            if not self._take(found[0]):
                self.malformed = True
                break
            at = found.end()
            self.unfinished = "" if self._between_calls and found[0] == "}" else self.unfinished + found[0]
        return text[at:]

    @property
    def _between_calls(self) -> bool:
        return len(self._open) == 1

    @property
    def _in_call(self) -> bool:
        return len(self._open) == 2

    def _take(self, token: str) -> bool:
        """Whether the list may go on with `token`."""
        if self._string is not None:
            return self._take_in_string(token)
        if token.isspace():
            self._copy(token)
            return True
        if token in ("]", "}"):
            return self._close(token)
        if token in (":", ","):
            if self._expected != (":" if token == ":" else "more"):
                return False
            self._copy(token)
            self._expected = "key" if token == "," and self._open[-1] == "{" else "value"
            return True
        if token == '"' and self._expected.startswith("key"):
            self._string, self._expected = "", "key"
            self._copy(token)
            return True
        return self._expected.startswith("value") and self._begin_value(token)

    def _begin_value(self, token: str) -> bool:
        if len(self._open) < 2 and token != ("[", "{")[len(self._open)]:
            return False
        if self._between_calls:
            self.calls.append(Call())
            self._key = ""
        elif self._in_call and self._key == "name":
            if token != '"' or self.calls[-1].name:
                return False
        elif self._in_call and self._key == "arguments":
            if self.calls[-1].arguments:
                return False
            self._copying = token not in ('"', "null")
        self._copy(token)
        self._expected = "value"
        if token == '"':
            self._string = ""
        elif token in ("[", "{"):
            self._open.append(token)
            self._expected = "value or ]" if token == "[" else "key or }"
        else:
            self._end_value()
        return True

    def _take_in_string(self, token: str) -> bool:
        assert self._string is not None
        if token < " ":
            token = json.dumps(token)[1:-1]
        self._copy(token)
        if token != '"':
            self._string += token
            return True
        text: str = json.loads(f'"{self._string}"')
        self._string = None
        if not text.isprintable() and any("\ud800" <= char <= "\udfff" for char in text):  # half a surrogate pair
            return False
        if self._expected == "key":
            self._expected = ":"
            if self._in_call:
                self._key = text
            return True
        if self._in_call and self._key == "name":
            self.calls[-1].name = text
        elif self._in_call and self._key == "arguments":  # JSON within JSON
            self.calls[-1].arguments = text
        self._end_value()
        return True

    def _close(self, token: str) -> bool:
        if not self._open or self._open[-1] != ("[" if token == "]" else "{"):
            return False
        if self._expected not in ("more", f"value or {token}", f"key or {token}"):
            return False
        if self._in_call and not self.calls[-1].name:
            return False
        self._open.pop()
        self._copy(token)
        self._end_value()
        return True

    def _end_value(self) -> None:
        self._expected = "more"
        if self._in_call:
            self._copying = False
        elif self._between_calls:
            call = self.calls[-1]
            call.arguments = call.arguments or "{}"
            call.done = True
        self.closed = not self._open

    def _copy(self, token: str) -> None:
        if self._copying:
            self.calls[-1].arguments += token
