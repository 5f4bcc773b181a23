"""What a sweep asks for, and what it does not try."""

from __future__ import annotations

import pytest

from hunyuan_vllm.bench.workload import SPARE, check_fits, points, positive_numbers
from hunyuan_vllm.errors import UserError


def test_every_combination() -> None:
    found = points([1, 4], [], [64, 2048], [16], None)
    assert [point.place for point in found] == [
        (1, None, 64, 16),
        (4, None, 64, 16),
        (1, None, 2048, 16),
        (4, None, 2048, 16),
    ]
    assert [point.requests for point in found[:2]] == [8, 16]
    assert str(found[3]) == "2048 in, 16 out, 4 at a time"


def test_rates_take_the_place_of_concurrency() -> None:
    slow, fast = points([1, 4], [0.1, 2.5], [64], [16], None)
    assert (slow.concurrency, slow.rate, slow.requests) == (None, 0.1, 8)
    assert fast.requests == 75 and str(fast) == "64 in, 16 out, 2.5 a second"
    assert [point.requests for point in points([1], [0.1], [64], [16], 3)] == [3]


@pytest.mark.parametrize("text", ["", "0", "-1", "1,,2", "x", "inf", "nan", "1.5"])
def test_what_is_no_list_of_whole_numbers(text: str) -> None:
    with pytest.raises(UserError, match="--input-len .* is no list of whole numbers above 0"):
        positive_numbers("--input-len", text)


def test_a_list() -> None:
    assert positive_numbers("--concurrency", "1,4, 16") == [1, 4, 16]
    assert positive_numbers("--rate", "0.5,2", whole=False) == [0.5, 2]


@pytest.mark.parametrize("context", [128, 256, 1000])
def test_what_is_too_long_is_refused_with_lengths_that_fit(context: int) -> None:
    wanted = points([1], [], [64, 2048], [256], 1)
    check_fits(wanted, None)
    check_fits(wanted, 2048 + 256 + SPARE)
    with pytest.raises(UserError, match="--max-model-len") as refused:
        check_fits(wanted, context)
    words = str(refused.value).replace(",", "").split()
    lengths = [int(words[words.index(name) + 1]) for name in ("--input-len", "--output-len")]
    check_fits(points([1], [], lengths[:1], lengths[1:], 1), context)
