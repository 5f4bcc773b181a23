"""Examples as token ids in the published chat format, with a mask of what the model is to learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import torch
from corpus.dialogue import Chat, Corpus, Document, Exchange
from torch import Tensor

from hunyuan_vllm.bpe import EOS, PAD, SPECIAL_TOKENS, START_OF_TEXT, TextEncoder, read_tokens

__all__ = ["IGNORED", "Batch", "Encoder", "batches"]

IGNORED: Final = -100
POOL: Final = 2000


class Encoder:
    """Token ids of chats and documents: special tokens follow the vocabulary's ranks in the published order."""

    def __init__(self, vocabulary: Path) -> None:
        self._tokens = read_tokens(vocabulary)
        self._encode = TextEncoder(self._tokens)
        special = {token: len(self._tokens) + place for place, token in enumerate(SPECIAL_TOKENS)}
        self.startoftext, self.eos, self.pad = special[START_OF_TEXT], special[EOS], special[PAD]
        self.answer_mark, self.system_mark = special["<|extra_0|>"], special["<|extra_4|>"]
        self.stop = special["<|extra_5|>"]
        self.size = self._encode.n_vocab

    def text(self, text: str) -> list[int]:
        """Ids of plain text, which is expected in NFC."""
        return self._encode(text, special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens have none."""
        return b"".join(self._tokens[token] for token in ids if token < len(self._tokens)).decode(errors="replace")

    def prompt(self, system: str | None, exchanges: tuple[Exchange, ...], user: str) -> list[int]:
        """A conversation up to the point where the model answers `user`."""
        ids, _ = self.chat(Chat(system, exchanges))
        opening = [self.startoftext] + (self.text(system) + [self.system_mark] if system else [])
        return ids + (opening if not exchanges else [self.startoftext]) + self.text(user) + [self.answer_mark]

    def chat(self, chat: Chat) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation and, for each, whether the assistant wrote it."""
        ids: list[int] = []
        written: list[bool] = []
        for number, exchange in enumerate(chat.exchanges):
            opening = [self.startoftext]
            if number == 0 and chat.system:
                opening += [*self.text(chat.system), self.system_mark]
            given = [*opening, *self.text(exchange.user), self.answer_mark]
            answer = [*self.text(exchange.assistant), self.eos]
            ids += given + answer
            written += [False] * len(given) + [True] * len(answer)
        return ids, written

    def example(self, example: Chat | Document) -> tuple[list[int], list[bool]]:
        """Ids and the learned positions of either kind of example."""
        if isinstance(example, Chat):
            return self.chat(example)
        ids = [self.startoftext, *self.text(example.text), self.eos]
        return ids, [False] + [True] * (len(ids) - 1)


@dataclass(frozen=True)
class Batch:
    """Padded rows: `ids`, `labels` (the next ids, or IGNORED where nothing is to be learned), [rows, tokens]."""

    ids: Tensor
    labels: Tensor


def batches(encoder: Encoder, rng: Random, tokens: int) -> Iterator[Batch]:
    """Endless batches of at most `tokens` ids, padding included, of examples of similar length in random order."""
    corpus = Corpus()
    while True:
        pool = sorted((encoder.example(corpus.example(rng)) for _ in range(POOL)), key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for pair in pool:
            if (len(groups[-1]) + 1) * len(pair[0]) > tokens:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        yield from (_pad(group, encoder.pad) for group in groups)


def _pad(group: list[tuple[list[int], list[bool]]], pad: int) -> Batch:
    width = max(len(ids) for ids, _ in group)
    ids = torch.full((len(group), width), pad)
    labels = torch.full((len(group), width), IGNORED)
    for row, (example, learned) in enumerate(group):
        length = len(example)
        ids[row, :length] = torch.tensor(example)
        labels[row, : length - 1] = torch.where(torch.tensor(learned[1:]), ids[row, 1:length], IGNORED)
    return Batch(ids, labels)
