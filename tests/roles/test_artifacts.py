"""Downloads of the mirror: resumed, verified, bundled. An error is one line, and leaves no partial file."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from cluster import ROOT, trusted

sys.path.insert(0, str(ROOT / "roles/artifacts/files"))
from artifacts import __main__ as program
from artifacts import wheels

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()
YESTERDAY = date.today() - timedelta(days=1)


class Publisher(SimpleHTTPRequestHandler):
    """Serves a folder, with ranges; `fault` selects a failure."""

    fault: ClassVar[str] = ""
    ranges: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        """Sends the file, or a range of it if a download is resumed."""
        wanted = self.headers.get("Range", "")
        file = Path(self.translate_path(self.path))
        if not file.is_file() or wanted == "bytes=0-0":
            return super().do_GET()
        content = file.read_bytes()
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        type(self).ranges.append(wanted)
        self.send_response(206 if wanted else 200)
        if self.fault != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if self.fault == "truncated":
            rest = rest[: len(rest) // 2]
        if self.fault == "down":
            self.wfile.write(rest[: len(rest) // 2])
            self.server.shutdown()
            self.server.server_close()
            return None
        self.wfile.write(rest)
        return None

    def log_message(self, format: str, *arguments: object) -> None:
        """Suppresses the log of requests."""


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[tuple[Path, str, type[Publisher]]]:
    """Serves a folder; yields it, its address, and the handler, whose `fault` can be set."""
    folder = tmp_path / "published"
    folder.mkdir()
    handler = type("Faulty", (Publisher,), {"fault": "", "ranges": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        # Some tests disconnect on purpose.
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Returns a function that runs the program on a lock of some entries, with the mirror in tmp_path/mirror."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def run(entries: list[dict[str, Any]], *words: str, mirror: Path = tmp_path / "mirror") -> Any:
        lock = tmp_path / "lock.yml"
        lock.write_text(yaml.safe_dump({"artifacts_lock": entries}))
        monkeypatch.setattr(sys, "argv", ["artifacts", "--lock", str(lock), "--mirror", str(mirror), *words])
        capsys.readouterr()
        status = program.main()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, printed.out, printed.err)

    return run


def entry(url: str, **fields: Any) -> dict[str, Any]:
    """Returns an entry of a lock: a file, unless the fields differ."""
    known = {"name": "tool", "version": "1.0", "kind": "file", "url": f"{url}/tool", "path": "tools/1.0/tool"}
    rest = {
        "sha256": DIGEST,
        "licence": "MIT",
        "looked_at": date.today(),
        "end_of_life": None,
        "newest": "1.0",
        "why": "",
    }
    return {**known, **rest, **fields}


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Asserts that a run failed with one line on stderr, which contains the words."""
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")] + done.stderr.splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]


def left(mirror: Path) -> list[str]:
    """Returns the files of a mirror without its manifest."""
    return sorted(
        str(file.relative_to(mirror)) for file in mirror.rglob("*") if file.is_file() and file.name != "manifest.json"
    )


def test_a_file_is_downloaded_once_and_listed(publisher: Any, artifacts: Run, tmp_path: Path) -> None:
    folder, url, handler = publisher
    (folder / "tool").write_bytes(CONTENT)
    old = entry(url, newest="2.0", end_of_life=YESTERDAY)
    (before,) = json.loads(artifacts([old], "table", "--json").stdout)
    assert (before["reachable"], before["cached"], before["verified"]) == ("yes", "no", "-")
    assert before["outdated"] == f"2.0 is known, end of life {YESTERDAY}"
    assert "downloaded tool 1.0" in artifacts([old], "fetch").stdout
    assert (tmp_path / "mirror/tools/1.0/tool").read_bytes() == CONTENT
    assert "there tool 1.0" in artifacts([old], "fetch").stdout
    assert len(handler.ranges) == 1
    (after,) = json.loads(artifacts([old], "table", "--json").stdout)
    assert (after["cached"], after["verified"]) == ("yes", "sha256")


def test_what_was_cut_off_goes_on_where_it_was(publisher: Any, artifacts: Run, tmp_path: Path) -> None:
    folder, url, handler = publisher
    (folder / "tool").write_bytes(CONTENT)
    part = tmp_path / "mirror/tools/1.0/tool.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1000])
    assert artifacts([entry(url)], "fetch").returncode == 0
    assert handler.ranges == ["bytes=1000-"]
    assert left(tmp_path / "mirror") == ["tools/1.0/tool"]


def test_a_truncated_download_is_reported_and_not_in_its_place(publisher: Any, artifacts: Run, tmp_path: Path) -> None:
    folder, url, handler = publisher
    (folder / "tool").write_bytes(CONTENT)
    handler.fault = "truncated"
    one_line(artifacts([entry(url)], "fetch"), "tool: ", "truncated", "repeat the command to resume")
    assert left(tmp_path / "mirror") == ["tools/1.0/tool.part"]
    handler.fault = ""
    assert artifacts([entry(url)], "fetch").returncode == 0


def test_a_wrong_checksum_is_reported_and_nothing_is_kept(publisher: Any, artifacts: Run, tmp_path: Path) -> None:
    folder, url, _ = publisher
    (folder / "tool").write_bytes(CONTENT + b"!")
    one_line(artifacts([entry(url)], "fetch"), f"expected {DIGEST}", "its SHA-256 is", "not kept")
    assert left(tmp_path / "mirror") == []


def test_a_mirror_that_goes_down_in_mid_run_is_reported(publisher: Any, artifacts: Run, tmp_path: Path) -> None:
    folder, url, handler = publisher
    (folder / "tool").write_bytes(CONTENT)
    handler.fault = "down"
    one_line(artifacts([entry(url)], "fetch"), "no connection", "bytes are kept: repeat the command")
    assert left(tmp_path / "mirror") == ["tools/1.0/tool.part"]


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root, to mount a small file system")
@pytest.mark.parametrize("fault", ["", "no length"])
def test_a_full_disk_is_reported_and_nothing_is_left(
    publisher: Any, artifacts: Run, tmp_path: Path, fault: str
) -> None:
    folder, url, handler = publisher
    (folder / "tool").write_bytes(CONTENT)
    handler.fault = fault
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", disk], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("mounts are not permitted")
    try:
        fetched = artifacts([entry(url)], "fetch", mirror=disk)
        one_line(fetched, f"the disk of {disk}/tools/1.0 is full", "free some space")
        assert left(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_without_a_known_checksum_stays_what_it_was_first(
    publisher: Any, artifacts: Run, tmp_path: Path
) -> None:
    folder, url, _ = publisher
    (folder / "tool").write_bytes(CONTENT)
    unknown = entry(url, sha256=None, unverified="its publisher has none")
    assert artifacts([unknown], "fetch").returncode == 0
    (row,) = json.loads(artifacts([unknown], "table", "--json").stdout)
    assert row["verified"] == "as first downloaded"
    (tmp_path / "mirror/tools/1.0/tool").unlink()
    (folder / "tool").write_bytes(b"another")
    one_line(artifacts([unknown], "fetch"), f"expected {DIGEST}")


def test_what_somebody_changed_in_the_mirror_is_not_exported(publisher: Any, artifacts: Run, tmp_path: Path) -> None:
    folder, url, _ = publisher
    (folder / "tool").write_bytes(CONTENT)
    bundle = tmp_path / "bundle.tar"
    one_line(artifacts([entry(url)], "export", str(bundle)), "tool 1.0 is not in")
    assert artifacts([entry(url)], "fetch").returncode == 0
    (tmp_path / "mirror/tools/1.0/tool").write_bytes(b"another")
    one_line(artifacts([entry(url)], "export", str(bundle)), "tools/1.0/tool has the SHA-256")
    assert not bundle.exists()


def test_a_bundle_carries_what_the_mirror_has(publisher: Any, artifacts: Run, tmp_path: Path) -> None:
    folder, url, _ = publisher
    (folder / "tool").write_bytes(CONTENT)
    bundle, there = tmp_path / "bundle.tar", tmp_path / "there"
    assert artifacts([entry(url)], "fetch").returncode == 0
    assert "1 entries, 1 files" in artifacts([entry(url)], "export", str(bundle)).stdout
    assert artifacts([entry(url)], "import", str(bundle), mirror=there).stdout == "imported: tool\n"
    assert (there / "tools/1.0/tool").read_bytes() == CONTENT
    # In that mirror the entry is cached, so the publisher is not contacted.
    (row,) = json.loads(artifacts([entry("http://127.0.0.1:1")], "table", "--json", mirror=there).stdout)
    assert (row["cached"], row["verified"], row["reachable"]) == ("yes", "sha256", "no connection")


def test_a_bundle_that_is_not_whole_leaves_nothing(artifacts: Run, tmp_path: Path) -> None:
    def bundle(files: dict[str, bytes], listed: dict[str, str]) -> str:
        with tarfile.open(tmp_path / "bundle.tar", "w") as archive:
            manifest = json.dumps({"tool": {"version": "1.0", "files": listed}}).encode()
            for name, content in {"manifest.json": manifest, **files}.items():
                (tmp_path / "file").write_bytes(content)
                archive.add(tmp_path / "file", name)
        return str(tmp_path / "bundle.tar")

    there = tmp_path / "there"
    digest = hashlib.sha256(b"x").hexdigest()
    for files, listed, words in [
        ({"a": b"y"}, {"a": digest}, "a differs from its manifest"),
        ({}, {"a": digest}, "lacks a"),
        ({"a": b"x", "b": b"x"}, {"a": digest}, "contains b, which its manifest does not list"),
        ({"../a": b"x"}, {"../a": digest}, "contains ../a, which"),
    ]:
        one_line(artifacts([], "import", bundle(files, listed), mirror=there), words)
        assert not there.exists() or left(there) == []
    Path(tmp_path / "short.tar").write_bytes(Path(bundle({"a": b"x" * 9000}, {"a": digest})).read_bytes()[:3000])
    one_line(artifacts([], "import", str(tmp_path / "short.tar"), mirror=there), "short.tar")


def test_a_file_elsewhere_is_none_of_a_bundles(artifacts: Run, tmp_path: Path) -> None:
    elsewhere, there = tmp_path / "elsewhere", tmp_path / "there"
    elsewhere.write_bytes(b"x")
    listed = {"tool": {"version": "1.0", "files": {str(elsewhere): hashlib.sha256(b"x").hexdigest()}}}
    with tarfile.open(tmp_path / "bundle.tar", "w") as archive:
        for name, content in {"manifest.json": json.dumps(listed).encode(), str(elsewhere): b"x"}.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    one_line(artifacts([], "import", str(tmp_path / "bundle.tar"), mirror=there), f"contains {elsewhere}, which")
    assert left(there) == []
    assert not (there / "manifest.json").exists()


WRONG = {
    "{": "Expecting property name",
    "null": "expected an object",
    '["tool"]': "expected an object",
    '{"tool": []}': "tool: expected a text in version",
    '{"tool": {"version": 1.0, "files": {}}}': "tool: expected a text in version",
    '{"tool": {"version": "1.0"}}': "tool: expected the SHA-256 of each path in files",
    '{"tool": {"version": "1.0", "files": ["a"]}}': "tool: expected the SHA-256 of each path in files",
    '{"tool": {"version": "1.0", "files": {"a": 1}}}': "tool: expected the SHA-256 of each path in files",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_bundle_with_another_manifest_is_one_line(artifacts: Run, tmp_path: Path, content: str) -> None:
    with tarfile.open(tmp_path / "bundle.tar", "w") as archive:
        about = tarfile.TarInfo("manifest.json")
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content.encode()))
    one_line(artifacts([], "import", str(tmp_path / "bundle.tar")), WRONG[content], "nothing was imported")


@pytest.mark.parametrize("content", WRONG)
def test_a_manifest_that_cannot_be_read_is_named(artifacts: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/manifest.json").write_text(content)
    words = "mirror/manifest.json cannot be read", WRONG[content], "delete it"
    one_line(artifacts([entry("http://127.0.0.1:1")], "table"), *words)


def test_options_stand_before_a_command_or_behind_it(publisher: Any, artifacts: Run, tmp_path: Path) -> None:
    folder, url, _ = publisher
    (folder / "tool").write_bytes(CONTENT)
    assert artifacts([entry(url)], "fetch", "--mirror", str(tmp_path / "behind")).returncode == 0
    assert artifacts([entry(url)], "fetch").returncode == 0
    assert left(tmp_path / "behind") == left(tmp_path / "mirror") == ["tools/1.0/tool"]


@pytest.mark.parametrize(("architecture", "machine"), wheels.MACHINES.items())
def test_wheels_are_for_the_platforms_of_images(architecture: str, machine: str) -> None:
    role = yaml.safe_load((ROOT / "roles/image_bake/vars/main.yml").read_text())
    templar = Templar(DataLoader(), variables={"image_bake_architecture": machine})
    assert wheels.platforms(architecture) == templar.template(trusted(role["_image_bake_platforms"]))
    # nvidia-nccl-cu13 has the tag 2_18. pip accepts only the tags that it is given, not older ones.
    assert {f"manylinux_2_{minor}_{machine}" for minor in (5, 17, 18, 28, 35)} <= set(wheels.platforms(architecture))


def test_what_a_lock_must_have_is_named(artifacts: Run) -> None:
    for fields, words in [
        ({"kind": "zip"}, "of the kind zip: use one of"),
        ({"sha256": None}, "neither sha256 nor the reason"),
        ({"path": "../x"}, "use one inside the mirror"),
        ({"kind": "apt"}, "has no fingerprints"),
        ({"kind": "wheels"}, "has no python"),
        ({"colour": "red"}, "tool has the unknown field colour"),
        ({"version": 1.10}, "tool has the version 1.1, which is not text"),
        ({"licence": ""}, "empty name, version or licence"),
        ({"url": None}, "tool has the url None"),
        ({"path": None}, "tool has the path None"),
        ({"end_of_life": "2026-01-01"}, "tool has the end_of_life '2026-01-01', which is not a date"),
        ({"fingerprints": "AB"}, "tool has the fingerprints 'AB', which is not a list"),
        ({"sha256": DIGEST[:-1]}, "use 64 hexadecimal digits"),
        ({"sha256": DIGEST.upper()}, "use 64 hexadecimal digits"),
    ]:
        one_line(artifacts([{**entry("http://127.0.0.1:1"), **fields}], "table"), words)
    first, second = entry("http://127.0.0.1:1"), entry("http://127.0.0.1:1", name="other")
    one_line(artifacts([first, {**first, "path": "x"}], "fetch"), "two entries have the name tool")
    one_line(artifacts([first, second], "fetch"), "two entries have the path tools/1.0/tool")
    one_line(artifacts([{key: first[key] for key in first if key != "licence"}], "fetch"), "tool has no licence")
    one_line(artifacts(["tool"], "fetch"), "not a list of entries")
    one_line(artifacts([entry("http://127.0.0.1:1")], "fetch", "tolo"), "does not have tolo")


@pytest.mark.parametrize(
    "source", ["http://ops:hidden@127.0.0.1:1/m/", "mirror.example.org", "ftp://a", "https:///a", "http://[fd00::1/m"]
)
@pytest.mark.parametrize("command", ["table", "fetch"])
def test_an_address_that_is_none_or_has_a_password_is_refused(artifacts: Run, source: str, command: str) -> None:
    done = artifacts([entry("http://127.0.0.1:1")], command, "--from", source)
    one_line(done, "--from is not http(s)://HOST[:PORT][/PATH]")
    assert "hidden" not in done.stdout + done.stderr


needs_apt = pytest.mark.skipif(not (shutil.which("gpg") and shutil.which("dpkg-deb")), reason="needs gpg and dpkg-deb")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[dict[str, str], str]]]:
    """Returns a function that makes a key and returns gpg's environment for it, and its fingerprint."""
    homes = []

    def key(name: str) -> tuple[dict[str, str], str]:
        home = tmp_path_factory.mktemp(name)
        home.chmod(0o700)
        homes.append(environment := {**os.environ, "GNUPGHOME": str(home)})
        make = ["gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key", f"{name} <{name}@example.org>"]
        subprocess.run(make, env=environment, check=True)
        listed = subprocess.run(
            ["gpg", "--with-colons", "-k"], env=environment, check=True, capture_output=True, text=True
        )
        return environment, next(line.split(":")[9] for line in listed.stdout.splitlines() if line.startswith("fpr"))

    yield functools.cache(key)
    for environment in homes:
        subprocess.run(["gpgconf", "--kill", "all"], env=environment, check=False)


def publish(folder: Path, environment: dict[str, str]) -> None:
    """Writes a flat repository with `app` 1.0 and 2.0, which needs `lib`; and `other`, which nothing needs."""
    text = ""
    for name, version, depends in [
        ("app", "1.0", "lib (>= 1)"),
        ("app", "2.0", "lib"),
        ("lib", "1.2", ""),
        ("other", "1", ""),
    ]:
        work = folder.parent / f"{name}-{version}"
        (work / "DEBIAN").mkdir(parents=True)
        control = (
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: x\n"
        )
        control += f"Depends: {depends}\n" if depends else ""
        (work / "DEBIAN/control").write_text(control)
        file = folder / f"{name}_{version}_all.deb"
        subprocess.run(["dpkg-deb", "--build", "--root-owner-group", work, file], check=True, capture_output=True)
        content = file.read_bytes()
        text += (
            f"{control}Filename: ./{file.name}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n\n"
        )
    packed = gzip.compress(text.encode())
    (folder / "Packages.gz").write_bytes(packed)
    digest = hashlib.sha256(packed).hexdigest()
    release = f"Origin: test\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {digest} {len(packed)} Packages.gz\n"
    (folder / "Release").write_text(release)
    sign = ["gpg", "--batch", "--yes", "--clearsign", "--output", folder / "InRelease", folder / "Release"]
    subprocess.run(sign, env=environment, check=True)
    exported = subprocess.run(["gpg", "--armor", "--export"], env=environment, check=True, capture_output=True)
    (folder / "key.asc").write_bytes(exported.stdout)


def repository(url: str, fingerprint: str, **fields: Any) -> dict[str, Any]:
    """Returns an entry of an apt repository."""
    own = {"kind": "apt", "path": "apt/test", "suite": "/", "key": "key.asc", "packages": {"app": "1.*"}}
    return entry("", **own, fingerprints=[fingerprint], sha256=None) | {"url": url} | fields


@needs_apt
def test_of_a_repository_comes_what_is_wanted_and_what_that_needs(
    publisher: Any, artifacts: Run, signer: Any, tmp_path: Path
) -> None:
    folder, url, _ = publisher
    environment, fingerprint = signer("vendor")
    publish(folder, environment)
    done = artifacts([repository(url, fingerprint)], "fetch")
    assert done.returncode == 0, done.stdout
    files = ["InRelease", "Packages.gz", "app_1.0_all.deb", "key.asc", "lib_1.2_all.deb"]
    assert left(tmp_path / "mirror") == [f"apt/test/{name}" for name in files]


@needs_apt
@pytest.mark.attack(
    "M9",
    "An attacker who controls a package repository sends the mirror another key, index or package",
    before="there was no mirror",
    now="rejected: the key differs from the lock, the index is not signed with it, or the package is not in the index",
)
def test_what_a_repository_forges_is_refused(publisher: Any, artifacts: Run, signer: Any, tmp_path: Path) -> None:
    folder, url, _ = publisher
    (environment, fingerprint), (forger, other) = signer("vendor"), signer("mallory")
    publish(folder, environment)
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    one_line(artifacts([repository(url, other)], "fetch"), f"contains the key {fingerprint}, expected {other}")
    assert left(tmp_path / "mirror") == []
    sign = ["gpg", "--batch", "--yes", "--clearsign", "--output", folder / "InRelease", folder / "Release"]
    subprocess.run(sign, env=forger, check=True)
    one_line(artifacts([repository(url, fingerprint)], "fetch"), "its signature does not match the key of the lock")
    assert left(tmp_path / "mirror") == []
    (folder / "InRelease").write_bytes(good["InRelease"])
    (folder / "lib_1.2_all.deb").write_bytes(good["lib_1.2_all.deb"] + b"!")
    one_line(artifacts([repository(url, fingerprint)], "fetch"), "lib_1.2_all.deb: its SHA-256 is")
    assert "apt/test/InRelease" not in left(tmp_path / "mirror")
