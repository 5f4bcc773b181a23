"""Hostile requests as bytes for the wire: bodies, headers, paths, methods, framing, and how the client misbehaves."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hostile.values import BASES, FIELDS, ODD_TEXT, Raw, hostile_value

PATHS = list(BASES)
CHAT = PATHS[0]
NEVER = 10**9


@dataclass
class Hostile:
    """One request.

    Attributes:
        kind: what is wrong with it.
        data: all bytes that are sent.
        about: what to show of it where it is answered wrongly.
        pieces: it is sent in that many, with `pause` seconds between.
        read: bytes of the answer after which the client goes away; NEVER for none.
        reset: it goes away with a reset, without a farewell.
        answered: an answer is due; there is none to a request that does not end.
    """

    kind: str
    data: bytes
    about: str
    pieces: int = 1
    pause: float = 0.0
    read: int = NEVER
    reset: bool = False
    answered: bool = True


@dataclass
class _Request:
    """HTTP/1.1, of which each part may be replaced."""

    key: str | None
    path: str = CHAT
    method: str = "POST"
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)
    length: str | None = None
    version: str = "HTTP/1.1"

    def encode(self) -> bytes:
        headers = [("Host", "server"), ("Content-Type", "application/json"), ("Connection", "close")]
        if self.key is not None:
            headers.append(("Authorization", f"Bearer {self.key}"))
        names = {name.lower() for name, _ in self.headers}
        headers = [pair for pair in headers if pair[0].lower() not in names] + self.headers
        if self.length != "" and "transfer-encoding" not in names:
            headers.append(("Content-Length", self.length or str(len(self.body))))
        lines = [f"{self.method} {self.path} {self.version}", *(f"{name}: {value}" for name, value in headers), "", ""]
        return "\r\n".join(lines).encode("utf-8", "surrogatepass") + self.body


def hostile_requests(seed: int, count: int, key: str) -> Iterator[Hostile]:
    """The same ones for the same seed."""
    random = Random(seed)
    makers, weights = zip(*MAKERS.items(), strict=True)
    for _ in range(count):
        made = random.choices(makers, weights)[0](random, key)
        yield made


def _json(value: Any) -> bytes:
    """JSON with Raw as it is, and lone surrogates as escapes."""
    raws: list[str] = []

    def mark(one: Any) -> Any:
        if isinstance(one, Raw):
            raws.append(str(one))
            return f"\x00raw{len(raws) - 1}\x00"
        if isinstance(one, dict):
            return {name: mark(inner) for name, inner in one.items()}
        return [mark(inner) for inner in one] if isinstance(one, list) else one

    text = json.dumps(mark(value))
    for number, raw in enumerate(raws):
        text = text.replace(f'"\\u0000raw{number}\\u0000"', raw)
    return text.encode()


def _fields(random: Random, key: str) -> Hostile:
    """One to three fields with values they should not have."""
    path = random.choices(PATHS, [4, 4, 2, 1, 1])[0]
    body = dict(BASES[path])
    for name in random.choices(list(FIELDS[path]), k=random.choice([1, 1, 1, 2, 3])):
        body[name] = hostile_value(random, FIELDS[path][name])
    if random.random() < 0.2 and path.startswith("/v1") and "stream" not in body:
        body["stream"] = True
    return Hostile("fields", _Request(key, path, body=_json(body)).encode(), f"{path} {_json(body).decode()}")


def _not_json(random: Random, key: str) -> Hostile:
    """A body that is no JSON object, or that parsers disagree about."""
    path = random.choice(PATHS)
    good = _json(BASES[path])
    depth = random.choice([50, 900, 5000, 100_000])
    bodies = [
        b"", b" ", b"null", b"5", b'"a"', b"[]", b"[1,2]", b"true", b"{", b"}", b"{]", b'{"a"}', b"{'a': 1}",
        b"\0" * 50, b"NaN",
        good[: random.randrange(len(good))], good + b"x", good + good, b"\xef\xbb\xbf" + good,
        good.decode().encode("utf-16"),
        good.decode().encode("utf-32"), good.replace(b"Hello", b"\xff\xfe\xc0\x80"), good.replace(b"Hello",
        b"\\ud800"),
        good.replace(b"Hello", b"\\x"), good.replace(b"Hello", b"a\nb"), good.replace(b"Hello", b"\xed\xa0\x80"),
        b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth,
        good[:-1] + b',"extra":' + b"[" * depth + b"]" * depth + b"}",
        good[:-1] + b', "max_tokens": 5, "max_tokens": "x"}',
        good[:-1] + b', "max_tokens": {"max_tokens": 1}, "max_tokens": 2}', good[:-1] + b',"__proto__":{"a":1}}',
        good[:-1] + b', "x": ' + b"9" * 100_000 + b"}", good[:-1] + b', "n": 1e' + b"9" * 400 + b"}", b"/*c*/" + good,
        b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n--x--", b"a=1&b=2", b"<xml/>",
        random.randbytes(300), b"{" + b'"a":1,' * 20_000 + b'"b":2}',
    ]  # fmt: skip
    body = random.choice(bodies)
    return Hostile("not JSON", _Request(key, path, body=body).encode(), f"{path} {body[:200]!r}")


def _headers(random: Random, key: str) -> Hostile:
    path = random.choice(PATHS)
    odd = random.choice(ODD_TEXT).replace("\0", "0")
    header: list[tuple[str, str]] = random.choice([
        [("X-Huge", "a" * random.choice([9_000, 70_000, 300_000]))], [(f"X-{i}",
        "a") for i in range(random.choice([100, 2000]))],
        [("Content-Type", random.choice(["text/plain", "", "application/json; charset=utf-7", "multipart/form-data",
        "a" * 999, odd[:80]]))],
        [("X-Request-Id", random.choice([odd[:200], "same", "a" * 200, "../x", "a\tb"]))], [("Expect",
        random.choice(["100-continue", "x"]))],
        [("Connection", "Upgrade"), ("Upgrade", random.choice(["websocket", "h2c", "x"]))], [("Host",
        random.choice(["", "a b", odd[:50], "x" * 999]))],
        [("Content-Encoding", random.choice(["gzip", "br", "x"]))], [("Accept", odd[:80])], [("Accept-Encoding",
        "gzip;q=x, *;q=9")],
        [("Authorization", random.choice(["", "Bearer", "Bearer ", f"Bearer {key}x", f"Basic {key}",
        f"Bearer {odd[:80]}", "Bearer " + "a" * 9000]))],
        [("Authorization", f"Bearer {key}"), ("Authorization", "Bearer x")], [("Origin", "null"), ("Cookie",
        odd[:80])],
        [("X-Forwarded-For", odd[:80]), ("X-Forwarded-Proto", "x"), ("Forwarded", "for=;;;")], [("", "x")], [("X Y",
        "x")], [("X\tY:", "x")],
        [("Range", "bytes=0-99999999999")], [("X-Data-Parallel-Rank", random.choice(["0", "-1", "999", "x", ""]))],
        [("traceparent", odd[:80])],
        [("X-Session-Id", odd[:80])], [("Sec-WebSocket-Key", "x"), ("Upgrade", "websocket"), ("Connection",
        "Upgrade")],
    ])  # fmt: skip
    request = _Request(key, path, body=_json(BASES[path]), headers=header)
    # uvicorn waits for the rest of a handshake that is none, or keeps the connection for what was to follow.
    upgraded = any(name == "Upgrade" for name, _ in header)
    return Hostile("headers", request.encode(), f"{path} {str(header)[:200]}", answered=not upgraded)


def _paths(random: Random, key: str) -> Hostile:
    """Paths and methods that are not served, or are spelled to be taken for others."""
    path = random.choice([
        "/", "//", "/v1", "/v1/", "/v1/../metrics", "/v1/%2e%2e/pause", "/%2e%2e/%2e%2e/etc/passwd", "//v1/models",
        "/v1//models", "/v1/models/",
        "/v1/models/hunyuan", "/V1/MODELS", "/v1/models;x=1", "/v1/models?a=%ff%00", "/v1/models#x",
        "/v1/chat/completions/", "/v1/chat/completions%00",
        "/health/../v1/models", "/health/..%2fv1/models", "/livez/", "/readyz%2f", "/pause", "/invocations",
        "/collective_rpc", "/sleep", "/docs",
        "/server_info", "/v1/load_lora_adapter", "/update_weights", "/tokenizer_info", "/metrics/x", "/static/../x",
        "/chat/../x", "/%00",
        "/" + "a" * random.choice([100, 9000, 90_000]), "/" + "%ff" * 200, "/" + "/.." * 200,
        "http://other/v1/models", "*", "x", "?", "/v1/responses/x",
        "/v1/responses/" + "a" * 5000, "/v1/responses/%00", "/v1/responses/resp_x?stream=x&starting_after=y",
        "/v1/responses/resp_x?starting_after=-1&stream=true",
        "/v1/responses/..", "/v1/responses/x/cancel", "/openapi.json", "/version", "/metrics",
        "/metrics?name[]=x&name[]=%ff", "/v1/realtime", "/load",
        "/\u00e9", "/v1/models\\..\\x", "/é/%C3%28", *PATHS,
    ])  # fmt: skip
    methods = [
        "GET",
        "HEAD",
        "PUT",
        "PATCH",
        "DELETE",
        "OPTIONS",
        "TRACE",
        "CONNECT",
        "get",
        "FOO",
        "P" * 300,
        "GET\tx",
        "PRI",
    ]
    method = random.choice([*methods, "GET", "POST", "POST"])
    body = (
        b"" if method in ("GET", "HEAD") else random.choice([b"", b"{}", b"null", b"[]", b"\xff", _json(BASES[CHAT])])
    )
    request = _Request(random.choice([key, key, key, None]), path, method, body)
    return Hostile("paths and methods", request.encode(), f"{method[:20]} {path[:150]}", answered=method != "CONNECT")


def _framing(random: Random, key: str) -> Hostile:
    """Lengths and chunks that are wrong, and what is no HTTP."""
    body = _json(BASES[CHAT])
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    chunked = [("Transfer-Encoding", "chunked")]
    unended = [
        _Request(key, body=body, length=str(len(body) + random.choice([1, 99, 9000]))).encode(),
        _Request(key, body=chunk, headers=chunked).encode(), _Request(key, body=b"ffffff\r\nabc",
        headers=chunked).encode(),
        _Request(key, body=body).encode()[: -random.randrange(1, len(body))],
        _Request(key, body=body).encode()[: random.randrange(1, 100)],
        b"", b"\r\n", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ]  # fmt: skip
    ended = [
        *(_Request(key, body=body, length=length).encode() for length in ("-1", "x", "1e3", "0x10", "+9", "9" * 30,
        "0", "3", "", "10, 10")),
        _Request(key, body=body, headers=[("Content-Length", "3"), ("Content-Length", str(len(body)))]).encode(),
        _Request(key, body=chunk + b"0\r\n\r\n", headers=[*chunked, ("Content-Length", "3")]).encode(),
        _Request(key, body=chunk + b"0\r\n\r\n", headers=[("Transfer-Encoding", random.choice(["gzip, chunked", "x",
        "chunked, chunked"]))]).encode(),
        *(_Request(key, body=bad, headers=chunked).encode() for bad in (b"x\r\n", b"-1\r\n\r\n",
        b"fffffffffffffffff\r\n", b"5;" + b"a" * 9000 + b"\r\nabcde\r\n0\r\n\r\n")),
        _Request(key, body=chunk + b"0\r\nTrailer: x\r\n\r\n", headers=chunked).encode(),
        _Request(key, body=b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n", headers=chunked).encode(),
        *(_Request(key, body=body, version=version).encode() for version in ("HTTP/1.0", "HTTP/2.0", "HTTP/9.9",
        "HTTP/x", "http/1.1", "")),
        random.randbytes(500) + b"\r\n\r\n", b"GET\r\n\r\n", b"\r\n" * 5000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        _Request(key, body=body).encode().replace(b"\r\n", b"\n"), b"GET / HTTP/1.1\r\n folded: x\r\n\r\n",
        _Request(key, body=body).encode() * 3, _Request(key, body=body + _Request(key, "/pause").encode(),
        length=str(len(body))).encode(),
    ]  # fmt: skip
    if random.random() < 0.4:
        data = random.choice(unended)
        return Hostile("cut short", data, repr(data[:300]), read=0, reset=random.random() < 0.5, answered=False)
    data = random.choice(ended)
    return Hostile("framing", data, repr(data[:300]), answered=False)


def _gone(random: Random, key: str) -> Hostile:
    """A client that goes away while it is answered."""
    path = random.choice([CHAT, "/v1/completions", "/v1/responses"])
    stream = random.random() < 0.8
    body = {**BASES[path], "stream": stream, "temperature": 1, "seed": random.randrange(10**6)}
    long = random.choice([16, 100, 200])
    body |= (
        {"max_output_tokens": long}
        if path == "/v1/responses"
        else {"max_tokens": long, "ignore_eos": True, "n": random.choice([1, 1, 3])}
    )
    read = random.choice([0, 1, 50, 300, 900, 3000])
    reset = random.random() < 0.5
    about = f"{path} gone after {read} bytes"
    return Hostile(
        "gone in the middle",
        _Request(key, path, body=_json(body)).encode(),
        about,
        read=read,
        reset=reset,
        answered=False,
    )


def _slow(random: Random, key: str) -> Hostile:
    """A client that sends or reads slowly."""
    data = _Request(key, body=_json({**BASES[CHAT], "stream": random.random() < 0.5})).encode()
    return Hostile("slow", data, "slow", pieces=random.choice([3, 10, 30]), pause=random.choice([0.01, 0.05, 0.1]))


MAKERS: dict[Callable[[Random, str], Hostile], int] = {
    _fields: 60, _not_json: 12, _headers: 7, _paths: 8, _framing: 5, _gone: 6, _slow: 2,
}  # fmt: skip
