"""The exceptions that commands print in one line, without a traceback, before they exit with its status."""

import os


class UserError(Exception):
    """A user's mistake: what is wrong and what to do, in one line. Docstrings do not list where it is raised."""

    status = 2


class NotYetError(UserError):
    """What was asked for may be right, and what it needs is not there yet: the same command may succeed later."""

    status = os.EX_TEMPFAIL
