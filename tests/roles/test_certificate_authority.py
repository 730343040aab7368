"""A certificate takes only the public key from a node's request; the authority certifies no other authority."""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from cluster import ROOT
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

NOW = datetime.datetime.now().astimezone()
KEY = ec.generate_private_key(ec.SECP256R1())
PEM = serialization.Encoding.PEM
SHA256 = hashes.SHA256()


def load_module() -> ModuleType:
    """Returns the Ansible module."""
    file = ROOT / "roles/certificate_authority/library/issue_certificate.py"
    spec = importlib.util.spec_from_file_location("issue_certificate", file)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


MODULE = load_module()


def certify(folder: Path, days: int = 3650) -> x509.Certificate:
    """Creates an authority as the role does, and returns its certificate."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), 1, NOW - datetime.timedelta(1), NOW + datetime.timedelta(days)
        )
        .add_extension(x509.BasicConstraints(True, 0), True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True)
    (folder / "current.crt").write_bytes(certificate.public_bytes(PEM))
    (folder / "ca.key").write_bytes(
        key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of an authority."""
    folder = tmp_path_factory.mktemp("ca")
    certify(folder)
    return folder


def request(key: Any = KEY, subject: str = "", *extensions: x509.ExtensionType, algorithm: Any = SHA256) -> str:
    """Returns a certificate request."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else [])
    builder = x509.CertificateSigningRequestBuilder(name)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, algorithm).public_bytes(PEM).decode()


def issue(ca: Path, csr: str = "", names: tuple[str, ...] = ("n1", "10.0.0.1"), **options: Any) -> tuple[Any, str, str]:
    """Returns a certificate, its text and the reason of its renewal."""
    given = {"usages": ["serverAuth"], "present": "", "valid_days": 397, "renew_days": 30, **options}
    text, reason = MODULE.issue(ca, csr or request(), names, **given)
    return x509.load_pem_x509_certificate(text.encode()), text, reason


AUTHORITY = [
    x509.BasicConstraints(ca=True, path_length=None),
    x509.KeyUsage(False, False, False, False, False, True, True, False, False),
    x509.SubjectAlternativeName([x509.DNSName("svc1"), x509.DNSName("*.example.org")]),
    x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]),
]


def text_of(certificate: x509.Certificate) -> str:
    """Returns the text of the certificate's subject and extensions."""
    return f"{certificate.subject.rfc4514_string()} {[e.value for e in certificate.extensions]}"


@pytest.mark.attack(
    "M1",
    "A compromised node requests a certificate with CA:TRUE, keyCertSign and another host's names",
    before="signed as requested: a certificate below it verified as the registry's",
    now="the request contributes its public key only; names, usages and constraints are set on the control host",
)
def test_a_request_contributes_only_its_key(ca: Path) -> None:
    certificate, _, _ = issue(ca, request(KEY, "svc1", *AUTHORITY))
    assert text_of(certificate) == text_of(issue(ca)[0])
    assert certificate.public_key() == KEY.public_key()
    assert certificate.subject.rfc4514_string() == "CN=n1"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName("n1"), x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]


@pytest.mark.attack(
    "M1",
    "A node signs a certificate for the registry with its own key and certificate",
    before="clients accepted the chain",
    now="clients reject it: the node's certificate is CA:FALSE, and the authority has pathlen:0",
)
def test_a_chain_below_a_node_does_not_verify(ca: Path, tmp_path: Path) -> None:
    node, text, _ = issue(ca, request(KEY, "svc1", *AUTHORITY))
    other = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "svc1")])
    forged = (
        x509.CertificateBuilder(node.subject, name, other.public_key(), 7, NOW, NOW + datetime.timedelta(9))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("svc1")]), False)
        .sign(KEY, hashes.SHA256())
    )
    (tmp_path / "node.crt").write_text(text)
    (tmp_path / "forged.crt").write_bytes(forged.public_bytes(PEM))
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", str(ca / "current.crt")]
    node_alone = subprocess.run([*verify, "-purpose", "sslserver", str(tmp_path / "node.crt")], capture_output=True)
    below = subprocess.run(
        [*verify, "-untrusted", str(tmp_path / "node.crt"), str(tmp_path / "forged.crt")],
        capture_output=True,
        text=True,
    )
    # A strict verifier also requires a key identifier in the authority's certificate, which the role adds; see below.
    assert b"error 20" not in node_alone.stderr
    assert below.returncode != 0
    assert "invalid CA certificate" in below.stderr


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        pytest.param(rsa.generate_private_key(65537, 1024), "2048 to 8192 bits, got 1024", id="RSA-1024"),
        pytest.param(ec.generate_private_key(ec.SECP192R1()), "P-256, P-384 or P-521, got secp192r1", id="P-192"),
        pytest.param(ec.generate_private_key(ec.SECP256K1()), "P-256, P-384 or P-521, got secp256k1", id="secp256k1"),
        pytest.param(dsa.generate_private_key(2048), "must be RSA, ECDSA or Ed25519", id="DSA"),
    ],
)
@pytest.mark.attack(
    "M1",
    "A node requests a certificate for a weak key",
    before="signed",
    now="refused with the reason",
)
def test_a_weak_key_is_refused(ca: Path, key: Any, reason: str) -> None:
    with pytest.raises(MODULE.RefusedError, match=reason):
        issue(ca, request(key))


def test_each_sound_kind_of_key_is_certified(ca: Path) -> None:
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        usage = issue(ca, request(key))[0].extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.key_encipherment is isinstance(key, rsa.RSAPrivateKey)
    assert issue(ca, request(ed25519.Ed25519PrivateKey.generate(), algorithm=None))[2] == "there is none"


def test_a_request_that_its_key_did_not_sign_is_refused(ca: Path) -> None:
    parsed = x509.load_pem_x509_csr(request().encode())
    other = x509.load_pem_x509_csr(request(ec.generate_private_key(ec.SECP256R1())).encode())
    body, mine, theirs = parsed.tbs_certrequest_bytes, parsed.signature, other.signature
    raw = parsed.public_bytes(serialization.Encoding.DER)
    if len(mine) != len(theirs):
        theirs = mine[:-1] + bytes([mine[-1] ^ 1])
    assert body in raw
    swapped = raw.replace(mine, theirs)
    pem = x509.load_der_x509_csr(swapped).public_bytes(PEM).decode()
    with pytest.raises(MODULE.RefusedError, match="not signed with its own key"):
        issue(ca, pem)


@pytest.mark.parametrize(
    "name", ["*.example.org", "*", "a b", "a,DNS:b", "", "a..b", "-a", "é.org", "a\nb", "x" * 64, "10.0.0.0/8"]
)
def test_what_is_no_name_of_a_host_is_refused(ca: Path, name: str) -> None:
    with pytest.raises(MODULE.RefusedError, match="neither a DNS name nor an IP address"):
        issue(ca, names=("n1", name))


@given(
    st.one_of(
        st.text(),
        st.binary().map(
            lambda raw: f"-----BEGIN CERTIFICATE REQUEST-----\n{raw.hex()}\n-----END CERTIFICATE REQUEST-----"
        ),
    )
)
def test_what_is_no_request_is_refused(text: str) -> None:
    with pytest.raises(MODULE.RefusedError):
        MODULE.requested_key(text)


def test_a_long_name_is_no_subject(ca: Path) -> None:
    name = ".".join(["a" * 40] * 3)
    certificate, _, _ = issue(ca, names=(name,))
    assert certificate.subject == x509.Name([])
    assert certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical


def test_a_certificate_stays_until_something_changes(ca: Path, tmp_path: Path) -> None:
    _, text, _ = issue(ca)
    assert issue(ca, present=text)[1:] == (text, "")
    assert issue(ca, request(KEY, "odd", *AUTHORITY), present=text)[1:] == (text, "")
    assert issue(ca, names=("n1",), present=text)[2] == "names or usages differ"
    assert issue(ca, names=("10.0.0.1", "n1"), present=text)[2] == "names or usages differ"
    assert issue(ca, usages=["serverAuth", "clientAuth"], present=text)[2] == "names or usages differ"
    assert issue(ca, request(ec.generate_private_key(ec.SECP256R1())), present=text)[2] == "it has another key"
    assert issue(ca, present="garbage")[2].startswith("it cannot be used")
    assert issue(ca, present=text, renew_days=398)[2].startswith("it ends on ")
    certify(tmp_path / "other")
    assert issue(tmp_path / "other", present=text)[2] == "another authority issued it"


def test_without_a_request_the_certificate_in_place_is_only_validated(ca: Path, tmp_path: Path) -> None:
    _, text, _ = issue(ca)

    def reason(
        folder: Path = ca, key: Any = KEY, names: tuple[str, ...] = ("n1", "10.0.0.1"), present: str = text
    ) -> str:
        public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        certificate, reason = MODULE.issue(folder, "", names, ["serverAuth"], present, 397, 30, public)
        assert certificate == ("" if reason else text)
        return str(reason)

    assert reason() == ""
    assert reason(names=("n2",)) == "names or usages differ"
    assert reason(key=ec.generate_private_key(ec.SECP256R1())) == "it has another key"
    assert reason(key=rsa.generate_private_key(65537, 2048)) == "the key in place cannot be used"
    assert reason(present="") == "there is none"
    certify(tmp_path / "other")
    assert reason(tmp_path / "other") == "another authority issued it"
    assert MODULE.issue(ca, "", ["n1"], ["serverAuth"], text, 397, 30, "none") == (
        "",
        "the key in place cannot be used",
    )


def test_a_certificate_ends_no_later_than_its_authority(tmp_path: Path) -> None:
    authority = certify(tmp_path / "ca", days=90)
    certificate, _, _ = issue(tmp_path / "ca")
    assert certificate.not_valid_after_utc == authority.not_valid_after_utc


PLAYBOOK: list[dict[str, Any]] = [
    {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "roles": ["certificate_authority"],
        "tasks": [
            {
                "name": "Issue",
                "ansible.builtin.include_role": {"name": "certificate_authority", "tasks_from": "local"},
                "vars": {
                    "certificate_authority_local_name": "mlflow",
                    "certificate_authority_names": "{{ names }}",
                    "certificate_authority_notify": ["Notified"],
                },
            }
        ],
        "handlers": [{"name": "Notified", "ansible.builtin.debug": {"msg": "restarted"}}],
    }
]


@pytest.fixture
def converge(tmp_path: Path) -> Callable[..., str]:
    """Returns a function that runs the role on this machine, as its own control host, and returns the output."""
    playbook = tmp_path / "playbook.yml"
    playbook.write_text(yaml.safe_dump(PLAYBOOK))

    def run(*arguments: str, names: str = "[kube1, 10.0.0.9]") -> str:
        variables = [f"--extra-vars=certificate_authority_dir={tmp_path}/ca", f"--extra-vars={{names: {names}}}"]
        done = subprocess.run(
            ["ansible-playbook", "--inventory=nobody,", str(playbook), *arguments, *variables],
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_ROLES_PATH": str(ROOT / "roles")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.full
def test_the_role_is_idempotent_and_follows_names_and_authority(converge: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    assert "failed=0" in converge("--check")
    assert not folder.exists()
    assert "restarted" in converge()
    unchanged = converge()
    assert "changed=0" in unchanged
    assert "Create the " not in unchanged.replace("Create the folder for keys", "")
    key, crt = folder / "issued/mlflow.key", folder / "issued/mlflow.crt"
    assert [oct(path.stat().st_mode & 0o777) for path in (folder, folder / "ca.key", key.parent, key)] == [
        "0o700",
        "0o600",
        "0o700",
        "0o600",
    ]
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value) == (True, x509.BasicConstraints(ca=True, path_length=0))

    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(folder / "ca.crt")]
    subprocess.run([*verify, "-verify_hostname", "kube1", str(crt)], check=True)
    subprocess.run([*verify, "-verify_ip", "10.0.0.9", str(crt)], check=True)

    for file in (key, crt):
        file.chmod(0o666)
        assert "restarted" in converge()
        assert file.stat().st_mode & 0o777 == (0o600 if file == key else 0o644)
    key.unlink()
    converge()
    subprocess.run([*verify, str(crt)], check=True)
    (folder / "ca.crt").write_text("")
    (folder / "ca.key").chmod(0o644)
    assert "changed=2" in converge()
    subprocess.run([*verify, str(crt)], check=True)

    before = crt.read_text()
    assert "changed=1" in converge("--check", names="[kube2]")
    assert crt.read_text() == before
    assert "restarted" in converge(names="[kube2]")
    assert crt.read_text() != before

    # The authority is replaced: clients trust both until the previous one is removed.
    (folder / "current.crt").rename(folder / "previous.crt")
    (folder / "ca.key").unlink()
    old = crt.read_text()
    converge(names="[kube2]")
    assert crt.read_text() != old
    (tmp_path / "old.crt").write_text(old)
    subprocess.run([*verify, str(tmp_path / "old.crt"), str(crt)], check=True)


@pytest.mark.full
def test_an_authority_of_before_is_issued_again_with_its_key(converge: Callable[..., str], tmp_path: Path) -> None:
    """Its certificates stay valid below the new one."""
    converge()
    folder = tmp_path / "ca"
    key: Any = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    present = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    unlimited = (
        x509.CertificateBuilder(
            present.subject,
            present.subject,
            key.public_key(),
            1,
            NOW - datetime.timedelta(1),
            NOW + datetime.timedelta(3650),
        )
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(unlimited.public_bytes(PEM))
    (folder / "current.crt").unlink()
    leaf = (folder / "issued/mlflow.crt").read_text()
    converge()
    renewed = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    assert renewed.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert (folder / "issued/mlflow.crt").read_text() == leaf
