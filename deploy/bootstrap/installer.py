"""uv, told where pip is configured to find packages, and the steps that a user sees it work through."""

import ast
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bootstrap.environment import UNFINISHED, Environment, SetupError, say

TORCH_SOURCE = "HUNYUAN_TORCH_SOURCE"
PR_SET_PDEATHSIG = 1
HEARTBEAT = 15.0  # seconds between lines of a long step when the output is not a terminal
FULL_DISK = re.compile("No space left on device|os error 28|Disk quota exceeded|os error 122")
NO_NETWORK = re.compile(
    "NewConnectionError|ConnectTimeoutError|Max retries exceeded|ReadTimeoutError|ProxyError|SSLError|"
    "Name or service not known|Temporary failure in name resolution|Network is unreachable|"
    "error sending request|dns error|Request failed after"
)


def explain(output: str, doing: str) -> str:
    """One line for a failed command that wrote `output`; `doing` is what it was for ("installing 136 packages")."""
    if FULL_DISK.search(output):
        return f"the disk filled up while {doing}: make room and start again"
    if NO_NETWORK.search(output):
        return (
            f"no connection to the package index while {doing}: check the network, the proxy (HTTPS_PROXY) "
            "or the index that pip is set to (pip config list, PIP_INDEX_URL)"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return f"{doing} failed: {(errors or lines or ['no output'])[-1]}"


class Steps:
    """Numbered steps on stderr, a line and its seconds for each; while one runs, the latest line of its command."""

    def __init__(self, total: int, log: Path) -> None:
        self._total, self._number, self._log = total, 0, log
        self._title, self._started = "", 0.0
        self._open = False  # the last line has no end yet
        self._live = sys.stderr.isatty()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._number += 1
        self._title, self._started = f"[{self._number}/{self._total}] {title}", time.monotonic()
        self._show("...")
        try:
            yield
            self._show(f"{time.monotonic() - self._started:.0f} s")
        finally:
            self._end_line()

    def _show(self, status: str) -> None:
        text = f" {status}" if self._open else f"{self._title}  {status}"
        if self._live:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            text = "\r\x1b[K" + f"{self._title}  {status}"[:width]
        print(text, end="", file=sys.stderr, flush=True)
        self._open = True

    def _end_line(self) -> None:
        if self._open:
            say("")
        self._open = False

    def run(self, argv: list[str | Path], doing: str, env: Mapping[str, str] = os.environ) -> str:
        """What the command wrote. Raises SetupError if it failed; `doing` says what it is for ("installing ...")."""
        # A process group of its own: Ctrl-C reaches only us, and we end it and what it started. It ends with us, too.
        child = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )  # fmt: skip
        try:
            output = self._follow(child)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            child.wait()
        with self._log.open("a") as log:
            log.write(f"$ {' '.join(map(str, argv))}\n{output}\n")
        if child.returncode:
            raise SetupError(f"{explain(output, doing)} (all output: {self._log})")
        return output

    def _follow(self, child: subprocess.Popen[bytes]) -> str:
        assert child.stdout is not None
        output = b""
        shown = time.monotonic()
        while True:
            if select.select([child.stdout], [], [], 1.0)[0]:
                piece = os.read(child.stdout.fileno(), 1 << 16)
                if not piece:
                    return output.decode(errors="replace")
                output += piece
            now = time.monotonic()
            if now - shown < (0.2 if self._live else HEARTBEAT):
                continue
            shown = now
            latest = output[-500:].decode(errors="replace").strip().rpartition("\n")[2]
            status = f"{now - self._started:.0f} s  {latest}".rstrip()
            if self._live:
                self._show(status)
            else:
                self._end_line()
                say(f"      {status}")


def uv_settings(pip_config: str) -> dict[str, str]:
    """The variables that make uv look where pip would, from what `pip config list` prints.

    Variables of pip override its section [install], which overrides [global].
    """
    settings: dict[str, str] = {}
    lines = [line.partition("=") for line in pip_config.splitlines()]
    for section in ("global.", "install.", ":env:."):
        for name, _, value in lines:
            if name.startswith(section):
                settings[name.removeprefix(section).replace("_", "-")] = str(ast.literal_eval(value))
    translated = {
        "UV_FIND_LINKS": ",".join(settings.get("find-links", "").split()),
        "UV_INSECURE_HOST": settings.get("trusted-host", ""),
        "UV_HTTP_TIMEOUT": settings.get("timeout") or settings.get("default-timeout", ""),
        "UV_HTTP_RETRIES": settings.get("retries", ""),
        "SSL_CERT_FILE": settings.get("cert", ""),
        "SSL_CLIENT_CERT": settings.get("client-cert", ""),
        "ALL_PROXY": settings.get("proxy", ""),
    }
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        translated["UV_NO_INDEX"] = "1"
    else:
        translated["UV_INDEX_URL"] = settings.get("index-url", "")
        translated["UV_EXTRA_INDEX_URL"] = settings.get("extra-index-url", "")
    # Like pip, weigh all indexes alike; every version is pinned, so the best match is the pinned one.
    translated["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in translated.items() if value}


class Uv:
    """The pinned uv, which pip brings into the environment."""

    def __init__(self, environment: Environment, steps: Steps, environ: Mapping[str, str]) -> None:
        self._steps, self._python = steps, environment.python
        self._requirements = environment.requirements
        pip: list[str | Path] = [self._python, "-m", "pip", "--disable-pip-version-check"]
        requirement = self._requirements / "uv.txt"
        distribution = requirement.read_text().split()[-1].replace("==", "-")
        if not list(
            environment.path.glob(f"lib/python*/site-packages/{distribution}.dist-info/INSTALLER")
        ):  # written last
            get = [*pip, "install", "--no-deps", "--retries", "2", "-r", requirement]
            steps.run(get, "fetching the installer (uv)")
        settings = uv_settings(steps.run([*pip, "config", "list"], "reading pip's configuration"))
        self._options = ["--no-index"] if settings.get("UV_NO_INDEX") else []  # uv has no such variable
        if UNFINISHED in environment.state().values():
            self._options.append("--reinstall")  # uv takes a package for installed when a part of its files is there
        # Source archives are built with what the environment has, and DeepSpeed compiles an operator when it is used.
        build = {"UV_NO_BUILD_ISOLATION": "1", "DS_BUILD_OPS": "0"}
        self._env = {**settings, **build, **environ}
        self._torch_source = named = environ.get(TORCH_SOURCE, "").strip()
        if named.startswith(("http://", "https://")):
            self._env["UV_EXTRA_INDEX_URL"] = f"{self._env.get('UV_EXTRA_INDEX_URL', '')} {named}".strip()
        elif named and Path(named).is_dir():
            self._env["UV_FIND_LINKS"] = f"{self._env.get('UV_FIND_LINKS', '')},{Path(named).resolve()}".strip(",")
        elif named:
            raise SetupError(f"{TORCH_SOURCE}={named} is neither a directory of wheels nor the URL of a package index")

    def run(self, command: str, *arguments: str | Path, doing: str) -> None:
        """`uv pip COMMAND ARGUMENTS` on the environment."""
        uv = self._python.with_name("uv")
        self._steps.run([uv, "pip", command, "--python", self._python, *self._options, *arguments], doing, self._env)

    def choose_torch(self) -> tuple[Path, str]:
        """The lock of torch for a CPU and what that is.

        The CPU build is not on PyPI, and no address is built in: only pip's configuration and the user name sources.
        Without it the index's own torch is taken, with its CUDA libraries.

        Raises:
            SetupError: the user named a source that does not have it, or no source could be asked.
        """
        lock = self._requirements / "torch-cpu.txt"
        named = self._torch_source
        try:
            self.run("install", "--no-deps", "--dry-run", "-r", lock, doing="looking for torch")
            return lock, f"torch for the CPU from {named or 'the sources pip is set to'}"
        except SetupError as error:
            if "no connection" in str(error):
                raise
        if named:
            wanted = lock.read_text().split()[-1]
            raise SetupError(
                f"{TORCH_SOURCE}={named} has no {wanted} for this Python and machine: check it, or unset it"
            )
        return self._requirements / "torch-pypi.txt", (
            "torch with its CUDA libraries (no CPU build in pip's sources; name a wheel directory or index with "
            f"{TORCH_SOURCE}= to download a tenth of it)"
        )
