"""Keys made by OpenSSH, for tests that compare with it."""

import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hunyuan_vllm.cluster.host_keys import PublicKey


def keygen(*arguments: object, check: bool = True) -> str:
    """What ssh-keygen prints; skips where there is none."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("this needs ssh-keygen: install the Debian package openssh-client", allow_module_level=True)
    done = subprocess.run(["ssh-keygen", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def make_key(file: Path, kind: str = "ed25519", passphrase: str = "") -> str:
    """Write a key pair; its public line."""
    size = ["-b", 2048] if kind == "rsa" else []
    keygen("-q", "-t", kind, *size, "-N", passphrase, "-C", "test", "-f", file)
    return file.with_name(file.name + ".pub").read_text().strip()


def public_key(number: int, kind: str = "ed25519") -> PublicKey:
    """One of several keys that stay the same for the run."""
    return _public_key(number, kind)


@cache
def _public_key(number: int, kind: str) -> PublicKey:
    with TemporaryDirectory() as directory:
        key = PublicKey.parse(make_key(Path(directory) / f"key{number}", kind).split())
    assert key is not None
    return key
