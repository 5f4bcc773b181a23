"""What is asked of a server: so many tokens in and out, so many requests at a time or a second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil

from hunyuan_vllm.errors import UserError

__all__ = ["Point", "check_fits", "points", "positive_numbers"]

SPARE = 16  # tokens by which a prompt of random tokens may come out longer, once it is text and read again
EACH, LEAST, SECONDS = 4, 8, 30  # requests for each one at a time, and in all; or of so many seconds at a rate


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        concurrency: requests under way at a time: the next is sent when one is answered. None with a rate.
        rate: requests a second, sent whether or not others are answered; None with a concurrency.
        input_len, output_len: tokens of each request.
        requests: how many are sent in all.
    """

    concurrency: int | None
    rate: float | None
    input_len: int
    output_len: int
    requests: int

    @property
    def place(self) -> tuple[int | None, float | None, int, int]:
        """What it has in common with a point of another run that is to be compared."""
        return self.concurrency, self.rate, self.input_len, self.output_len

    def __str__(self) -> str:
        load = f"{self.rate:g} a second" if self.concurrency is None else f"{self.concurrency} at a time"
        return f"{self.input_len} in, {self.output_len} out, {load}"


def positive_numbers(option: str, text: str, whole: bool = True) -> list[float]:
    """The numbers, or whole numbers, of a list such as "1,4,16".

    Raises:
        UserError: it is none, or has a number that is not above 0.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < float("inf") and (number.is_integer() or not whole) for number in found):
        raise UserError(f"{option} {text} is no list of {'whole ' * whole}numbers above 0, as 1,4,16 is one")
    return found


def points(
    concurrency: Sequence[float],
    rates: Sequence[float],
    inputs: Sequence[float],
    outputs: Sequence[float],
    requests: int | None,
) -> list[Point]:
    """Every combination; with rates, those instead of concurrencies."""
    return [
        Point(at_a_time, rate, int(input_len), int(output_len), requests or _enough(at_a_time, rate))
        for input_len, output_len, (at_a_time, rate) in product(inputs, outputs, _loads(concurrency, rates))
    ]


def _loads(concurrency: Sequence[float], rates: Sequence[float]) -> Iterator[tuple[int | None, float | None]]:
    if rates:
        yield from ((None, rate) for rate in rates)
    else:
        yield from ((int(number), None) for number in concurrency)


def _enough(concurrency: int | None, rate: float | None) -> int:
    return max(LEAST, EACH * (concurrency or 0), ceil(SECONDS * (rate or 0)))


def check_fits(wanted: Sequence[Point], context: int | None) -> None:
    """Nothing is asked that the model has no room for.

    Raises:
        UserError: a point is longer than the model's `context`; it names lengths that fit.
    """
    longest = max(wanted, key=lambda point: point.input_len + point.output_len)
    if context is None or longest.input_len + longest.output_len + SPARE <= context:
        return
    output_len = max(min(longest.output_len, context // 2 - SPARE), 1)
    raise UserError(
        f"{longest.input_len} tokens in and {longest.output_len} out do not fit into the {context} tokens of the "
        f"model's context, of which {SPARE} are kept free: ask for less, as with --input-len "
        f"{context - output_len - SPARE} --output-len {output_len}, or serve it with a greater --max-model-len"
    )
