"""Central logs: the receiver has the journal of every node, and accepts logs only from nodes of the platform."""

from __future__ import annotations

import datetime
import os
import ssl
import subprocess
import time
import uuid
from collections.abc import Iterator
from http.client import HTTPSConnection
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from test_monitoring import ADDRESSES, STATE, TLS, admin, ask, node

REMOTE = "/var/log/journal/remote"
PORT = 19532


def lines(tag: str) -> list[str]:
    """Returns m2's lines with a tag on the receiver."""
    found = node("m1").check_output(
        f"journalctl --directory={REMOTE} --quiet --no-pager --output=cat _HOSTNAME=m2 --identifier={tag}"
    )
    return str(found).splitlines()


def wait_for_lines(tag: str, count: int, seconds: float = 60) -> list[str]:
    """Waits for `count` lines with a tag and returns them; fails on timeout."""
    end = time.monotonic() + seconds
    while len(found := lines(tag)) < count:
        assert time.monotonic() < end, f"{len(found)} of {count} lines arrived"
        time.sleep(1)
    return found


@pytest.fixture
def tag() -> str:
    """Returns a unique tag."""
    return f"test-{uuid.uuid4().hex[:8]}"


def test_a_line_of_a_node_is_found_on_the_receiver(tag: str) -> None:
    node("m2").check_output(f"logger --tag {tag} hello")
    assert wait_for_lines(tag, 1) == ["hello"]
    # Beside the receiver's own journal.
    hosts = node("m1").check_output("journalctl --merge --quiet --field=_HOSTNAME").split()
    assert set(hosts) == {"m1", "m2"}


@pytest.mark.parametrize("unit", ["ictx-journal.target", "ictx-journal-remote@m2.service"])
def test_lines_written_while_the_receiver_was_away_arrive_once(tag: str, unit: str) -> None:
    node("m1").check_output(f"systemctl stop {unit}" + (" ictx-journal-remote@m2.socket" if "remote" in unit else ""))
    try:
        node("m2").check_output(f"seq 500 | logger --tag {tag}")
        time.sleep(12)
        assert lines(tag) == []
    finally:
        node("m1").check_output("systemctl start ictx-journal.target")
    found = wait_for_lines(tag, 500)
    time.sleep(3)
    assert lines(tag) == found == [str(number) for number in range(1, 501)]


def test_a_sender_that_starts_anew_goes_on_where_it_was(tag: str) -> None:
    node("m2").check_output(f"logger --tag {tag} before")
    wait_for_lines(tag, 1)
    node("m2").check_output(f"systemctl stop systemd-journal-upload && logger --tag {tag} meanwhile")
    node("m2").check_output("systemctl start systemd-journal-upload")
    assert wait_for_lines(tag, 2) == ["before", "meanwhile"]


def certificate(folder: Path, name: str, of_platform: bool) -> Path:
    """Returns a file with a key and its certificate for a name, signed by the platform's authority or self-signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer = key
    if of_platform:
        issuer = x509.load_pem_x509_certificate((STATE / "ca/ca.crt").read_bytes()).subject
        signer = serialization.load_pem_private_key((STATE / "ca/ca.key").read_bytes(), None)
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(signer, hashes.SHA256())
    )
    file = folder / f"{name}.pem"
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    file.write_bytes(pem + made.public_bytes(serialization.Encoding.PEM))
    return file


def post(context: ssl.SSLContext, path: str = "/upload") -> int:
    """Sends one line; returns the HTTP status."""
    connection = HTTPSConnection(ADDRESSES["m1"], PORT, context=context, timeout=10)
    try:
        when = f"__REALTIME_TIMESTAMP={int(time.time() * 1e6)}\n__MONOTONIC_TIMESTAMP=1\n"
        line = f"{when}_BOOT_ID={uuid.uuid4().hex}\nMESSAGE=x\n\n"
        connection.request("POST", path, line.encode(), {"Content-Type": "application/vnd.fdo.journal"})
        return connection.getresponse().status
    finally:
        connection.close()


def with_certificate(file: Path) -> ssl.SSLContext:
    """Returns the TLS settings of a client with a certificate."""
    context = ssl.create_default_context(cafile=str(STATE / "ca/ca.crt"))
    context.load_cert_chain(file)
    return context


def test_nobody_sends_without_a_certificate_of_the_platform(tmp_path: Path) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        post(TLS)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        post(with_certificate(certificate(tmp_path, "m2", of_platform=False)))


def test_a_host_that_is_not_in_the_inventory_may_not_send(tmp_path: Path) -> None:
    assert post(with_certificate(certificate(tmp_path, "m9", of_platform=True))) == 403
    known = with_certificate(certificate(tmp_path, "m2", of_platform=True))
    assert post(known, "/browse") == 403
    assert post(known) == 202


def test_only_those_who_may_read_journals_read_them() -> None:
    folder = node("m1").file(REMOTE)
    assert (folder.user, folder.group, folder.mode) == ("systemd-journal-remote", "systemd-journal", 0o750)
    file = node("m1").file(f"{REMOTE}/remote-m2.journal")
    assert (file.group, file.mode) == ("systemd-journal", 0o640)
    assert node("m1").run(f"runuser -u nobody -- journalctl --directory={REMOTE} --lines=1").rc != 0
    # No other user on the receiver's host can bypass the gate and write as a node.
    socket = node("m1").file("/run/ictx-journal/m2.sock")
    assert (socket.user, socket.group, socket.mode) == ("root", "haproxy", 0o660)


@pytest.fixture
def served() -> Iterator[str]:
    """Returns the certificate that the gate presents; restores the files afterwards."""
    keep = "cp --preserve /etc/ictx/tls/host.crt /run/host.crt && cp --preserve /etc/ictx/tls/host.key /run/host.key"
    node("m1").check_output(keep)
    yield shown()
    node("m1").check_output("mv /run/host.key /etc/ictx/tls/host.key && mv /run/host.crt /etc/ictx/tls/host.crt")


def shown() -> str:
    """Returns the certificate that the gate presents."""
    return ssl.get_server_certificate((ADDRESSES["m1"], PORT), timeout=10)


def test_a_new_certificate_is_shown_at_once(served: str, tmp_path: Path) -> None:
    new = certificate(tmp_path, "m1", of_platform=True).read_text()
    key, _, crt = new.partition("-----BEGIN CERTIFICATE")
    for name, text in (("host.key", key), ("host.crt", f"-----BEGIN CERTIFICATE{crt}")):
        draft = f"/etc/ictx/tls/.{name}"
        node("m1").check_output(
            f"install --mode=0640 --group=ictx-tls /dev/null {draft} && printf %s '{text}' >{draft}"
        )
        node("m1").check_output(f"mv {draft} /etc/ictx/tls/{name}")
    end = time.monotonic() + 20
    while shown() == served:
        assert time.monotonic() < end, "the gate still presents the old certificate"
        time.sleep(1)


def test_prometheus_knows_what_was_written_and_what_has_come() -> None:
    def value(metric: str) -> float:
        result = ask("m1", 9090, f"/api/v1/query?query={metric}%7Bnode=%22m2%22%7D", admin())[1]["data"]["result"]
        return float(result[0]["value"][1]) if result else 0.0

    node("m2").check_output("logger again")
    time.sleep(2)
    for name in ("m2", "m1"):
        node(name).check_output("systemctl start ictx-journal-metrics")
    end = time.monotonic() + 60
    while not 0 < value("ictx_logs_written_timestamp_seconds") <= value("ictx_logs_received_timestamp_seconds"):
        assert time.monotonic() < end, "Prometheus does not show that all logs arrived"
        time.sleep(2)
    assert value("ictx_logs_received_bytes") > 1e6


def test_gathering_metrics_adds_no_lines() -> None:
    newest = "journalctl --quiet --no-pager --lines=1 --output=export _PID=1"
    before = node("m2").check_output(newest)
    node("m2").check_output("systemctl start ictx-journal-metrics")
    assert node("m2").check_output(newest) == before


def test_old_and_superfluous_files_are_dropped() -> None:
    user = "--owner=systemd-journal-remote --group=systemd-journal --mode=0640"
    old = f"{REMOTE}/remote-gone.journal"
    node("m1").check_output(f"install {user} /dev/null {old} && touch --date='-91 days' {old}")
    node("m1").check_output("systemctl start ictx-journal-vacuum")
    assert not node("m1").file(old).exists
    assert node("m1").file(f"{REMOTE}/remote-m2.journal").exists


def run(*extra: str) -> None:
    """Runs the playbook of central logs; fails if it fails."""
    done = subprocess.run(
        ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY"], "playbooks/logs.yml", *extra],
        cwd=os.environ["MOLECULE_PROJECT_DIRECTORY"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_without_central_logs_nothing_of_them_runs_and_what_came_stays(tag: str) -> None:
    node("m2").check_output(f"logger --tag {tag} kept")
    wait_for_lines(tag, 1)
    run("-e", "ictx_logs=none")
    try:
        for name in ("m1", "m2"):
            units = node(name).check_output(
                "systemctl list-units --plain --no-legend 'ictx-journal*' 'systemd-journal-up*'"
            )
            assert units == ""
            assert not node(name).file("/var/lib/prometheus/node-exporter/journal.prom").exists
        assert not node("m2").service("systemd-journal-upload").is_enabled
        assert lines(tag) == ["kept"]
        node("m2").check_output(f"logger --tag {tag} later")
    finally:
        run()
    assert wait_for_lines(tag, 2) == ["kept", "later"]
