"""The certificate of a server that speaks HTTPS"""

import os
import ssl
import stat
from pathlib import Path

from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError


def check_certificate(flags: Flags) -> None:
    """Check the files of --ssl-certfile and --ssl-keyfile, if they are given."""
    certificate, key = flags.get("ssl-certfile") or None, flags.get("ssl-keyfile") or None
    if certificate is None:
        if key is not None:
            raise UserError("--ssl-keyfile has no effect without --ssl-certfile: give both")
        return
    for option, name in (("ssl-certfile", certificate), ("ssl-keyfile", key)):
        if name is not None and not Path(name).is_file():
            raise UserError(f"--{option} {name} is not a file")
    private = Path(key or certificate)
    status = private.stat()
    if status.st_uid == os.geteuid() and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"the private key {private} is open to other users: chmod 600 {private}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a passphrase would be asked for on the terminal, by vLLM as well.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"--ssl-certfile {certificate} and its key {private} cannot be used ({reason}): they must be PEM files "
            "that belong together, the key without a passphrase"
        ) from None
