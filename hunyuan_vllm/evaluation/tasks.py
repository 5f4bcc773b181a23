"""Benchmarks by lm-evaluation-harness on a running server"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from hunyuan_vllm.bench.client import ServedModel
from hunyuan_vllm.tokenizer import load_tokenizer
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import replacing

TASKS_FOLDER: Final = Path(__file__).with_name("tasks")


@dataclass(frozen=True)
class Setting:
    """How a task is asked.

    Attributes:
        shots: solved examples before each question; None for what the task itself says.
        chat: in the model's chat format, rather than as plain text.
        published: percent right of the published Instruct model, (BF16, FP8).
    """

    shots: int | None = None
    chat: bool = False
    published: tuple[float, float] | None = None


# The table gives scores and no settings; these are the ones each benchmark is usually reported with.
PUBLISHED: Final = {
    "arc_challenge_letters": Setting(25, published=(94.6, 94.2)),
    "ceval-valid": Setting(5, published=(88.6, 89.2)),
    "cmmlu": Setting(5, published=(90.4, 89.8)),
    "mmlu": Setting(5, published=(89.9, 88.9)),
}
SETTINGS: Final = PUBLISHED | {
    "arc_challenge": Setting(25),
    "arc_challenge_chat": Setting(0, chat=True),
    "hunyuan_demo": Setting(0, chat=True),
    "hunyuan_demo_choice": Setting(0, chat=True),
}
"""How tasks of lm-evaluation-harness are asked; others with the task's own shots, as plain text."""

# What `simple_evaluate` takes for a task or group, and its tasks by name.
_Loaded = tuple[list[Any], dict[str, Any]]
SEED = 1234  # lm-evaluation-harness's own, for few-shot examples


class ServerFailed(Exception):
    """The server stopped answering, or answered with errors."""


@dataclass(frozen=True)
class TaskResult:
    """The results of lm-evaluation-harness for one task.

    Attributes:
        setting: how it was asked; `shots` as they were.
        metrics: for the task, or each part of a group, each metric's value and its standard error, if it has one.
    """

    name: str
    setting: Setting
    metrics: Mapping[str, Mapping[str, tuple[float, float | None]]]
    questions: int
    raw: Mapping[str, Any]


class Harness:
    """Runs tasks on a server.

    Args:
        tokenizer: folder of the checkpoint's tokenizer; the client tokenizes.
    """

    def __init__(self, served: ServedModel, tokenizer: str, concurrency: int, include: Path | None = None) -> None:
        _quiet()
        try:
            import lm_eval.models.openai_completions  # noqa: F401  what the backends need is there too
        except ImportError as error:
            raise UserError(
                f"lm-evaluation-harness is not installed ({error}): pip install 'hunyuan-vllm[eval]'"
            ) from None
        load_tokenizer(tokenizer)  # also lets transformers, and so lm-eval, find the class
        self.served, self._tokenizer, self._concurrency = served, tokenizer, concurrency
        self._include = [TASKS_FOLDER, *([include] if include else [])]
        self._loaded: dict[str, _Loaded] = {}

    def load(self, name: str) -> None:
        """Read a task or group with its data, which `run` then finds here."""
        if name in self._loaded:
            return
        manager = self._manager(name)
        if name not in manager.all_tasks:
            similar = get_close_matches(name, manager.all_tasks, 5)
            hint = f" (there are {', '.join(similar)})" if similar else ""
            raise UserError(f"--tasks {name}: unknown task{hint}; `lm_eval ls tasks` lists all")
        try:
            loaded = manager.load([name])
        except Exception as error:  # the data sets' own code may raise anything
            reason = " ".join(str(error).split())
            raise UserError(
                f"--tasks {name}: its data cannot be loaded ({type(error).__name__}: {reason}); lm-evaluation-harness "
                "fetches it from the Hugging Face hub or finds it in HF_HOME, where an earlier run has put it"
            ) from None
        group = loaded["groups"].get(name)
        self._loaded[name] = ([group] if group is not None else list(loaded["tasks"].values())), loaded["tasks"]

    def run(self, name: str, setting: Setting, limit: int | None, samples: bool) -> TaskResult:
        """Ask one task's, or one group's, questions.

        Args:
            limit: questions a task; None for all.
            samples: keep every question with its answer in `raw`.
        """
        import aiohttp
        import requests
        from lm_eval.evaluator import simple_evaluate

        self.load(name)
        spec, tasks = self._loaded[name]
        try:
            raw = simple_evaluate(
                model=self._backend(setting, tasks),
                tasks=spec,
                num_fewshot=setting.shots,
                limit=limit,
                log_samples=samples,
                apply_chat_template=setting.chat,
                fewshot_as_multiturn=setting.chat,
                task_manager=self._manager(name),
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
        except (aiohttp.ClientError, requests.RequestException, TimeoutError) as error:
            raise ServerFailed(f"{self.served.url} stopped answering: {error}") from error
        assert raw is not None  # this is the only rank
        shots = next(iter(raw["n-shot"].values()))
        questions = sum(raw["n-samples"][task]["effective"] for task in tasks)
        return TaskResult(name, Setting(shots, setting.chat, setting.published), _metrics(raw), questions, raw)

    def _manager(self, name: str) -> Any:
        """A task manager that knows the task; the one with lm-eval's own thousands takes seconds to make."""
        own = self._managers(whole=False)
        return own if name in own.all_tasks else self._managers(whole=True)

    @cache  # noqa: B019  one harness a process
    def _managers(self, whole: bool) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=[str(folder) for folder in self._include], include_defaults=whole)

    def _backend(self, setting: Setting, tasks: Mapping[str, Any]) -> Any:
        """The chat endpoint for tasks that generate in chat format. Likelihoods need the prompt's log-probabilities,
        which only the completions endpoint returns; there the client applies the chat format."""
        from lm_eval.models.openai_completions import LocalChatCompletion

        authorization = {"Authorization": f"Bearer {self.served.key}"} if self.served.key else {}
        common = {
            "model": self.served.name,
            "num_concurrent": self._concurrency,
            "max_length": self.served.context,
            "max_retries": 3,
            "timeout": 600,  # seconds a request
            # Without a header, lm-eval would send the user's OPENAI_API_KEY.
            "header": {"User-Agent": "hunyuan-vllm"} | authorization,
        }
        generates = all(task.OUTPUT_TYPE == "generate_until" for task in tasks.values())
        if setting.chat and generates:
            return LocalChatCompletion(base_url=f"{self.served.url}/v1/chat/completions", **common)
        return _completions()(
            base_url=f"{self.served.url}/v1/completions",
            tokenizer_backend="huggingface",
            tokenizer=self._tokenizer,
            # Plain text begins with the document's start token; the chat template writes its own.
            add_bos_token=not setting.chat,
            **common,
        )


def _completions() -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class Completions(LocalCompletionsAPI):
        def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            payload = super()._create_payload(*args, **kwargs)
            if payload.get("echo"):
                # Tokens that decode to the same text would share an entry among the likeliest tokens.
                payload["return_tokens_as_token_ids"] = True
            return payload

    return Completions


def _metrics(raw: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """From lm-eval's flat results, where "acc,none" stands beside "acc_stderr,none"."""
    found: dict[str, dict[str, tuple[float, float | None]]] = {}
    for task, values in raw["results"].items():
        for key, value in values.items():
            metric, _, chain = key.partition(",")
            if not chain or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{chain}")
            name = metric if chain == "none" else f"{metric} ({chain})"
            found.setdefault(task, {})[name] = (value, error if isinstance(error, float) else None)
    return found


def _quiet() -> None:
    """Silence messages meant for developers of lm-evaluation-harness."""
    for name in ("lm_eval", "lm-eval", "datasets", "httpx", "httpx2", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def task_names(given: str) -> list[str]:
    """Each task of a list with commas once, in order; `published` stands for those of the published table."""
    words = [name.strip() for name in given.split(",") if name.strip()]
    names = [name for word in words for name in (PUBLISHED if word == "published" else [word])]
    if not names:
        raise UserError("--tasks is empty: name one, as in --tasks hunyuan_demo")
    return list(dict.fromkeys(names))


def run(
    harness: Harness, names: Sequence[str], shots: int | None, chat: bool | None, limit: int | None,
    output: Path | None, samples: bool,
) -> list[TaskResult]:  # fmt: skip
    """Ask the questions of all tasks; `output` is written after each.

    Args:
        shots, chat: instead of each task's setting; None leaves it.
    """
    if samples and output is None:
        raise UserError("--samples needs --output, the file that they are written to")
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: {output.absolute().parent} is not a directory")
    for name in names:
        harness.load(name)  # reports mistakes before hours of questions
    results: list[TaskResult] = []
    for name in names:
        usual = SETTINGS.get(name, Setting())
        asked = replace(
            usual, shots=usual.shots if shots is None else shots, chat=usual.chat if chat is None else chat
        )  # fmt: skip
        results.append(harness.run(name, asked, limit, samples))
        if output is not None:
            found: dict[str, Any] = {"server": harness.served.url, "model": harness.served.name, "limit": limit}
            found |= {"scores": scores_json(results), "raw": {one.name: one.raw for one in results}}
            with replacing(output) as temporary:
                text = json.dumps(found, indent=1, ensure_ascii=False, default=str)
                temporary.write_text(text + "\n", encoding="utf-8")
    return results


def scores_json(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    return [
        {
            "task": result.name,
            **asdict(result.setting),
            "questions": result.questions,
            "metrics": result.metrics,
        }
        for result in results
    ]


def scores_table(results: Sequence[TaskResult]) -> Table:
    """One row a metric of each task; of a group only the group's own."""
    table = Table("task", "asked as", title_justify="left")
    for name in ("questions", "metric", "score", "± standard error", "published BF16 / FP8"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        chat = "chat" if result.setting.chat else "text"
        asked = f"{chat}, {result.setting.shots} shots" if result.setting.shots else chat
        published = " / ".join(map(str, result.setting.published or ())) or "-"
        own = result.metrics.get(result.name) or {}
        for metric, (value, error) in own.items():
            spread = "-" if error is None else f"{100 * error:.2f}"
            table.add_row(result.name, asked, f"{result.questions:,}", metric, f"{100 * value:.2f}", spread, published)
    return table
