"""Where the password and the keys for the first login come from: files, the environment, a terminal."""

import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

import paramiko

from hunyuan_vllm.util.errors import UserError

# Those OpenSSH tries by itself, newest kind first.
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


def this_user() -> pwd.struct_passwd:
    """Who runs this, and the home where that user's SSH files are."""
    try:
        return pwd.getpwuid(os.geteuid())
    except KeyError:
        raise UserError(f"user id {os.geteuid()} is not in /etc/passwd, so it has no home for SSH keys") from None


def read_password_file(file: Path) -> str:
    try:
        with file.open() as opened:
            mode = Path(f"/proc/self/fd/{opened.fileno()}").stat().st_mode
            password = opened.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"the password file {file} cannot be read: {reason}") from None
    if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"the password file {file} is open to other users: chmod 600 {file}")
    if not password:
        raise UserError(f"the password file {file} must hold the password in its first line")
    return password


def read_identity(file: Path, ask_passphrase: Callable[[str], str] | None) -> paramiko.PKey:
    """The private key in `file`, such as a cloud provider gives out."""
    if file.suffix == ".pub":
        raise UserError(f"--identity {file} is the public half: name the private key, {file.with_suffix('')}")
    try:
        mode = file.stat().st_mode
        if file.stat().st_uid == os.geteuid() and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"the private key {file} is open to other users: chmod 600 {file}")
        return _load(file, None)
    except OSError as error:
        raise UserError(f"--identity {file} cannot be read: {error.strerror}") from None
    except TypeError:  # how the library says that a passphrase is needed
        if ask_passphrase is None:
            raise UserError(
                f"--identity {file} has a passphrase, and there is no terminal to ask for it: run this on a terminal, "
                "or give a key without one"
            ) from None
    except (ValueError, paramiko.SSHException):
        raise UserError(f"--identity {file} is not a private key that SSH can use") from None
    try:
        return _load(file, ask_passphrase(f"passphrase of {file}: "))
    except (ValueError, TypeError, paramiko.SSHException):
        raise UserError(f"that is not the passphrase of {file}") from None


def default_keys(home: Path) -> list[paramiko.PKey]:
    """The user's own keys that need no passphrase."""
    keys = []
    for name in DEFAULT_KEYS:
        try:
            keys.append(_load(home / ".ssh" / name, None))
        except (OSError, TypeError, ValueError, paramiko.SSHException):
            continue  # not there, or of no use here: ssh passes over it as well
    return keys


def _load(file: Path, passphrase: str | None) -> paramiko.PKey:
    try:
        # Its annotation says str, but the library below it takes bytes alone.
        return paramiko.PKey.from_path(file, None if passphrase is None else passphrase.encode())  # type: ignore[arg-type]
    except paramiko.pkey.UnknownKeyType as error:
        raise ValueError(f"{file}: {error.key_type}") from None
