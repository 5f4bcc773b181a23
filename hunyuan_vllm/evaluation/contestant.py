"""One engine in a process of its own, so that its memory is free again afterwards: what it is asked, what it answers.

python -m hunyuan_vllm.evaluation.contestant FD     # reads a job as JSON, writes JSON lines to that descriptor
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["QUESTIONS_AT_ONCE", "RECORDER", "main"]

RECORDER = "hunyuan_vllm.evaluation.recorder.Recorder"
QUESTIONS_AT_ONCE = 512

Message = dict[str, Any]


def perform(job: Message) -> Iterator[Message]:
    """Start the engine and do the job, as messages: one `started`, one of `scores` for each passage, one of `answers`
    for each batch of questions.

    Args:
        job: "argv", vLLM's options, model first; "file" and "format", as of `Recorder.quality_open`; "passages", as
            pairs of ids and scored indices; "questions", ids; "max_tokens" of an answer.

    Raises:
        UserError: an option is none of vLLM's.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.llm import LLM
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import SamplingParams

    from hunyuan_vllm.batch.engine import parse_options

    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parse_options(job["argv"])))
    yield {"started": True}
    one_token = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    if job["passages"]:
        llm.collective_rpc("quality_open", args=(job["file"], job["format"]))
    for ids, scored in job["passages"]:
        llm.collective_rpc("quality_begin", args=(len(ids),))
        llm.generate(TokensPrompt(prompt_token_ids=ids), one_token, use_tqdm=False)
        answers = llm.collective_rpc("quality_end", args=(scored, ids))
        format, scores = next(answer for answer in answers if answer is not None)
        yield {"format": format, "scores": scores}
    if job["passages"]:
        llm.collective_rpc("quality_close")

    greedy = SamplingParams(temperature=0, max_tokens=job["max_tokens"], detokenize=False)
    for start in range(0, len(job["questions"]), QUESTIONS_AT_ONCE):
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["questions"][start : start + QUESTIONS_AT_ONCE]]
        outputs = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
        yield {"answers": [[list(one.token_ids), one.finish_reason == "stop"] for one in outputs]}
    llm.llm_engine.engine_core.shutdown()


def main() -> None:
    from hunyuan_vllm.batch.engine import one_line
    from hunyuan_vllm.errors import UserError

    with os.fdopen(int(sys.argv[1]), "w") as channel:

        def say(message: Message) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        try:
            for message in perform(json.load(sys.stdin)):
                say(message)
        except UserError as error:
            say({"mistake": str(error)})
            return
        except Exception as error:
            say({"error": one_line(error)})
            raise
        say({"done": True})


if __name__ == "__main__":
    main()
