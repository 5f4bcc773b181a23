"""When the scheduler of servers on CPUs sends tokens to the front end, over steps that a script gives."""

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.request import Request

from hunyuan_vllm.server import scheduler as module
from hunyuan_vllm.server.scheduler import BatchingScheduler

STEP = 0.004  # seconds


class Steps:
    """Runs a scheduler through steps. Token n of a request is n, and requests run until they finish."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **requests: SamplingParams) -> None:
        self.now, self._number, self._outputs = 100.0, 0, {}
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(module, "SECONDS", 0.03)
        monkeypatch.setattr(Scheduler, "__init__", lambda *_: None)
        monkeypatch.setattr(Scheduler, "update_from_output", lambda scheduler, *_: self._upstream(scheduler))
        monkeypatch.setattr(Scheduler, "make_stats", lambda *_: SchedulerStats())
        self.scheduler = BatchingScheduler()
        self.scheduler.requests = {name: Request(name, [1], params, None) for name, params in requests.items()}
        self.scheduler.running = [*self.scheduler.requests.values()]
        self.run()  # the first tokens

    def _upstream(self, scheduler: BatchingScheduler) -> dict[int, EngineCoreOutputs]:
        for output in self._outputs.values():
            if output.finished:
                scheduler.running.remove(scheduler.requests.pop(output.request_id))
        step = EngineCoreOutputs(outputs=[*self._outputs.values()])
        step.scheduler_stats = scheduler.make_stats()
        return {0: step}

    def run(self, seconds: float = STEP, **fields: dict) -> dict[str, list[int]]:
        """One step, in which outputs have `fields` by request; the tokens that are sent, by request."""
        self._number += 1
        self.now += seconds
        first = {"prefill_stats": PrefillStats()} if self._number == 1 else {}
        self._outputs = {
            request.request_id: EngineCoreOutput(
                request.request_id, [self._number], **first, **fields.get(request.request_id, {})
            )
            for request in self.scheduler.running
        }
        sent = self.scheduler.update_from_output(None, None)
        self.stats = [step.scheduler_stats for step in sent.values()]
        return {output.request_id: output.new_token_ids for step in sent.values() for output in step.outputs}

    def until_sent(self, seconds: float = STEP, **fields: dict) -> dict[str, list[int]]:
        """The next tokens that are sent."""
        while not (sent := self.run(seconds, **fields)):
            assert self._number < 100
        return sent


def two(**fields) -> dict[str, SamplingParams]:
    return {"a": SamplingParams(), "b": SamplingParams(**fields)}


def test_tokens_of_several_steps_are_sent_together(monkeypatch):
    steps = Steps(monkeypatch, **two())
    for first in (2, 9, 16):  # 28 ms each, a step before it would be 32
        sent = steps.until_sent()
        assert sent == {name: [*range(first, first + 7)] for name in ("a", "b")}
        assert steps.stats == [SchedulerStats()]


def test_first_tokens_are_sent_at_once(monkeypatch):
    steps = Steps(monkeypatch, **two())
    assert not steps.run()
    assert steps.run(b={"prefill_stats": PrefillStats()}) == {"b": [2, 3]}
    assert steps.until_sent()["a"][:3] == [2, 3, 4]


@pytest.mark.parametrize("reason", FinishReason)
def test_the_end_of_a_request_is_sent_with_all_that_was_held(monkeypatch, reason):
    steps = Steps(monkeypatch, **two())
    assert not steps.run()
    assert steps.run(b={"finish_reason": reason}) == {"b": [2, 3]}
    assert steps.run() == {"a": [2, 3, 4]}  # which is alone now


def test_statistics_say_that_nothing_runs_any_longer(monkeypatch):
    steps = Steps(monkeypatch, **two())
    end = {"finish_reason": FinishReason.STOP}
    assert not steps.run()
    assert steps.run(a=end, b=end) and steps.stats == [SchedulerStats()]


def test_a_request_alone_gets_each_token(monkeypatch):
    steps = Steps(monkeypatch, a=SamplingParams())
    assert [steps.run() for _ in range(3)] == [{"a": [2]}, {"a": [3]}, {"a": [4]}]


@pytest.mark.parametrize("seconds", [0.016, 0.5])
def test_slow_steps_send_each_token(monkeypatch, seconds):
    steps = Steps(monkeypatch, **two())
    steps.run(seconds)
    assert steps.run(seconds) == {"a": [3], "b": [3]}


def test_log_probabilities_are_sent_with_their_token(monkeypatch):
    steps = Steps(monkeypatch, **two(logprobs=1))
    with_tokens = {"new_logprobs": ([[1]], [[0.0]], [0], None)}
    assert [steps.run(b=with_tokens) for _ in range(2)] == [{"b": [2]}, {"b": [3]}]


def test_a_stream_interval_of_the_request_counts(monkeypatch):
    steps = Steps(monkeypatch, **two(stream_interval=1))
    assert [steps.run() for _ in range(2)] == [{"b": [2]}, {"b": [3]}]


def test_tokens_held_for_an_aborted_request_do_not_mix_with_others(monkeypatch):
    steps = Steps(monkeypatch, **two())
    steps.scheduler.requests["c"] = Request("c", [1], SamplingParams(), None)
    steps.scheduler.running.append(steps.scheduler.requests["c"])
    assert not steps.run()
    steps.scheduler.running.remove(steps.scheduler.requests.pop("a"))
    assert steps.run() == {"a": [2]}  # the front end drops it
    assert steps.until_sent() == {name: [*range(2, 9)] for name in ("b", "c")}
