"""Standard output and error that cannot be written, or cannot show a character: nothing ends because of it."""

import fcntl
import os
import re
import subprocess
import sys
import textwrap
import threading

import pytest
from waiting import eventually

# A service that writes a line for each number it is told, and says on a pipe of its own how far it is.
WRITER = """
import os, sys
from hunyuan_vllm.util.streams import make_output_unfailing
make_output_unfailing()
for line in sys.stdin:
    for number in range(int(line)):
        print("line", number)
    os.write(int(sys.argv[1]), b".")
"""


class Writer:
    def __init__(self, output, *, closed=False):
        self.done, end = os.pipe()
        argv = [sys.executable, "-c", WRITER, str(end)]
        if closed:
            argv = ["sh", "-c", 'exec "$@" >&-', "sh", *argv]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE, pass_fds=[end], text=True, bufsize=1
        )
        os.close(end)

    def write(self, lines):
        """Have it write so many lines, and wait until it has gone on."""
        print(lines, file=self.process.stdin)
        assert os.read(self.done, 1) == b"."

    def end(self):
        """Its standard error."""
        _, errors = self.process.communicate(timeout=60)
        os.close(self.done)
        assert self.process.returncode == 0, errors
        return errors


def test_what_is_written_arrives_whole_and_in_order(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        writer = Writer(log)
        writer.write(1000)
        assert writer.end() == ""
    assert (tmp_path / "log").read_text() == "".join(f"line {n}\n" for n in range(1000))


def test_a_full_disk_stops_nothing():
    with open("/dev/full", "wb") as full:
        writer = Writer(full)
        writer.write(20_000)
        assert writer.end() == ""


def test_a_closed_output_stops_nothing():
    writer = Writer(None, closed=True)
    writer.write(20_000)
    assert writer.end() == ""


def test_a_reader_that_has_gone_stops_nothing():
    reading, writing = os.pipe()
    writer = Writer(writing)
    os.close(writing)
    os.close(reading)
    writer.write(20_000)
    assert writer.end() == ""


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_stands_still_stops_nothing_and_hears_what_it_missed(blocking):
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    writer = Writer(writing)
    os.close(writing)
    writer.write(20_000)
    heard = []
    with open(reading) as output:
        reader = threading.Thread(target=lambda: heard.extend(iter(output.readline, "")))
        reader.start()
        eventually(lambda: sum(map(lines_in, heard)) == 20_000)
        assert writer.end() == ""
        reader.join()
    assert "line 0\n" in heard[:2]  # lines may have been dropped before the writing thread gets to run
    assert any("of output dropped: nobody read them" in line for line in heard)


def lines_in(line):
    """How many of the service's lines a line of its log stands for."""
    dropped = re.fullmatch(r"hunyuan-vllm: (\d+) lines? of output dropped: .+\n", line)
    return int(dropped[1]) if dropped else 1


def test_once_a_disk_has_room_again_the_log_says_what_is_missing(tmp_path):
    """A limit on a file's size stands for a disk that fills up."""
    log = tmp_path / "log"
    program = """
    import os, resource, signal, sys, time
    from hunyuan_vllm.util.streams import make_output_unfailing
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    make_output_unfailing()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, resource.RLIM_INFINITY))
    for number in range(3):
        print("lost", number)
    sys.stdin.readline()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("kept")
    """
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=output, text=True
        )
    eventually(lambda: log.read_text() == "lost ")
    process.communicate("\n", timeout=60)
    assert log.read_text() == "lost \nhunyuan-vllm: 3 lines of output dropped: File too large\nkept\n"


def test_a_signal_handler_may_write_while_its_thread_does():
    program = """
    import os, signal, sys
    from hunyuan_vllm.util.streams import make_output_unfailing
    make_output_unfailing()
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    signal.signal(signal.SIGALRM, lambda *_: print("alarm"))
    for number in range(20_000):
        print("line")
    signal.setitimer(signal.ITIMER_REAL, 0)
    """
    with open("/dev/full", "wb") as full:
        subprocess.run([sys.executable, "-c", textwrap.dedent(program)], stdout=full, check=True, timeout=60)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_a_character_ends_no_command(encoding):
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    program = 'import sys; from hunyuan_vllm.cli import main; sys.argv[1:] = ["check", "海"]; main()'
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert b"\\u6d77" in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
