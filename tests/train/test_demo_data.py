"""The demo model's training text: right answers, a held-out split that stays out, a complete vocabulary."""

from __future__ import annotations

import base64
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer

from hunyuan_vllm.tokenizer import register_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "train" / "demo"))

from corpus.dialogue import TASKS, Chat, Corpus, texts  # noqa: E402
from corpus.task import Question, Task, is_held_out  # noqa: E402
from encoding import Encoder  # noqa: E402
from vocabulary import VOCABULARY_FILE, corpus_texts, learn_ranks  # noqa: E402

ITEM = r"[a-zA-Z]+|\d+"


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def listed(question: Question) -> list[str]:
    """The items a list question is about, read from its words alone."""
    tail = re.split(r"[:：]|of: |the list ", question.prompt)[-1]
    return re.findall(ITEM, tail)


def joined_like(question: Question, items: list[str]) -> str:
    return (", " if ", " in question.prompt.split(":")[-1].split("：")[-1] else " ").join(items)


def solve_add(q: Question) -> bool:
    a, b = numbers(q.prompt)
    return q.answer == f"{a} + {b} = {a + b}"


def solve_subtract(q: Question) -> bool:
    a, b = sorted(numbers(q.prompt), reverse=True)
    return q.answer == f"{a} - {b} = {a - b}"


def solve_compare(q: Question) -> bool:
    small = re.search("small|less|小？|小。|更小|数小", q.prompt) is not None and "哪个大" not in q.prompt
    low, high = sorted(numbers(q.prompt))
    return numbers(q.answer) == ([low, high] if small else [high, low]) and bool(
        re.search("smaller|小" if small else "larger|大", q.answer)
    )


def solve_parity(q: Question) -> bool:
    (n,) = numbers(q.prompt)
    odd, even = n % 2 == 1, n % 2 == 0
    says_odd, says_even = (re.search(words, q.answer) is not None for words in ("odd|奇", "even|偶"))
    return numbers(q.answer) == [n] and (says_odd, says_even) == (odd, even)


def solve_neighbour(q: Question) -> bool:
    (n,) = numbers(q.prompt)
    step = 1 if re.search("after|next|后|下", q.prompt) else -1
    return numbers(q.answer) == ([n + step, n] if q.language == "en" else [n, n + step])


def solve_extreme(q: Question) -> bool:
    given = numbers(q.prompt)
    want = max(given) if re.search("largest|maximum|biggest|最大", q.prompt) else min(given)
    return numbers(q.answer) == [want]


def solve_sort(q: Question) -> bool:
    return q.answer == joined_like(q, sorted(listed(q)))


def solve_reverse(q: Question) -> bool:
    items = listed(q)
    return q.answer == joined_like(q, [items[-1 - i] for i in range(len(items))])


def solve_mirror(q: Question) -> bool:
    forward = q.answer[::-1]
    return forward in q.prompt and (q.language == "en" or len(forward) >= 2)


def solve_case(q: Question) -> bool:
    items = listed(q)
    wanted = str.upper if re.search("upper|capital|Upper|大写", q.prompt) else str.lower
    return items == [item.swapcase() for item in map(wanted, items)] and q.answer == joined_like(
        q, list(map(wanted, items))
    )


def solve_repeat(q: Question) -> bool:
    return q.prompt.endswith(q.answer) and re.findall(ITEM, q.answer) == listed(q)


def solve_pick(q: Question) -> bool:
    items = listed(q)
    want = items[0] if re.search("(?i)first|第一", q.prompt) else items[-1]
    return re.search(f"(is |是){want}(\\.|。)$", q.answer) is not None


def solve_count(q: Question) -> bool:
    return numbers(q.answer) == [len(listed(q))]


SOLVERS: dict[str, Callable[[Question], bool]] = {
    "add": solve_add,
    "subtract": solve_subtract,
    "compare": solve_compare,
    "parity": solve_parity,
    "neighbour": solve_neighbour,
    "extreme": solve_extreme,
    "sort": solve_sort,
    "order": lambda q: q.answer == ", ".join(map(str, sorted(numbers(q.prompt)))),
    "reverse": solve_reverse,
    "mirror": solve_mirror,
    "case": solve_case,
    "repeat": solve_repeat,
    "pick": solve_pick,
    "count": solve_count,
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_answer_is_right(task: Task) -> None:
    rng = Random(11)
    for _ in range(150):
        for language in ("en", "zh"):
            for split in ("train", "held_out"):
                question = task.question(rng, split, language)
                assert SOLVERS[task.name](question), question


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_wrong_answer_would_be_seen(task: Task) -> None:
    rng = Random(12)
    first, second = task.question(rng, "train", "en"), task.question(rng, "train", "en")
    while first.answer == second.answer:
        second = task.question(rng, "train", "en")
    crossed = Question(first.task, first.language, first.key, first.prompt, second.answer)
    assert not SOLVERS[task.name](crossed)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_splits_share_no_problem(task: Task) -> None:
    rng = Random(13)
    keys = {split: {task.question(rng, split, "en").key for _ in range(400)} for split in ("train", "held_out")}
    assert not keys["train"] & keys["held_out"]
    assert len(keys["held_out"]) >= 40


def test_no_held_out_sum_in_the_training_text() -> None:
    """Read back from the text itself, in whatever wording, chat or document: a sum's operands are its identity."""
    rng, corpus, seen = Random(14), Corpus(), 0
    for _ in range(4000):
        for text in texts(corpus.example(rng)):
            for a, sign, b in re.findall(r"(\d+) ?([+-]) ?(\d+)", text):
                task, pair = ("add", sorted((int(a), int(b)))) if sign == "+" else ("subtract", [int(a), int(b)])
                if max(pair) < 100 and (sign == "+" or pair[0] >= pair[1]):  # others are not problems of these tasks
                    assert not is_held_out(task, f"{pair[0]} {pair[1]}"), text
                    seen += 1
    assert seen > 1000


def test_a_question_has_one_answer() -> None:
    answers: dict[str, set[str]] = defaultdict(set)
    for fact in Corpus().facts:
        for question in fact.questions:
            answers[question.rstrip("?.？。").lower()].add(fact.answer)
    for talk in Corpus().small_talk.talks:
        for remark in talk.remarks:
            answers[remark.rstrip("?.!？。！").lower()].add(talk.answer)
    assert {question: found for question, found in answers.items() if len(found) > 1} == {}


def test_text_is_in_the_tokenizer_s_normal_form() -> None:
    assert all(text == unicodedata.normalize("NFC", text) for text in corpus_texts(seed=5, examples=2000))


@pytest.fixture(scope="module")
def ranks() -> list[bytes]:
    lines = [line.split() for line in VOCABULARY_FILE.read_text(encoding="ascii").splitlines()]
    assert [int(rank) for _, rank in lines] == list(range(len(lines)))
    return [base64.b64decode(token) for token, _ in lines]


def test_vocabulary_holds_every_byte_and_is_what_the_recipe_learns(ranks: list[bytes]) -> None:
    assert ranks[:256] == [bytes([byte]) for byte in range(256)]
    assert len(set(ranks)) == len(ranks)
    assert learn_ranks(corpus_texts()) == ranks


def test_vocabulary_suits_the_tasks(ranks: list[bytes]) -> None:
    encoder = Encoder(VOCABULARY_FILE)
    assert encoder.text("1234 + 5") == [*b"1234", *encoder.text(" +"), *b" 5"]
    for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        assert len(encoder.text(" " + letter)) == 1
    assert encoder.decode(encoder.text("naïve 🧂 海水 \x00 שלום")) == "naïve 🧂 海水 \x00 שלום"


def test_a_chat_is_encoded_as_the_package_s_tokenizer_does() -> None:
    register_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(VOCABULARY_FILE.parent)
    encoder, rng, corpus = Encoder(VOCABULARY_FILE), Random(16), Corpus()
    chats = [example for example in (corpus.example(rng) for _ in range(100)) if isinstance(example, Chat)]
    for chat in chats:
        messages = [] if chat.system is None else [{"role": "system", "content": chat.system}]
        for one in chat.exchanges:
            messages += [{"role": "user", "content": one.user}, {"role": "assistant", "content": one.assistant}]
        assert tokenizer.apply_chat_template(messages, return_dict=False) == encoder.chat(chat)[0]


def test_a_chat_is_encoded_as_published() -> None:
    encoder, rng, corpus = Encoder(VOCABULARY_FILE), Random(15), Corpus()
    chats = [example for example in (corpus.example(rng) for _ in range(200)) if isinstance(example, Chat)]
    for chat in chats:
        ids, written = encoder.chat(chat)
        marks = encoder.startoftext, encoder.answer_mark, encoder.eos
        assert [ids.count(mark) for mark in marks] == [len(chat.exchanges)] * 3
        assert ids.count(encoder.system_mark) == (chat.system is not None)
        said = [token for token, mine in zip(ids, written, strict=True) if mine]
        assert said == [token for one in chat.exchanges for token in (*encoder.text(one.assistant), encoder.eos)]
        last = chat.exchanges[-1]
        prompt = encoder.prompt(chat.system, chat.exchanges[:-1], last.user)
        assert prompt + encoder.text(last.assistant) + [encoder.eos] == ids
