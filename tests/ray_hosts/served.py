"""A server on a test host, and what clients on another host get from it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosts import HOME, Host

CLIENT = Path(__file__).with_name("client.py")
KEY_FILE = f"{HOME}/.config/hunyuan-vllm/api-key"
PORT = 8020
READY = "hunyuan-vllm: ready after"


@dataclass(frozen=True)
class Answer:
    """What one client got.

    Attributes:
        text: all that was streamed.
        whole: the stream came to its proper end.
        error: what the client was told instead, or what happened to its connection.
        ended: when, by this machine's monotonic clock.
    """

    text: str
    whole: bool
    error: str
    ended: float


class Served:
    """A running server; `output` grows with what it prints."""

    def __init__(self, host: Host, argv: Sequence[str], environ: Mapping[str, str], client: Host) -> None:
        self.host, self.client = host, client
        self.output: list[str] = []
        self.started = time.monotonic()
        self.process = host.start(*argv, env=dict(environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.output.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def log(self) -> str:
        return "".join(self.output)

    @property
    def url(self) -> str:
        return f"http://{self.host.address}:{PORT}"

    @property
    def times_ready(self) -> int:
        """How often it has become ready: more than once where it supervises itself."""
        return sum(READY in line for line in self.output)

    def wait_until_ready(self, timeout: float = 300, times: int = 1) -> float:
        """Seconds from the start until it was ready so often; a failure if it ends before or takes longer than that."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while self.times_ready < times:
                if self._ended or not self._changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"not ready in {timeout:g} s:\n{self.log[-6000:]}")
        return time.monotonic() - self.started

    def wait_until_ended(self, timeout: float) -> int:
        status: int = self.process.wait(timeout)
        self._reader.join(timeout=10)
        return status

    def key(self) -> str:
        """The API key that it made."""
        return self.host.sh(f"cat {KEY_FILE}").strip()

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 120) -> Any:
        """The answer to one request, from the client's host."""
        asked = json.dumps({"url": self.url, "key": self.key(), "path": path, "body": body})
        return json.loads(self.client.run(sys.executable, CLIENT, "post", input=asked, timeout=timeout).stdout)

    def stream(self, bodies: Sequence[Mapping[str, Any]]) -> "Streams":
        """As many clients at once, each with a completion that is streamed to it."""
        asked = json.dumps({"url": self.url, "key": self.key(), "bodies": list(bodies)})
        return Streams(self.client.start(sys.executable, CLIENT, "stream", **Streams.PIPES), asked)

    def signal(self, number: int) -> None:
        """To the command itself, which is the child of what entered the host."""
        entered = self.process.pid
        for child in Path(f"/proc/{entered}/task/{entered}/children").read_text().split():
            os.kill(int(child), number)

    def stop(self) -> int:
        """End it as Ctrl-C would; its exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGINT)
        return self.wait_until_ended(60)


class Streams:
    """Clients that are being answered."""

    PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def __init__(self, process: subprocess.Popen[str], asked: str) -> None:
        self._process = process
        assert process.stdin is not None
        process.stdin.write(asked)
        process.stdin.close()

    def wait_until_flowing(self) -> None:
        """All have got some words, and none has got all."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line != "flowing\n":
            raise AssertionError(f"no stream began: {line}{self._process.stdout.read()}")

    def answers(self) -> list[Answer]:
        """Each client's, when the last has ended."""
        assert self._process.stdout is not None
        lines = [line for line in self._process.stdout if line != "flowing\n"]
        self._process.wait()
        return [Answer(**answer) for answer in json.loads("".join(lines))]
