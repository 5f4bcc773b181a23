"""The exception for a user's mistake: commands print its one line and exit with status 2, without a traceback."""

__all__ = ["UserError"]


class UserError(Exception):
    """What is wrong and what to do about it, in one line."""
