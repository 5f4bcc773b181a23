"""Benchmarks by lm-evaluation-harness on a running server"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hunyuan_vllm.bench.client import ServedModel
from hunyuan_vllm.tokenizer import load_tokenizer
from hunyuan_vllm.util.errors import UserError

TASKS_DIRECTORY: Final = Path(__file__).with_name("tasks")
# Of the published table, with the shots that each is usually reported with: the table does not give them.
PUBLISHED: Final = {"arc_challenge_letters": 25, "ceval-valid": 5, "cmmlu": 5, "mmlu": 5}
CHATS: Final = ("hunyuan_demo", "hunyuan_demo_choice")
SEED: Final = 1234  # lm-evaluation-harness's own, for few-shot examples


class ServerFailed(Exception):
    """The server stopped answering, or answered with errors."""


def task_names(given: str) -> list[str]:
    """Each task of a list with commas once, in order; `published` stands for those of the published table."""
    words = [name.strip() for name in given.split(",") if name.strip()]
    names = [name for word in words for name in (PUBLISHED if word == "published" else [word])]
    if not names:
        raise UserError("--tasks is empty: name one, as in --tasks hunyuan_demo")
    return list(dict.fromkeys(names))


class Harness:
    """Runs tasks on a server.

    Args:
        tokenizer: directory of the checkpoint's tokenizer; the client tokenizes, and applies the chat template.
        include: a directory with more tasks.
    """

    def __init__(self, served: ServedModel, tokenizer: Path, concurrency: int, include: Path | None = None) -> None:
        for name in ("lm_eval", "lm-eval", "datasets", "httpx", "httpx2", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            import lm_eval.models.openai_completions  # noqa: F401  what the backend needs is there too
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"lm-evaluation-harness is not installed ({error}): pip install 'hunyuan-vllm[eval]'"
            ) from None
        load_tokenizer(tokenizer)  # also lets transformers, and so lm-eval, find the class
        self._served, self._tokenizer, self._concurrency = served, tokenizer, concurrency
        self._directories = [str(directory) for directory in (TASKS_DIRECTORY, include) if directory]
        self._manager = TaskManager(include_path=self._directories, include_defaults=False)
        self._loaded: dict[str, list[Any]] = {}

    def load(self, name: str) -> None:
        """Read a task or group with its data: mistakes are reported before hours of questions."""
        from lm_eval.tasks import TaskManager

        if name not in self._manager.all_tasks:  # its own thousands of files take seconds to read
            self._manager = TaskManager(include_path=self._directories)
        if name not in self._manager.all_tasks:
            raise UserError(f"--tasks {name}: unknown task; `lm_eval ls tasks` lists all")
        try:
            loaded = self._manager.load([name])
        except Exception as error:  # the data sets' own code may raise anything
            reason = " ".join(str(error).split())
            raise UserError(
                f"--tasks {name}: its data cannot be loaded ({type(error).__name__}: {reason}); lm-evaluation-harness "
                "fetches it from the Hugging Face hub or finds it in HF_HOME, where an earlier run has put it"
            ) from None
        group = loaded["groups"].get(name)
        self._loaded[name] = [group] if group is not None else list(loaded["tasks"].values())

    def run(self, name: str, shots: int | None, chat: bool | None, limit: int | None) -> Mapping[str, Any]:
        """lm-evaluation-harness's results, with every question and answer, of a task that was loaded.

        Args:
            shots, chat: None for what is usual for this task.
            limit: questions of a task; None for all.
        """
        import aiohttp
        import requests
        from lm_eval.evaluator import simple_evaluate

        chat = name in CHATS if chat is None else chat
        try:
            raw: Mapping[str, Any] = simple_evaluate(
                model=self._backend(chat),
                tasks=self._loaded[name],
                num_fewshot=PUBLISHED.get(name) if shots is None else shots,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                task_manager=self._manager,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
        except (aiohttp.ClientError, requests.RequestException, TimeoutError) as error:
            raise ServerFailed(f"{self._served.url} stopped answering: {error}") from error
        return raw

    def _backend(self, chat: bool) -> Any:
        """The completions endpoint, which alone returns the log-probabilities of a prompt."""
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        class Completions(LocalCompletionsAPI):
            def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
                payload = super()._create_payload(*args, **kwargs)
                if payload.get("echo"):
                    # Tokens that decode to the same text would share an entry among the likeliest tokens.
                    payload["return_tokens_as_token_ids"] = True
                return payload

        served = self._served
        return Completions(
            base_url=f"{served.url}/v1/completions",
            model=served.name,
            tokenizer_backend="huggingface",
            tokenizer=str(self._tokenizer),
            # Plain text begins with the document's start token; the chat template writes its own.
            add_bos_token=not chat,
            num_concurrent=self._concurrency,
            max_length=served.context,
            max_retries=3,
            timeout=600,  # seconds a request
            # Without a header, lm-eval would send the user's OPENAI_API_KEY.
            header={"User-Agent": "hunyuan-vllm"} | ({"Authorization": f"Bearer {served.key}"} if served.key else {}),
        )
