"""Certificates of the cluster: made once, for the node alone, verified by Python's own TLS."""

import socket
import ssl
import stat
import threading

import pytest

from hunyuan_vllm.cluster.tls import NodeFiles, has_certificate, request_certificate, sign, store_certificate
from hunyuan_vllm.util.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def node(tmp_path) -> NodeFiles:
    files = NodeFiles(tmp_path / "node", "127.0.0.1")
    store_certificate(files, *sign(tmp_path / "head", request_certificate(files), files.address))
    return files


def contexts(server: NodeFiles, client: NodeFiles) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """As Ray uses them: each asks for the other's certificate."""
    made = []
    for files, purpose in ((server, ssl.PROTOCOL_TLS_SERVER), (client, ssl.PROTOCOL_TLS_CLIENT)):
        context = ssl.SSLContext(purpose)
        context.load_cert_chain(files.certificate, files.key)
        context.load_verify_locations(files.authority)
        context.verify_mode = ssl.CERT_REQUIRED
        made.append(context)
    return made[0], made[1]


def talk(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bytes:
    """What the client hears."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            try:
                with server.wrap_socket(listener.accept()[0], server_side=True) as connection:
                    connection.sendall(b"hello")
            except OSError:
                pass

        threading.Thread(target=answer, daemon=True).start()
        with socket.create_connection(listener.getsockname()) as plain:
            with client.wrap_socket(plain, server_hostname=name) as connection:
                return connection.recv(5)


def test_nodes_trust_each_other(node):
    assert talk(*contexts(node, node), "127.0.0.1") == b"hello"
    assert has_certificate(node)
    for file in (node.key, node.certificate, node.authority):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert set(node.variables) == {"RAY_USE_TLS", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT", "RAY_TLS_CA_CERT"}


def test_an_address_is_not_another(node):
    with pytest.raises(ssl.SSLCertVerificationError, match="10.0.0.9"):
        talk(*contexts(node, node), "10.0.0.9")


def test_the_authority_stays_and_another_is_not_trusted(node, tmp_path):
    head = tmp_path / "head"
    before = (head / "authority.crt").read_bytes()
    second = NodeFiles(tmp_path / "second", "127.0.0.1")
    store_certificate(second, *sign(head, request_certificate(second), second.address))
    assert (head / "authority.crt").read_bytes() == before
    assert talk(*contexts(second, node), "127.0.0.1") == b"hello"
    stranger = NodeFiles(tmp_path / "stranger", "127.0.0.1")
    store_certificate(stranger, *sign(tmp_path / "other head", request_certificate(stranger), stranger.address))
    with pytest.raises(ssl.SSLError):
        talk(*contexts(stranger, node), "127.0.0.1")


def test_what_does_not_belong_together_is_made_again(node, tmp_path):
    key = node.key.read_text()
    assert request_certificate(node) and node.key.read_text() == key
    node.key.unlink()
    assert not has_certificate(node)
    request_certificate(node)
    assert not has_certificate(node)  # another key than the certificate's
    store_certificate(node, *sign(tmp_path / "head", request_certificate(node), node.address))
    assert has_certificate(node)
    node.authority.write_text("nonsense")
    assert not has_certificate(node)


def test_a_key_that_others_can_read_is_refused(node):
    node.key.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        has_certificate(node)
