#!/usr/bin/python
"""Ansible module: issues a certificate; the request only supplies the public key."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DOCUMENTATION = r"""
module: issue_certificate
short_description: Issues a certificate of a server (or client) with the platform's authority
description:
  - Runs on the control host, where the authority's key is. Writes nothing.
  - Subject, names, usages and constraints come from the options. A request contributes its public key, and its
    signature shows that the sender has the private key; anything else in it is ignored.
options:
  ca_dir: {type: path, required: true, description: Folder with C(current.crt) and C(ca.key) of the authority.}
  names: {type: list, elements: str, required: true, description: DNS names and IP addresses; the first is the subject.}
  present: {type: str, default: "", description: Certificate in place (PEM), which stays while it is right.}
  public_key:
    type: str
    default: ""
    description:
      - Public key of the key in place (PEM). Without a request, it only validates the certificate in place.
  renew_days: {type: int, default: 30, description: Days before the end from which a new one is issued.}
  request: {type: str, default: "", description: Certificate request (PEM).}
  usages:
    type: list
    elements: str
    choices: [serverAuth, clientAuth]
    default: [serverAuth]
    description: Extended key usage.
  valid_days: {type: int, default: 397, description: Days that a new certificate is valid.}
author: [InfiniteContext]
"""

EXAMPLES = r"""
- name: Issue the certificate
  issue_certificate:
    ca_dir: "{{ ictx_state_dir }}/ca"
    names: ["{{ inventory_hostname }}"]
    request: "{{ request.csr }}"
  delegate_to: localhost
"""

RETURN = r"""
certificate: {type: str, returned: with request, description: "PEM, the one in place where it is right."}
reason: {type: str, returned: success, description: Why a new one is needed; empty when the one in place stays.}
"""

Name = x509.DNSName | x509.IPAddress
USAGES = {"serverAuth": ExtendedKeyUsageOID.SERVER_AUTH, "clientAuth": ExtendedKeyUsageOID.CLIENT_AUTH}
LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", re.ASCII)
LARGEST_REQUEST = 64 * 1024  # characters
# Clocks of nodes may be behind the control host's.
BACKDATED = datetime.timedelta(hours=1)


class RefusedError(Exception):
    """A request or a name that is rejected."""


def parse_name(text: str) -> Name:
    """Returns a DNS name or an IP address; wildcards are not allowed."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    if len(text) > 253 or not all(LABEL.fullmatch(label) for label in text.split(".")):
        raise RefusedError(f"{text!r} is neither a DNS name nor an IP address")
    return x509.DNSName(text)


def key_in_place(public_key: str) -> Any:
    """Returns the public key of the key in place, for validation only; None for an unsupported type of key."""
    try:
        key = serialization.load_pem_public_key(public_key.encode())
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1) else None


def requested_key(request: str) -> Any:
    """Returns the public key of a request after validating its signature and strength."""
    if len(request) > LARGEST_REQUEST:
        raise RefusedError(f"the request has more than {LARGEST_REQUEST} characters")
    try:
        parsed = x509.load_pem_x509_csr(request.encode())
        key, signed = parsed.public_key(), parsed.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise RefusedError(f"the request cannot be read: {error}") from error
    if not signed:
        raise RefusedError("the request is not signed with its own key")
    if isinstance(key, rsa.RSAPublicKey):
        if not 2048 <= key.key_size <= 8192:
            raise RefusedError(f"an RSA key must have 2048 to 8192 bits, got {key.key_size}")
    elif isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)):
            raise RefusedError(f"an elliptic curve must be P-256, P-384 or P-521, got {key.curve.name}")
    elif not isinstance(key, ed25519.Ed25519PublicKey):
        raise RefusedError("a key must be RSA, ECDSA or Ed25519")
    return key


def extensions(
    key: Any, names: list[Name], usages: Iterable[str], authority: x509.Certificate
) -> list[tuple[Any, bool]]:
    """Returns the extensions that the certificate must have, each with whether it is critical."""
    usage = dict.fromkeys(
        ("content_commitment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"), False
    )
    return [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (
            x509.KeyUsage(
                digital_signature=True,
                key_encipherment=isinstance(key, rsa.RSAPublicKey),
                encipher_only=False,
                decipher_only=False,
                **usage,
            ),
            True,
        ),
        (x509.ExtendedKeyUsage([USAGES[usage] for usage in usages]), False),
        (x509.SubjectAlternativeName(names), not subject(names)),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False),
    ]


def subject(names: list[Name]) -> x509.Name:
    """Returns the subject: the first name, or nothing if that is too long (RFC 5280, A.1)."""
    text = str(names[0].value)
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if len(text) <= 64 else [])


def why_not(
    present: str, key: Any, wanted: list[tuple[Any, bool]], names: list[Name], authority: x509.Certificate, until: Any
) -> str:
    """Returns why the certificate in place must be replaced; empty if it is valid."""
    if not present.strip():
        return "there is none"
    try:
        certificate = x509.load_pem_x509_certificate(present.encode())
        found = [(extension.value, extension.critical) for extension in certificate.extensions]
        certificate.verify_directly_issued_by(authority)
        same_key = certificate.public_key() == key
    except InvalidSignature:
        return "another authority issued it"
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        return f"it cannot be used: {error}"
    if not same_key:
        return "it has another key"
    if certificate.subject != subject(names) or sorted(map(repr, found)) != sorted(map(repr, wanted)):
        return "names or usages differ"
    if certificate.not_valid_before_utc > datetime.datetime.now().astimezone():
        return "it is not valid yet"
    if certificate.not_valid_after_utc < until:
        return f"it ends on {certificate.not_valid_after_utc:%Y-%m-%d}"
    return ""


def issue(
    ca_dir: Path,
    request: str,
    names: Iterable[str],
    usages: Iterable[str],
    present: str,
    valid_days: int,
    renew_days: int,
    public_key: str = "",
) -> tuple[str, str]:
    """Returns the certificate (PEM) and why it is new; the reason is empty if it is the one in place.

    Without a request none is issued: an empty certificate means that one is needed.
    """
    authority = x509.load_pem_x509_certificate((ca_dir / "current.crt").read_bytes())
    key = requested_key(request) if request else key_in_place(public_key)
    if key is None:
        return "", "the key in place cannot be used"
    parsed = [parse_name(name) for name in dict.fromkeys(names)]
    if not parsed:
        raise RefusedError("a certificate needs a name")
    wanted = extensions(key, parsed, usages, authority)
    now = datetime.datetime.now().astimezone()
    reason = why_not(present, key, wanted, parsed, authority, now + datetime.timedelta(days=renew_days))
    if not (reason and request):
        return "" if reason else present, reason
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject(parsed))
        .issuer_name(authority.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(now - BACKDATED, authority.not_valid_before_utc))
        .not_valid_after(min(now + datetime.timedelta(days=valid_days), authority.not_valid_after_utc))
    )
    for extension, critical in wanted:
        builder = builder.add_extension(extension, critical)
    signer = serialization.load_pem_private_key((ca_dir / "ca.key").read_bytes(), password=None)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode(), reason


def main() -> None:
    """Runs the module."""
    module = AnsibleModule(
        argument_spec={
            "ca_dir": {"type": "path", "required": True},
            "names": {"type": "list", "elements": "str", "required": True},
            "present": {"type": "str", "default": ""},
            "renew_days": {"type": "int", "default": 30},
            "public_key": {"type": "str", "default": ""},
            "request": {"type": "str", "default": ""},
            "usages": {"type": "list", "elements": "str", "choices": list(USAGES), "default": ["serverAuth"]},
            "valid_days": {"type": "int", "default": 397},
        },
        mutually_exclusive=[("public_key", "request")],
        required_one_of=[("public_key", "request")],
        supports_check_mode=True,
    )
    options = dict(module.params)
    try:
        certificate, reason = issue(Path(options.pop("ca_dir")), **options)
    except (RefusedError, OSError, ValueError) as error:
        module.fail_json(msg=f"no certificate was issued: {error}")
    module.exit_json(changed=bool(reason), certificate=certificate, reason=reason)


if __name__ == "__main__":
    main()
