"""What an evaluation compares: schemes with a KV cache type, each run by an engine in its own process"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from hunyuan_vllm.batch.engine import engine_options, one_line, parse_options
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.evaluation.passages import Passage
from hunyuan_vllm.quant.formats import Format
from hunyuan_vllm.quant.schemes import SCHEMES, Scheme, find_scheme
from hunyuan_vllm.server.exit_cause import exit_cause
from hunyuan_vllm.server.models import ModelSource, convert, demo_in, open_model
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress

CACHES = {"kv-bf16": "bf16", "kv-fp8": "fp8"}


@dataclass(frozen=True)
class Variant:
    """A model under a quantisation scheme, with a type of KV cache.

    Attributes:
        name: as the user wrote it, without the path.
        weights: the scheme of its weights.
        cache: "bf16" or "fp8".
        path: a checkpoint of its own; None for the common one.
    """

    name: str
    weights: Scheme
    cache: str
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read WEIGHTS[+kv-fp8|+kv-bf16][:PATH], as in int8, int8+kv-fp8 or fp8:/models/hunyuan-fp8.

        `kv-fp8` alone means bf16+kv-fp8. `fp8` comes with the FP8 cache.
        """
        name, _, path = text.partition(":")
        weights, _, cache = ("bf16", "", name) if name in CACHES else name.partition("+")
        try:
            scheme = find_scheme(weights)
        except UserError:
            scheme = None
        if scheme is None or (cache and cache not in CACHES):
            raise UserError(
                f"{name!r} is not a scheme: use one of {', '.join((*SCHEMES, 'kv-fp8'))}, with +kv-fp8 or "
                "+kv-bf16 after it for the KV cache and :PATH for its own checkpoint, as in int8+kv-fp8 or "
                "fp8:/models/hunyuan-fp8"
            )
        default = "fp8" if scheme.kv_cache == "fp8" else "bf16"
        return cls(name, scheme, CACHES.get(cache, default), path or None)

    @property
    def label(self) -> str:
        """The name, with the last part of its own checkpoint's path."""
        return f"{self.name}:{Path(self.path).name}" if self.path else self.name

    def options(self, quantised: bool) -> list[str]:
        """vLLM's options for it on a checkpoint that is `quantised` on disk, or BF16."""
        quantization = None if quantised else self.weights.quantization
        options = [] if quantization is None else ["--quantization", quantization]
        return options + (["--kv-cache-dtype", "fp8"] if self.cache == "fp8" else [])


def checkpoint_of(variant: Variant, model: ModelSource, progress: Progress) -> ModelSource:
    """The checkpoint of `variant`, by default `model`; the demo model is converted where the scheme needs it."""
    source, scheme = open_model(variant.path) if variant.path else model, variant.weights
    stored = (source.format or Format()).scheme
    if stored in scheme.stored:
        return source
    if source.demo and scheme.written:  # the server's own copy
        target = Path(demo_in(scheme, source, Settings.read(os.environ).cache_home).name)
        convert(Path(source.name), target, scheme, source.given, progress.console)
        return replace(open_model(str(target)), given=source.given, demo=True)
    remedy = f"name another checkpoint, as in {variant.name}:PATH"
    if stored == "bf16" and scheme.written:
        command = f"hunyuan-vllm quantize {source.given} DESTINATION --scheme {scheme.name}"
        remedy = f"make one with {command}, and name it with {variant.name}:DESTINATION"
    found = source.format.name if source.format else "unquantised"
    raise UserError(f"{source.given} is {found}, and {variant.name} starts from {scheme.needs}: {remedy}")


TAIL_LINES = 400
# Options that the evaluation sets itself.
RESERVED = ("quantization", "kv-cache-dtype", "max-model-len", "worker-extension-cls", "enable-prefix-caching")
COMPILING = ("enforce-eager", "compilation-config", "optimization-level")


class EngineFailed(Exception):
    """An engine did not start, or exited early; the message says which one and why."""


@dataclass(frozen=True)
class EngineRun:
    """A variant on its checkpoint, with the user's vLLM flags."""

    variant: Variant
    model: ModelSource
    flags: Sequence[str] = ()

    def argv(self, tokens: int, environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """vLLM's options for passages of up to `tokens` tokens, and variables to set for it."""
        given = Flags(self.flags)
        for name in RESERVED:
            if name in given:
                raise UserError(f"--{name} is set by the evaluation itself: leave it out")
        if given.integer("data-parallel-size", 1) > 1:
            raise UserError("--data-parallel-size: an evaluation runs one replica; use --tensor-parallel-size")
        flags = [] if any(name in given for name in COMPILING) else ["--enforce-eager"]
        flags += [] if "dtype" in given else ["--dtype", "bfloat16"]
        quantised = getattr(self.model.config, "quantization_config", None) is not None
        flags += [*self.variant.options(quantised), *self.flags]
        # The recorder would not see prompt tokens that come from the prefix cache.
        flags += ["--max-model-len", str(tokens), "--no-enable-prefix-caching", "--worker-extension-cls", RECORDER]
        engine = engine_options(self.model, flags, environ)
        return engine.argv, engine.env


Scores = dict[str, list[float]]  # of all scored tokens, in order; see `recorder.score_block`
Logits = tuple[int, str]  # vocabulary size and type


def execute(
    run: EngineRun, passages: Sequence[Passage], record: Path, logits: Logits | None, progress: Progress
) -> tuple[Scores, Logits]:
    """Start the run's engine and score the passages; returns the scores, and the format of its logits.

    Args:
        record: the file of logits: written where `logits` is None, else compared with.
        logits: the format of the run that wrote the file.
    """
    name = run.variant.label
    argv, env = run.argv(longest(passages), os.environ)
    job = {
        "argv": argv,
        "file": str(record),
        "format": logits,
        "passages": [(passage.ids, passage.scored) for passage in passages],
    }
    scores: Scores = defaultdict(list)
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as log:
        messages = _messages(job, env, log)
        progress.say(f"{name}: starting the engine")
        with progress.console.status(f"{name}: starting"):
            last = next(messages, last)
        with progress.stage(name, sum(len(passage.scored) for passage in passages), unit="tokens"):
            for last in messages:
                for kind, values in last.get("scores", {}).items():
                    scores[kind] += values
                if "scores" in last:
                    logits = tuple(last["format"])
                    progress.advance(len(last["scores"]["nll"]))
        if "mistake" in last:
            raise UserError(last["mistake"])
        if "done" not in last:
            error = last.get("error", "Worker")
            if "Worker" in error:  # another process has failed, and its output says why
                log.seek(0)
                lines = deque(log.read().decode(errors="replace").splitlines(), maxlen=TAIL_LINES)
                error = exit_cause(lines) or (lines[-1] if lines else "it exited without any output")
            raise EngineFailed(f"{name}: {error}")
    assert logits is not None
    return scores, logits


def longest(passages: Sequence[Passage]) -> int:
    """The --max-model-len that they need, with the one token that each generates."""
    return max(len(passage.ids) + 1 for passage in passages)


def _messages(job: Mapping[str, Any], env: Mapping[str, str], log: Any) -> Iterator[dict[str, Any]]:
    """The messages of the run's process, until it exits."""
    # Without a process of its own the engine starts faster, and errors keep their type.
    environ = {**os.environ, **env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "hunyuan_vllm.evaluation.engines"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environ, text=True
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        with suppress(BrokenPipeError):  # it has exited, and its output says why
            json.dump(job, process.stdin)
            process.stdin.close()
        yield from map(json.loads, process.stdout)
        process.wait()
    finally:
        process.kill()
        process.wait()


RECORDER = "hunyuan_vllm.evaluation.recorder.Recorder"


def main() -> None:
    """The process of a run: reads the job from standard input and writes messages to standard output: `started`, one of
    `scores` for each passage, `done`; or a `mistake` or an `error`.

    A job has "argv", vLLM's options, model first; "file" and "format", as of `recorder.Recording`; "passages", as
    pairs of ids and scored indices.
    """
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)  # what libraries print

        def send(**message: Any) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        try:
            _score(json.load(sys.stdin), send)
        except UserError as error:
            send(mistake=str(error))
        except Exception as error:
            send(error=one_line(error))
            raise
        else:
            send(done=True)


def _score(job: dict[str, Any], send: Callable[..., None]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.llm import LLM
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import SamplingParams

    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parse_options(job["argv"])))
    send(started=True)
    one_token = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.collective_rpc("quality_open", args=(job["file"], job["format"]))
    for ids, scored in job["passages"]:
        llm.collective_rpc("quality", args=("begin", len(ids)))
        llm.generate(TokensPrompt(prompt_token_ids=ids), one_token, use_tqdm=False)
        answers = llm.collective_rpc("quality", args=("end", scored, ids))
        format, scores = next(answer for answer in answers if answer is not None)
        send(format=format, scores=scores)
    llm.collective_rpc("quality", args=("close",))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
