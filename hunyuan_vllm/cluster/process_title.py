"""Takes a password off this process's command line, so that `ps` and /proc no longer show it.

Standard library only, and readable by any Python: it runs before anything else is imported.
"""

import ctypes
import os
import sys


def take_option(name: str) -> str | None:
    """Remove the option `name` (with its value) from sys.argv and hide the value in the process's arguments."""
    value = None
    arguments = []
    rest = iter(sys.argv)
    for argument in rest:
        if argument.startswith(name + "="):
            value = argument[len(name) + 1 :]
        elif argument == name:
            value = next(rest, None)
            if value is None:
                arguments.append(argument)
        else:
            arguments.append(argument)
    if value is not None:
        sys.argv[:] = arguments
        _hide_in_memory(os.fsencode(name))
    return value


def _hide_in_memory(name: bytes) -> None:
    """Overwrite the option's values in the memory that the kernel shows as /proc/PID/cmdline."""
    with open("/proc/self/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end in proc(5), which counts from 1 and two more
    arguments = ctypes.string_at(start, end - start).split(b"\0")
    shown = []
    for index, argument in enumerate(arguments):
        if argument.startswith(name + b"="):
            shown.append(name + b"=*")
        elif index and arguments[index - 1] == name:
            shown.append(b"*")
        else:
            shown.append(argument)
    # Shorter than before, and padded to the same size, so that not even the length is told.
    text = b"\0".join(shown)
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
