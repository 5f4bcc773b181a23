"""Tasks on numbers: sums, differences, comparison, parity, neighbours, the extremes and the order of a list."""

from __future__ import annotations

from random import Random

from .task import Problem, Task

__all__ = ["ARITHMETIC"]


def _operand(rng: Random) -> int:
    """0 to 99, small numbers more often, as people ask for them."""
    return rng.randrange(20 if rng.random() < 0.3 else 100)


def _addends(rng: Random) -> Problem:
    a, b = _operand(rng), _operand(rng)
    return Problem(f"{min(a, b)} {max(a, b)}", {"a": str(a), "b": str(b), "c": str(a + b)})


def _difference(rng: Random) -> Problem:
    b, a = sorted((_operand(rng), _operand(rng)))
    return Problem(f"{a} {b}", {"a": str(a), "b": str(b), "c": str(a - b)})


def _pair(rng: Random) -> Problem:
    a, b = rng.sample(range(1000 if rng.random() < 0.5 else 100), 2)
    slots = {"a": str(a), "b": str(b), "low": str(min(a, b)), "high": str(max(a, b))}
    return Problem(f"{slots['low']} {slots['high']}", slots, rng.choice(("larger", "smaller")))


def _parity(rng: Random) -> Problem:
    n = rng.randrange(1000)
    return Problem(str(n), {"n": str(n)}, "odd" if n % 2 else "even")


def _neighbour(rng: Random) -> Problem:
    n = rng.randrange(1, 1000)
    variant = rng.choice(("after", "before"))
    return Problem(str(n), {"n": str(n), "m": str(n + 1 if variant == "after" else n - 1)}, variant)


def _extreme(rng: Random) -> Problem:
    numbers = rng.sample(range(100), rng.randint(3, 4))
    slots = {
        "list": ", ".join(map(str, numbers)),
        "list_zh": "、".join(map(str, numbers)),
        "low": str(min(numbers)),
        "high": str(max(numbers)),
    }
    return Problem(" ".join(map(str, sorted(numbers))), slots, rng.choice(("largest", "smallest")))


def _order(rng: Random) -> Problem:
    numbers = rng.sample(range(100), rng.randint(3, 4))
    slots = {"list": ", ".join(map(str, numbers)), "result": ", ".join(map(str, sorted(numbers)))}
    return Problem(" ".join(map(str, sorted(numbers))), slots)


ARITHMETIC: tuple[Task, ...] = (
    Task("add", _addends),
    Task("subtract", _difference),
    Task("compare", _pair),
    Task("parity", _parity),
    Task("neighbour", _neighbour),
    Task("extreme", _extreme),
    Task("order", _order),
)
