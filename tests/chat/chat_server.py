"""The real server that the tests of the chat talk to: the demo model, behind a key."""

from contextlib import AbstractContextManager
from pathlib import Path

from serving import Server, running_server

KEY = "a-key-for-tests"
CONTEXT = 2048  # long enough for an answer to be stopped on a machine that is busy


def chat_server(key_file: Path) -> AbstractContextManager[Server]:
    flags = ("--dtype=float32", f"--max-model-len={CONTEXT}")
    return running_server(*flags, HUNYUAN_VLLM_API_KEY_FILE=str(key_file))
