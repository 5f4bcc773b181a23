"""The calibration text: documents from a file or the package, as token ids packed into rows of one length."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.jsonl import Line, read_lines, refuse_other_encodings

BUILT_IN = Path(__file__).with_name("calibration.jsonl")
ROW = 1024  # tokens: longest document that is seen in one piece
CHARACTERS_A_TOKEN = 16  # more than any text has on average: how much of a long file is looked at

Document = str | list[dict[str, Any]]
"""Plain text, or the messages of a chat."""


@dataclass(frozen=True)
class Tokens:
    """Rows of documents. A document sees itself alone, from position 0.

    Attributes:
        ids: token ids, int64 `[rows, length]`.
        positions: within the document, alike.
        documents: the number of the document, alike.
    """

    ids: Tensor
    positions: Tensor
    documents: Tensor

    @property
    def mask(self) -> Tensor:
        """What sees what, boolean `[rows, 1, length, length]`."""
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return (causal & (self.documents[:, :, None] == self.documents[:, None, :]))[:, None]

    def digest(self) -> str:
        """Names these rows."""
        packed = torch.stack((self.ids, self.positions, self.documents)).numpy().tobytes()
        return hashlib.sha256(f"{list(self.ids.shape)}".encode() + packed).hexdigest()


def calibration_tokens(
    directory: Path, vocab_size: int, given: Path | Sequence[Sequence[int]] | None, limit: int
) -> Tokens:
    """The rows that calibration reads, at most `limit` tokens.

    Args:
        given: a file of text or chats, documents as token ids, or None for the built-in text.
    """
    if isinstance(given, Path | None):
        documents = read_documents(given or BUILT_IN, limit * CHARACTERS_A_TOKEN)
        given = list(tokenise(directory, documents, limit))
    return pack(given, limit, vocab_size)


def read_documents(path: Path, characters: int = -1, option: str = "--calibration") -> Iterator[Document]:
    """The documents of a file: a .jsonl holds one a line, `{"messages": [...]}` or `{"text": "..."}`; any other is one
    plain text, of which no more than `characters` are read, if not all. `option` is what named the file.
    """
    found = False
    try:
        refuse_other_encodings(path)
        if path.suffix != ".jsonl":
            with path.open(encoding="utf-8-sig") as file:
                text = file.read(characters)
            if text.strip():
                found = True
                yield text
        else:
            for line in read_lines(path):
                found = True
                yield _document(line, path)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise UserError(f"{option} {path} is not UTF-8 text: {where}; convert it, with iconv for instance") from None
    if not found:
        raise UserError(f"{option} {path} is empty: it needs text, or one chat per line in a .jsonl file")


def tokenise(directory: Path, documents: Iterable[Document], limit: int) -> Iterator[list[int]]:
    """Token ids of documents, by the tokenizer and the chat template of the checkpoint in `directory`, until there are
    `limit` of them; a long text becomes several documents.
    """
    from hunyuan_vllm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory)
    head = tokenizer("")["input_ids"][:1]
    for number, document in enumerate(documents, start=1):
        if isinstance(document, str):
            ids = tokenizer(document, add_special_tokens=False)["input_ids"]
            step = ROW - len(head)
            pieces = [head + ids[start : start + step] for start in range(0, len(ids), step)]
        else:
            try:
                text = tokenizer.apply_chat_template(document, tokenize=False)
            except Exception as error:  # a template raises what it likes
                raise UserError(f"chat {number} of the calibration file does not fit the template: {error}") from None
            pieces = [tokenizer(text, add_special_tokens=False)["input_ids"][:ROW]]
        for piece in pieces:
            yield piece
            limit -= len(piece)
            if limit <= 0:
                return


def pack(documents: Iterable[Sequence[int]], limit: int, vocab_size: int) -> Tokens:
    """Fill rows with documents, at most `limit` tokens; one that reaches beyond its row is cut there."""
    flat: list[tuple[int, int, int]] = []
    for number, document in enumerate(documents):
        room = min(ROW - len(flat) % ROW, limit - len(flat))
        flat += [(token, position, number) for position, token in enumerate(document[:room])]
        if len(flat) == limit:
            break
    if not flat:
        raise UserError("the calibration text has no token")
    length = min(ROW, len(flat))
    rows = torch.tensor(flat[: len(flat) // length * length]).T.reshape(3, -1, length)
    if (worst := int(rows[0].max())) >= vocab_size:
        raise UserError(f"the tokenizer gives id {worst}, the model has {vocab_size} tokens: it is not this model's")
    return Tokens(*rows)


def _document(line: Line, path: Path) -> Document:
    if line.broken:
        raise UserError(f"line {line.number} of {path} is not JSON: {line.broken}")
    match line.given:
        case {"messages": [{"role": str(), "content": _}, *rest] as messages}:
            if all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in rest):
                return messages
        case {"text": str(text)} if text.strip():
            return text
    form = '{"messages": [{"role": "user", "content": "..."}, ...]} nor {"text": "..."}'
    raise UserError(f"line {line.number} of {path} is neither {form}")
