"""Tasks on short lists of letters, digits, words or Chinese characters: reverse, sort, change case, pick, count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from string import ascii_lowercase

from .task import Problem, Task

__all__ = ["HAN", "STRINGS", "WORDS"]

WORDS: tuple[str, ...] = tuple(
    "dog cat bird fish horse sheep tree flower grass river lake sea sky sun moon star rain snow wind cloud house door "
    "window table chair bed book pen paper school road car boat train apple bread milk tea rice water salt sugar egg "
    "cake hand foot eye ear red blue green white black big small hot cold day night year king queen friend mother "
    "father brother sister music song game ball box bag hat shoe stone gold iron city farm hill north south".split()
)
HAN: tuple[str, ...] = tuple(
    "山水火木金土日月星云风雨雪天地人口手足目耳牛羊马鸟鱼虫花草树米茶书笔门车船东西南北春夏秋冬红黄白黑大小"
)

_Draw = Callable[[Random], Problem]


def _tokens(rng: Random, low: int, high: int, kinds: str = "letters digits words") -> tuple[list[str], str]:
    """Draw distinct items of one kind and the separator that joins them."""
    kind = rng.choice(kinds.split())
    pool: Sequence[str] = {"letters": ascii_lowercase, "digits": "0123456789", "words": WORDS}[kind]
    return rng.sample(pool, rng.randint(low, high)), rng.choice((" ", ", "))


def _transform(low: int, high: int, rule: Callable[[list[str]], Sequence[str]]) -> _Draw:
    def draw(rng: Random) -> Problem:
        items, separator = _tokens(rng, low, high)
        slots = {"list": separator.join(items), "result": separator.join(rule(items))}
        return Problem(" ".join(items), slots)

    return draw


def _sortable(rng: Random) -> Problem:
    items, separator = _tokens(rng, 3, 5, "letters digits")
    slots = {"list": separator.join(items), "result": separator.join(sorted(items))}
    return Problem(" ".join(sorted(items)), slots, "digits" if items[0].isdigit() else "letters")


def _mirror(rng: Random) -> Problem:
    items = rng.sample(HAN, rng.randint(2, 5))
    return Problem("".join(items), {"list": "".join(items), "result": "".join(reversed(items))})


def _case(rng: Random) -> Problem:
    items, separator = _tokens(rng, 2, 6, "letters")
    low, high = separator.join(items), separator.join(items).upper()
    variant = rng.choice(("upper", "lower"))
    slots = {"list": low, "result": high} if variant == "upper" else {"list": high, "result": low}
    return Problem(" ".join(items), slots, variant)


def _pick(rng: Random) -> Problem:
    items, separator = _tokens(rng, 3, 6)
    variant = rng.choice(("first", "last"))
    slots = {"list": separator.join(items), "item": items[0 if variant == "first" else -1]}
    return Problem(" ".join(items), slots, variant)


def _count(rng: Random) -> Problem:
    items, separator = _tokens(rng, 2, 8)
    slots = {"list": separator.join(items), "n": str(len(items))}
    return Problem(" ".join(items), slots)


STRINGS: tuple[Task, ...] = (
    Task("reverse", _transform(2, 5, lambda items: items[::-1])),
    Task("mirror", _mirror),
    Task("sort", _sortable),
    Task("case", _case),
    Task("repeat", _transform(2, 7, list)),
    Task("pick", _pick),
    Task("count", _count),
)
