"""What is refused although it is JSON, with the place where it is; and what passes."""

import json

import pytest

from hunyuan_vllm.server.middleware.bounds import read_json
from hunyuan_vllm.server.middleware.fields import Refused

HALF = "unpaired surrogate"
BEYOND = "beyond 64 bits"
NO_NUMBER = "not a finite number"


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        (rb'{"stop": ["a", "\ud800"]}', "stop.1", HALF),
        (rb'{"stop": ["\ud83d\ud800"]}', "stop.0", HALF),
        (b'{"user": "\xed\xa0\x80"}', "user", HALF),
        (rb'{"messages": [{"content": "a\uDFFFb"}]}', "messages.0.content", HALF),
        (rb'{"vllm_xargs": {"\udc00": 1}}', "vllm_xargs", HALF),
        (rb'"\ud800"', None, HALF),
        ('{"user": "\ud800"}'.encode("utf-16", "surrogatepass"), "user", HALF),
        (b'{"seed": 18446744073709551616}', "seed", BEYOND),
        (b'{"seed": -9223372036854775809}', "seed", BEYOND),
        (b'{"a": [[1, 1%s]]}' % (b"0" * 400), "a.0.1", BEYOND),
        (b'{"temperature": NaN}', "temperature", NO_NUMBER),
        (b'{"%s": NaN}' % (b"x" * 9000), "x" * 200, NO_NUMBER),
        (b'{"temperature": -Infinity}', "temperature", NO_NUMBER),
        (b'{"logit_bias": {"1": 1e999}}', "logit_bias.1", NO_NUMBER),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, None, "nested too deeply"),
    ],
)
def test_what_no_field_can_mean(body: bytes, field: str | None, says: str) -> None:
    with pytest.raises(Refused) as refused:
        read_json(body)
    assert refused.value.field == field
    assert says in refused.value.message and refused.value.message.startswith(field or "the request")
    refused.value.message.encode()  # it can be sent


@pytest.mark.parametrize(
    "body",
    [
        rb'{"user": "\ud83c\udf0a NaN Infinity \\ud800"}',
        '{"user": "🌊海水"}'.encode(),
        b'{"seed": 18446744073709551615, "min": -9223372036854775808, "t": 1e300, "id": "99999999999999999999999"}',
        '{"user": "海"}'.encode("utf-16"),
    ],
)
def test_what_is_as_it_should_be(body: bytes) -> None:
    assert read_json(body) == json.loads(body)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1,]", b'{"n": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_is_left_to_vllm(body: bytes) -> None:
    assert read_json(body) is None
