"""Engines and other contestants, each in its own process, with threads bound as vLLM binds them.

vLLM allows one engine per process, and threads and preloaded libraries have to be set before a process starts.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import cores, note

BATCHES = (1, 8)
Rates = dict[tuple[str, int], float]
"""Tokens per second of a phase, "prefill" or "decode", and a batch size."""


class Child:
    """An object in its own process. `call` calls its methods; its `close`, if any, is called at the end. Its
    output goes to a log file."""

    def __init__(self, name: str, build: Callable[..., Any], *arguments: Any, environ: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.log = Path(tempfile.gettempdir()) / f"hunyuan-vllm-bench-{os.getpid()}-{name.replace(' ', '-')}.log"
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.log, build, arguments), name=name)
        with _variables(environ):
            self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self._group = self._process.pid

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._connection.close()
        self._process.join(timeout=60)
        with suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)  # also the engine's own processes
        self._process.join()
        if kind is None:
            self.log.unlink(missing_ok=True)

    def ready(self) -> Child:
        """Wait until the object is built."""
        self._receive()
        note(f"{self.name} is ready")
        return self

    def call(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, value = self._connection.recv()
        except EOFError:
            failed, value = True, "it ended"
        if failed:
            raise SystemExit(f"{self.name}: {value} (its output: {self.log})")
        return value


def _serve(connection: Connection, log: Path, build: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.setsid()  # a process group for it and its children
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        built = build(*arguments)
        try:
            connection.send((False, None))
            while True:
                method, given = connection.recv()
                connection.send((False, getattr(built, method)(*given)))
        except EOFError:  # the parent has closed its end: done
            pass
        finally:
            # A multiprocessing child ends without the exit handlers that would end an engine's own processes.
            if hasattr(built, "close"):
                built.close()
    except BaseException as error:
        traceback.print_exc()
        reason = " ".join(str(error).split("\n")[:2])
        connection.send((True, f"{type(error).__name__}: {reason}"))


@contextmanager
def _variables(environ: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= environ
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def engine_environ(threads: int) -> dict[str, str]:
    """Environment of a process that computes: threads bound and libraries preloaded as in vLLM's own CPU workers."""
    chosen = ",".join(map(str, cores()[:threads]))
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_PLACES": f"{{{chosen}}}",
        "OMP_PROC_BIND": "true",
        "LD_PRELOAD": ":".join(_preloads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "",
    }


def _preloads() -> list[str]:
    """torch's OpenMP, so that there is only one in the process, and the allocator that vLLM may bring."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    site = Path(spec.origin).parent.parent
    found = [path for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    for patterns in (("torch/lib/libgomp*.so*", "torch.libs/libgomp*.so*"), ("vllm/libs/libtcmalloc*.so*",)):
        hits = [hit for pattern in patterns for hit in sorted(site.glob(pattern))]
        found += map(str, hits[:1])
    return found


class Engine:
    """A vLLM engine, to be built in a `Child`; runs in that process, scheduler and all.

    With `counts_cpu_time` its seconds are those of the process on the CPUs: waiting for other programs does not count.
    """

    def __init__(self, model: Path, options: dict[str, Any], counts_cpu_time: bool = False) -> None:
        from vllm import LLM

        self._clock = time.process_time if counts_cpu_time else time.perf_counter
        self.llm = LLM(model=str(model), skip_tokenizer_init=True, seed=0, **options)

    def stepping(self, prompts: Sequence[list[int]], new_tokens: int) -> Iterator[dict[int, list[int]]]:
        """Take one engine step for each item asked for; an item holds the tokens, greedy, of the prompts it ended."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        params.output_kind = RequestOutputKind.FINAL_ONLY  # as LLM.generate asks for
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            yield {int(output.request_id): list(output.outputs[0].token_ids) for output in engine.step()}

    def steps(self, prompts: Sequence[list[int]], new_tokens: int) -> tuple[list[float], list[list[int]]]:
        """Seconds of each engine step, the first of which is the whole prefill; and the tokens, greedy."""
        seconds: list[float] = []
        tokens: dict[int, list[int]] = {}
        last = self._clock()
        for ended in self.stepping(prompts, new_tokens):
            now = self._clock()
            seconds.append(now - last)
            tokens |= ended
            last = now
        if len(seconds) != new_tokens:
            raise RuntimeError(f"{len(seconds)} steps for {new_tokens} tokens: the prompts were not read in one step")
        return seconds, [tokens[index] for index in range(len(prompts))]


def engine_settings(prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Options of a bfloat16 engine that reads all prompts of a batch in its first step."""
    longest = prompt_tokens + new_tokens
    return dict(
        dtype="bfloat16",
        max_model_len=longest,
        max_num_batched_tokens=max(BATCHES) * longest,
        kv_cache_memory_bytes=512 << 20,
    )


def measured_rates(child: Child, vocab_size: int, prompt_tokens: int, new_tokens: int) -> Callable[[], Rates]:
    """A callable whose n-th call runs every batch size on the n-th round's prompts."""
    rounds = itertools.count()

    def turn() -> Rates:
        number, rates = next(rounds), {}
        for batch in BATCHES:
            prompts = random_prompts(vocab_size, [prompt_tokens] * batch, 100 * number + batch)
            seconds, _ = child.call("steps", prompts, new_tokens)
            rates["prefill", batch] = batch * prompt_tokens / seconds[0]
            rates["decode", batch] = batch * (len(seconds) - 1) / sum(seconds[1:])
        return rates

    return turn


def anonymous_bytes() -> int:
    """Memory of this process that it allocated itself: what is mapped from files can be dropped at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Watch:
    """Samples the anonymous memory of this process while the block runs; `before` and `peak` are bytes."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> Watch:
        self.before = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(self._seconds):
            self.peak = max(self.peak, anonymous_bytes())


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Token ids, no two prompts or seeds alike."""
    import random

    generator = random.Random(seed)
    return [[generator.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
