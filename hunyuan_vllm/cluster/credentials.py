"""Where the password and the keys for the first login come from: files, the environment, a terminal."""

import os
import pwd
import stat
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


def read_identity(file: Path) -> paramiko.PKey:
    """The private key in `file`, such as a cloud provider gives out."""
    if file.suffix == ".pub":
        raise UserError(f"--identity {file} is the public half: name the private key, {file.with_suffix('')}")
    try:
        mode = file.stat().st_mode
        if file.stat().st_uid == os.geteuid() and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"the private key {file} is open to other users: chmod 600 {file}")
        return _load(file)
    except OSError as error:
        raise UserError(f"--identity {file} cannot be read: {error.strerror}") from None
    except TypeError:  # how the library says that a passphrase is needed
        raise UserError(f"--identity {file} has a passphrase: give a key without one") from None
    except (ValueError, paramiko.SSHException):
        raise UserError(f"--identity {file} is not a private key that SSH can use") from None


def default_keys(home: Path) -> list[paramiko.PKey]:
    """The user's own keys that need no passphrase."""
    keys = []
    for name in DEFAULT_KEYS:
        try:
            keys.append(_load(home / ".ssh" / name))
        except (OSError, TypeError, ValueError, paramiko.SSHException):
            continue  # not there, or of no use here: ssh passes over it as well
    return keys


def _load(file: Path) -> paramiko.PKey:
    try:
        return paramiko.PKey.from_path(file)
    except paramiko.pkey.UnknownKeyType as error:
        raise ValueError(f"{file}: {error.key_type}") from None
