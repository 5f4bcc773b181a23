"""HAProxy before two replicas of the demo model: what begins alike stays together, a death ends its own requests."""

import collections
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import psutil
import pytest
from routers import KEY, Router, needs_haproxy, running_router
from serving import Server, running_server
from waiting import eventually

pytestmark = [pytest.mark.server, needs_haproxy]
REPLICAS = ("replica-1", "replica-2")
SALT = "Why is sea water salty?"
DETECTED = 15.0  # seconds within which a client must know that its replica is gone


@pytest.fixture(scope="module")
def replicas(tmp_path_factory) -> Iterator[dict[str, Server]]:
    key_file = tmp_path_factory.mktemp("key") / "api-key"
    key_file.touch(mode=0o600)
    key_file.write_text(KEY)
    flags = ("--max-model-len", "512", "--block-size", "32")

    def start(stack: ExitStack) -> Server:
        return stack.enter_context(running_server(*flags, HUNYUAN_VLLM_API_KEY_FILE=str(key_file)))

    with ExitStack() as one, ExitStack() as other, ThreadPoolExecutor() as pool:
        yield dict(zip(REPLICAS, pool.map(start, (one, other)), strict=True))


@pytest.fixture(scope="module")
def router(replicas) -> Iterator[Router]:
    with running_router(*(f"127.0.0.1:{server.port}" for server in replicas.values())) as running:
        yield running


def cache_hits(server: Server) -> float:
    metrics = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False).text
    return float(re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", metrics, re.M)[0])


# What begins alike stays together


def test_requests_with_one_beginning_go_to_one_replica(router, replicas):
    before = {name: cache_hits(server) for name, server in replicas.items()}
    chosen = {}
    for person in range(12):
        system = f"You are harbour master number {person}. You know the seas and tell of them briefly. " * 4
        seen = {router.ask(system, f"{question} {SALT}").headers["x-replica"] for question in ("A", "B", "C", "D")}
        (chosen[person],) = seen
    shares = collections.Counter(chosen.values())
    assert set(shares) == set(REPLICAS), "one replica has them all"
    for name, server in replicas.items():
        # All but the first of each four find the beginning in the cache: more than a block of 32 tokens.
        assert cache_hits(server) - before[name] >= 3 * 32 * shares[name]


def test_a_conversation_stays_where_it_began(router):
    chosen = []
    for number in range(12):
        texts = ["You are a helpful assistant.", f"Question {number}: {SALT}"]
        first = router.ask(*texts)
        answer = first.json()["choices"][0]["message"]["content"] or "-"
        second = router.ask(*texts, answer, "And why are rivers not?")
        assert first.headers["x-replica"] == second.headers["x-replica"]
        chosen.append(first.headers["x-replica"])
    assert set(chosen) == set(REPLICAS), "a short system message that all have must not bring all to one replica"


def test_completions_and_messages_in_parts_are_read_too(router):
    beginning = "The sea covers most of the Earth, and ships cross it. " * 8
    for make in (
        lambda end: ("/v1/completions", {"prompt": beginning + end}),
        lambda end: ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "text", "text": beginning + end}]}]}),
    ):  # fmt: skip
        seen = set()
        for end in "ABCDEFGH":
            path, body = make(end)
            answer = router.client.post(path, json={"model": "hunyuan", "max_tokens": 1, **body})
            assert answer.status_code == 200, answer.text
            seen.add(answer.headers["x-replica"])
        assert len(seen) == 1


def test_a_beginning_that_all_have_is_shared_out(router):
    system = "You know the seas and the oceans, and tell of them briefly. " * 6
    with ThreadPoolExecutor(12) as pool:
        options = {"max_tokens": 450, "ignore_eos": True}  # only what is under way counts as load
        answers = list(pool.map(lambda number: router.ask(system, f"{number} {SALT}", **options), range(12)))
    shares = collections.Counter(answer.headers["x-replica"] for answer in answers)
    assert all(answer.status_code == 200 for answer in answers)
    assert min(shares.values()) >= 3 and len(shares) == 2, shares


# What is let through


def test_the_replicas_ask_for_the_key(router):
    refused = router.client.get("/v1/models", headers={"Authorization": "Bearer another"})
    assert refused.status_code == 401 and "x-replica" in refused.headers
    assert router.client.get("/v1/models").json()["data"][0]["id"] == "hunyuan"
    assert router.client.post("/tokenize", json={"prompt": "salt"}).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/pause", "/invocations", "/readyz", "/docs", "/v1x"])
def test_what_clients_do_not_need_is_not_handed_on(router, path):
    answer = router.client.get(path)
    assert answer.status_code == 404 and "x-replica" not in answer.headers
    assert "/v1/" in answer.json()["error"]["message"]


def test_a_long_prompt_gets_through(router):
    answer = router.client.post("/v1/completions", json={"model": "hunyuan", "prompt": "salt " * 600_000})
    # 3 MB: more than the router keeps to send again, and more than the model can read.
    assert answer.status_code in (400, 413) and "x-replica" in answer.headers


# Ends of replicas


def stream(router: Router, began: list[str], then: Callable[[], None] = lambda: None) -> tuple[bool, float]:
    """Whether a streamed answer reached its end, and when it ended; which replica began it is noted, `then` called."""
    request = {"model": "hunyuan", "stream": True, "temperature": 0, "max_tokens": 500, "ignore_eos": True}
    request["messages"] = [{"role": "user", "content": SALT}]
    done = False
    try:
        with router.client.stream("POST", "/v1/chat/completions", json=request) as answer:
            for number, line in enumerate(answer.iter_lines()):
                if number == 0:
                    began.append(answer.headers["x-replica"])
                    then()
                done = done or line == "data: [DONE]"
    except httpx.TransportError:
        pass
    return done, time.monotonic()


def ask_once(router: Router, tokens: int) -> httpx.Response | None:
    """The answer; None where the connection just ended, as HAProxy has it where the connection had an answer before."""
    try:
        return router.ask("You are a helpful assistant.", SALT, max_tokens=tokens)
    except httpx.RemoteProtocolError:
        return None


def test_a_replicas_death_ends_its_own_requests_alone(router, replicas):
    eventually(lambda: all(router.is_up(name) for name in REPLICAS))
    engines = {name: server.engine for name, server in replicas.items()}

    halted = threading.Event()

    def halt() -> None:
        """With the first token of all, so that no answer ends before each is under way, however slow the machine."""
        if not halted.is_set():
            halted.set()
            for one in engines.values():
                one.suspend()

    def load(name: str) -> int:
        return router.metric("haproxy_server_current_sessions", name)

    with ThreadPoolExecutor(16) as pool:
        began: list[str] = []
        streams = [pool.submit(stream, router, began, halt) for _ in range(4)]
        assert halted.wait(60)
        asked = [pool.submit(ask_once, router, 100) for _ in range(12)]
        victim = began[0]
        survivor = next(name for name in REPLICAS if name != victim)
        try:
            eventually(lambda: sum(map(load, REPLICAS)) == 16)
            assert load(victim) > 4, "it has nothing but streams"
            process = psutil.Process(replicas[victim].process.pid)
            for one in [*process.children(recursive=True), process]:
                one.kill()
        finally:
            engines[survivor].resume()
        killed = time.monotonic()
        # Until then some would still find a connection to the dying replica, and be lost as well.
        eventually(lambda: not router.is_up(victim))
        later = [pool.submit(ask_once, router, 20) for _ in range(6)]
        answers = [future.result() for future in asked]
        after = [future.result() for future in later]

    whole = [answer for answer in [*answers, *after] if answer is not None and answer.status_code == 200]
    lost = [answer for answer in answers if answer not in whole]
    assert lost and len(lost) + len(whole) == 18
    assert all(answer is None or (answer.status_code, answer.headers["retry-after"]) == (502, "5") for answer in lost)
    assert all("salt" in answer.json()["choices"][0]["message"]["content"] for answer in whole)
    assert {answer.headers["x-replica"] for answer in whole} == {survivor}
    cut = [ended for done, ended in (future.result() for future in streams) if not done]
    assert cut and all(ended - killed < DETECTED for ended in cut)
    assert stream(router, began)[0] and began[-1] == survivor
    assert not router.is_up(victim) and router.status.get("/readyz").status_code == 200
