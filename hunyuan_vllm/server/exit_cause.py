"""What ended a server, read from its log, its exit code and the kernel's count of processes killed for memory"""

import json
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

ERROR_LINE = re.compile(r"(?:^|[\s\]])((?:[A-Za-z_]\w*\.)*[A-Za-z_]*(?:Error|Exception|Interrupt): \S.*)")
# Lines that only say that some other process failed.
FOLLOW_UPS = (
    "See root cause above",
    "Engine core initialization failed",
    "EngineCore encountered an issue",
    "Worker failed with error",
)
ENGINE_DIED = "Engine process %s died unexpectedly (exit code: %s)"  # our own line; vLLM's has no exit code
# Processes that ended, as vLLM and we log them: names and exit codes, which are negative if a signal ended them.
DIED = re.compile(r"(?:Worker proc|Engine process) (\S+) died unexpectedly \(exit code: (-?\d+)\)")
RAY_DIED = re.compile(r"RayWorkerProc rank=\[([\d, ]+)\] died unexpectedly")
FAILED = re.compile(r"Failed core proc\(s\): \{(.+?)\}")
CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
VMSTAT = Path("/proc/vmstat")


def exit_cause(lines: Sequence[str], exit_code: int = 0, oom_killed: bool | None = None) -> str | None:
    """What ended a server, in one line without the log's prefix; None if it is unknown.

    Args:
        exit_code: of its first process; negative if a signal ended it.
        oom_killed: whether the kernel killed a process for memory while it ran; None if that is unknown.
    """
    messages = [message for line in lines for message in _messages(line)]
    exits = [(at, name, code) for at, message in enumerate(messages) for name, code in _exits(message)]
    first = exits[0][0] if exits else None  # later errors follow from that exit
    error = _last_error(messages[:first])
    # Once one process has failed, vLLM itself ends the others by SIGTERM.
    killed = next(((name, -code) for _, name, code in exits if code and code < 0 and code != -signal.SIGTERM), None)
    if killed is None and exit_code < 0:
        killed = "the API server", -exit_code
    if killed is None and exits and not error:
        _, name, code = exits[0]
        return f"{name} ended unexpectedly" + (f" (exit code {code})" if code is not None else "")
    if killed is None:
        return error
    name, number = killed
    names = {one.value: one.name for one in signal.Signals}
    text = f"{name} was killed by {names.get(number, f'signal {number}')}"
    if number == signal.SIGKILL and oom_killed is not False:
        text += ": out of memory" if oom_killed else ", likely for lack of memory (dmesg says)"
    elif number == signal.SIGABRT and error:  # a process that fails in C++ code aborts itself
        text += f": {error}"
    return text


def oom_kills() -> int | None:
    """Processes of this control group, else of this machine, that the kernel has killed for memory so far.

    None if that is unknown.
    """
    for file in (*_memory_events(), VMSTAT):
        with suppress(OSError, ValueError):
            counts = dict(line.split() for line in file.read_text().splitlines())
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return None


def _memory_events() -> Iterator[Path]:
    with suppress(OSError):
        for line in CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":  # cgroup v1
                yield CGROUPS / "memory" / path[1:] / "memory.oom_control"
            elif not controllers:
                yield CGROUPS / path[1:] / "memory.events"


def _last_error(messages: Sequence[str]) -> str | None:
    for message in reversed(messages):
        match = ERROR_LINE.search(message.rstrip())
        if match and not any(phrase in match[1] for phrase in FOLLOW_UPS):
            return match[1]
    return None


def _exits(message: str) -> Iterator[tuple[str, int | None]]:
    """Name and exit code, where it is known, of each process that this message reports as ended."""
    if match := DIED.search(message):
        yield f"process {match[1]}", int(match[2])
    elif match := RAY_DIED.search(message):
        yield f"Ray worker of rank {match[1]}", None
    elif match := FAILED.search(message):
        for name, code in re.findall(r"'([^']+)': (-?\d+)", match[1]):
            yield f"process {name}", int(code)


def _messages(line: str) -> list[str]:
    """The line itself, or the lines in a JSON record (serve --json-logs)."""
    if line.startswith("{"):
        with suppress(ValueError):
            record = json.loads(line)
            return f"{record.get('message')}\n{record.get('exc_info', '')}".splitlines()
    return [line]
