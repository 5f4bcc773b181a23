"""TLS between the nodes: an authority of the cluster's own on the head, and a certificate for each node.

A node's private key is made there and stays there; only its request and the certificate travel.
"""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import make_private, read_private, write_private

AUTHORITY_DAYS, NODE_DAYS = 3650, 825
RENEW_BEFORE = datetime.timedelta(days=30)
EARLIER = datetime.timedelta(hours=1)  # for nodes whose clocks are behind


class NodeFiles:
    """Where a node has its key, its certificate and the authority's; a home that nodes share has those of all."""

    def __init__(self, directory: Path, address: str) -> None:
        self.address = address
        self.key, self.certificate = directory / f"{address}.key", directory / f"{address}.crt"
        self.authority = directory / "authority.crt"

    @property
    def variables(self) -> dict[str, str]:
        """What tells Ray to use them."""
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_KEY": str(self.key),
            "RAY_TLS_SERVER_CERT": str(self.certificate),
            "RAY_TLS_CA_CERT": str(self.authority),
        }


def request_certificate(files: NodeFiles) -> str:
    """On a node: a signing request for its key, which is made if there is none. PEM."""
    make_private(files.key, _new_key())
    key = _load_key(files.key)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, files.address)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def sign(directory: Path, request: str, address: str) -> tuple[str, str]:
    """On the head: the certificate of the node at `address`, and the authority's, made if there is none. PEM.

    Only the public key is taken from the request; what the certificate says is for the head to say.
    """
    asked = x509.load_pem_x509_csr(request.encode())
    key, authority = _authority(directory)
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    names += [x509.IPAddress(ipaddress.ip_address(each)) for each in dict.fromkeys((address, "127.0.0.1"))]
    public = asked.public_key()
    if not asked.is_signature_valid or not isinstance(public, ec.EllipticCurvePublicKey):
        raise UserError(f"{address} sends a request for a certificate that its key did not sign")
    certificate = (
        _builder(address, authority.subject, NODE_DAYS)
        .public_key(public)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate), _pem(authority)


def store_certificate(files: NodeFiles, certificate: str, authority: str) -> None:
    """On a node: keep what the head signed."""
    write_private(files.certificate, certificate)
    write_private(files.authority, authority)


def has_certificate(files: NodeFiles) -> bool:
    """Whether the node has all three, they belong together, and they hold for another month."""
    try:
        key = _load_key(files.key)
        loaded = [x509.load_pem_x509_certificate(file.read_bytes()) for file in (files.certificate, files.authority)]
        certificate, authority = loaded
        certificate.verify_directly_issued_by(authority)
    except (OSError, ValueError, TypeError, InvalidSignature):
        return False
    left = min(one.not_valid_after_utc for one in loaded) - datetime.datetime.now(datetime.UTC)
    return certificate.public_key() == key.public_key() and left > RENEW_BEFORE


def _authority(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key_file, file = directory / "authority.key", directory / "authority.crt"
    make_private(key_file, _new_key())
    key = _load_key(key_file)
    text = read_private(file)
    if text is not None:
        kept = x509.load_pem_x509_certificate(text.encode())
        if kept.public_key() == key.public_key():
            return key, kept
    name = "Ray cluster of this head"
    made = (
        _builder(name, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), AUTHORITY_DAYS)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(file, _pem(made))
    return key, made


def _builder(name: str, issuer: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _new_key() -> str:
    private = serialization.PrivateFormat.PKCS8
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()).decode()


def _load_key(file: Path) -> ec.EllipticCurvePrivateKey:
    text = read_private(file)
    if text is None:
        raise FileNotFoundError(file)
    key = serialization.load_pem_private_key(text.encode(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{file} is not a key made by this package: delete it, and the next start creates one")
    return key


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
