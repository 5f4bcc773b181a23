"""Which environment variables hold a secret, judged by their names alone: values are not looked at."""

from __future__ import annotations

import re

__all__ = ["names_a_secret"]

SECRET = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)


def names_a_secret(variable: str) -> bool:
    """Whether the variable of that name is to be kept from other processes and nodes."""
    return SECRET.search(variable) is not None
