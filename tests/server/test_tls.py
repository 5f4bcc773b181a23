"""A certificate that cannot be used is named before a model is loaded."""

import pytest
from certificates import own_certificate

from hunyuan_vllm.server.launch import check_certificate
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError


@pytest.fixture
def files(tmp_path):
    return own_certificate(tmp_path)


def flags(certificate=None, key=None) -> Flags:
    options = (("--ssl-certfile", certificate), ("--ssl-keyfile", key))
    return Flags([word for name, file in options if file is not None for word in (name, str(file))])


def test_a_certificate_with_its_key(files):
    check_certificate(flags())
    check_certificate(flags(*files))


def test_both_in_one_file(files):
    certificate, key = files
    key.write_bytes(certificate.read_bytes() + key.read_bytes())
    check_certificate(flags(key))


def test_what_cannot_be_used(files, tmp_path):
    certificate, key = files
    (tmp_path / "other").mkdir()
    _, other = own_certificate(tmp_path / "other")
    junk = tmp_path / "junk"
    junk.write_text("junk")
    junk.chmod(0o600)
    for given, message in (
        (flags(None, key), "without --ssl-certfile"),
        (flags("/nowhere", key), "--ssl-certfile /nowhere is not a file"),
        (flags(certificate, "/nowhere"), "--ssl-keyfile /nowhere is not a file"),
        (flags(certificate, other), "belong together"),
        (flags(junk), "cannot be used"),
    ):
        with pytest.raises(UserError, match=message):
            check_certificate(given)


def test_a_key_that_others_can_read(files):
    files[1].chmod(0o644)
    with pytest.raises(UserError, match=f"chmod 600 {files[1]}"):
        check_certificate(flags(*files))
