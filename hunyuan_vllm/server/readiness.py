"""Readiness: one token is really generated, through vLLM's own application; and what it means where none comes.

A full queue is no fault: a server that gives others their tokens, and only this one late, is busy, not hung.

Before the first token, requests warm up what the engine compiles or builds when it is first used, for 15 s and more in
which all others would wait: the ranks of log probabilities, sampling, and the grammar backend with its vocabulary.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx
from prometheus_client import REGISTRY

from hunyuan_vllm.server.asgi import App, Receive, Scope, Send
from hunyuan_vllm.server.verdict import Verdict

__all__ = ["DEAD", "Readiness", "exit_codes", "has_ended"]

KEPT = 1.0  # seconds for which an answer stands, so that probes cost one completion however many there are
REQUEST = {"prompt": "1", "max_tokens": 1, "temperature": 0}
WARM_UP: tuple[dict[str, Any], ...] = (
    {"prompt": "1 2 3", "max_tokens": 1, "temperature": 0, "logprobs": 1, "prompt_logprobs": 1},
    {"prompt": "1", "max_tokens": 1, "temperature": 1, "top_p": 0.9, "top_k": 10, "min_p": 0.01},
    {"prompt": "1", "max_tokens": 1, "temperature": 1, "structured_outputs": {"choice": ["1"]}},
)
TOKENS = "vllm:generation_tokens_total"
DEAD = Verdict("dead", "the engine has ended")


class Readiness:
    """Asks the application for a token when somebody wants to know, once for all who want to know at that time."""

    def __init__(self, app: App, timeout: float) -> None:
        """Args:
        app: vLLM's application, without the layers that ask for our key.
        timeout: seconds that the token may take.
        """
        self._app = app
        self._timeout = timeout
        self._warm_ups = list(WARM_UP)
        self._verdict: Verdict | None = None
        self._until = 0.0
        self._asking: asyncio.Task[Verdict] | None = None

    async def verdict(self, scope: Scope) -> Verdict:
        """The answer, at most KEPT seconds old. `scope` is that of a request to the same application."""
        if has_ended(scope["app"].state.engine_client):
            return DEAD
        if self._verdict is not None and time.monotonic() < self._until:
            return self._verdict
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(scope["app"]))
        return await asyncio.shield(self._asking)  # whoever asked first may hang up: the others still want to know

    async def _ask(self, application: Any) -> Verdict:
        self._verdict = await self._judge(application)
        self._until = time.monotonic() + KEPT
        return self._verdict

    async def _judge(self, application: Any) -> Verdict:
        engine = application.state.engine_client
        tokens, warm = _tokens_generated(), not self._warm_ups
        completion = asyncio.create_task(self._complete(application))
        # Answered between two steps of the engine: unlike the completion it need not wait for a place in the batch.
        step = asyncio.create_task(_succeeds_after(self._timeout / 2, engine.is_sleeping))
        await asyncio.wait({completion}, timeout=self._timeout)
        stepping = step.done() and step.result()
        for task in (completion, step):
            task.cancel()  # which withdraws the request, too
        if has_ended(engine):
            return DEAD
        if completion.done():
            status = completion.result()
            return Verdict("ready") if status == httpx.codes.OK else Verdict("failed", f"a completion gave {status}")
        late = f"no token within {self._timeout:g} s"
        if not warm:  # where tokens may be those of the requests that warm it up
            return Verdict("warming", "the engine prepares what requests use first")
        if _tokens_generated() > tokens:
            return Verdict("busy", f"{late}, but other requests got theirs")
        if stepping:
            return Verdict("slow", f"{late} for any request, but the engine is at work")
        return Verdict("stalled", f"{late} for any request, and the engine does not move")

    async def _complete(self, application: Any) -> int | str:
        """Ask for the token, after what is left of the warm-up, and return the answer's status."""

        async def within(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app({**scope, "app": application}, receive, send)

        # vLLM itself asks for this key where it is set, in a layer further in.
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app=within)
        async with httpx.AsyncClient(transport=transport, base_url="http://readyz", headers=headers) as client:
            while self._warm_ups:
                # One that is not answered in time is withdrawn here, and asked again by the next probe. A server that
                # refuses one, as with --max-logprobs 0, refuses its users' too.
                with suppress(Exception):
                    await client.post("/v1/completions", json=self._on_all_engines(application, self._warm_ups[0]))
                self._warm_ups.pop(0)
            try:
                return (await client.post("/v1/completions", json=REQUEST)).status_code
            except Exception:
                return "no answer"

    @staticmethod
    def _on_all_engines(application: Any, request: dict[str, Any]) -> dict[str, Any]:
        """The request with a prompt for each engine: vLLM spreads prompts evenly over those that are equally free."""
        engines = application.state.engine_client.vllm_config.parallel_config.data_parallel_size
        return {**request, "prompt": [request["prompt"]] * engines}


def has_ended(engine: Any) -> bool:
    """Whether vLLM's engine client has lost its engine; seen by the processes, too, a moment before vLLM says so."""
    return engine.errored or bool(exit_codes(engine))


def exit_codes(engine: Any) -> dict[str, int]:
    """Of the engine's processes that have ended, by name; none are known in one of several API servers, or over Ray."""
    resources = getattr(getattr(engine, "engine_core", None), "resources", None)
    finished = getattr(getattr(resources, "engine_manager", None), "finished_procs", None)
    return finished() if finished else {}


async def _succeeds_after(delay: float, call: Callable[[], Awaitable[object]]) -> bool:
    await asyncio.sleep(delay)
    try:
        await call()
    except Exception:
        return False
    return True


def _tokens_generated() -> float:
    """Tokens of all requests since the start, as vLLM counts them; 0 where its statistics are switched off."""
    families = REGISTRY.restricted_registry([TOKENS]).collect()
    return sum(sample.value for family in families for sample in family.samples if sample.name == TOKENS)
