"""vLLM's scheduler for servers on CPUs: the front end gets the tokens of several steps at once.

It runs on the cores that compute. With a fast model and several requests, receiving, detokenising and sending tokens
one by one takes it as long as the model takes to generate them.
"""

import time
from typing import Any

from msgspec.structs import astuple
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput

SECONDS = 0.05  # that a token is held at most


class BatchingScheduler(Scheduler):
    """While several requests run, holds their tokens for at most `SECONDS`, and not at all if steps take longer.

    A request's first and last tokens are sent at once, with those held until then. So are tokens with more than their
    ids, such as log-probabilities, and those of requests that set `stream_interval`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[int, dict[str, EngineCoreOutput]] = {}  # by front end and request
        self._last_step = self._last_sent = 0.0
        self._may_hold = False

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        now = time.perf_counter()
        next_step = now + (now - self._last_step)
        self._last_step = now
        self._may_hold = len(self.running) > 1 and next_step - self._last_sent <= SECONDS
        step = super().update_from_output(scheduler_output, model_runner_output)
        for front_end, outputs in [*step.items()]:
            held = self._held.setdefault(front_end, {})
            for output in outputs.outputs:
                if earlier := held.get(output.request_id):
                    output.new_token_ids = earlier.new_token_ids + output.new_token_ids
                held[output.request_id] = output
            outputs.outputs = [output for output in held.values() if not (self._may_hold and self._can_wait(output))]
            for output in outputs.outputs:
                del held[output.request_id]
            if not (outputs.outputs or outputs.scheduler_stats or outputs.finished_requests):
                del step[front_end]
        if not self._may_hold:
            self._last_sent = now
        return step

    def make_stats(self, *of_step: Any, **more_of_step: Any) -> SchedulerStats | None:
        """None where tokens may be held; what is counted over steps stays where vLLM counts it."""
        if self._may_hold and self.running and not any(of_step) and not any(more_of_step.values()):
            return None
        return super().make_stats(*of_step, **more_of_step)

    def _can_wait(self, output: EngineCoreOutput) -> bool:
        # Beside its id and tokens, an output has None or a count of 0 in each field.
        if any(value is not None and not (type(value) is int and value == 0) for value in astuple(output)[2:]):
            return False
        request = self.requests.get(output.request_id)
        return request is not None and getattr(request.sampling_params, "stream_interval", None) is None
