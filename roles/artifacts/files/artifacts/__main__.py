"""artifacts: manage the platform's external artifacts.

examples:
  artifacts table                     lists source, reachable, cached, verified, outdated
  artifacts fetch                     downloads what the mirror lacks; resumes after an interruption
  artifacts fetch k3s --from URL      one entry, from another mirror
  artifacts export bundle.tar         writes a bundle for an air-gapped network
  artifacts import bundle.tar         imports the bundle there
  artifacts push registry.example.org:5000 --ca ca.crt --user ictx --password-file FILE
                                      copies the mirrored images to a registry

Exit status: 0, or 1 if an artifact is not available or does not match the lock.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import images, wheels
from .download import reachable
from .lock import Artifact, ArtifactError, read
from .mirror import Mirror


def row(mirror: Mirror, artifact: Artifact, source: str) -> dict[str, str]:
    """Returns the columns of one entry."""
    probe = artifact.source(source)
    if not source and artifact.kind == "image":
        probe = f"https://{artifact.host}/v2/"
    elif artifact.kind == "apt":
        probe += "/InRelease" if artifact.suite == "/" else f"/dists/{artifact.suite}/InRelease"
    elif artifact.kind == "wheels":
        probe += "/"
    cached = mirror.cached(artifact)
    problem = mirror.problem(artifact) if cached else ""
    recognised = (
        "sha256"
        if artifact.sha256
        else "key" if artifact.fingerprints else "lock file" if artifact.kind == "wheels" else ""
    )
    return {
        "name": artifact.name,
        "version": artifact.version.rpartition("/")[2],
        "from": source.rstrip("/") or artifact.host,
        "reachable": (reachable(probe) if source or artifact.url else wheels.index_problem()) or "yes",
        "cached": "yes" if cached else "no",
        "verified": problem or (recognised or "as first downloaded" if cached else "") or "-",
        "outdated": artifact.outdated or "-",
        "licence": artifact.licence,
    }


def print_table(rows: list[dict[str, str]]) -> None:
    """Prints a table with a header."""
    columns = [name for name in rows[0] if name != "licence"]
    widths = {name: max(len(name), *(len(each[name]) for each in rows)) for name in columns}
    for each in [{name: name for name in columns}, *rows]:
        print("  ".join(each[name].ljust(widths[name]) for name in columns).rstrip())


class Progress:
    """Prints the progress of each long download to standard error every five seconds."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._lock, self._next = threading.Lock(), time.monotonic() + 5

    def __call__(self, name: str, have: int, total: int) -> None:
        """Prints the progress of one download."""
        with self._lock:
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + 5
                share = f"{have / total:.0%} of {total / 1e6:.0f} MB" if total else f"{have / 1e6:.0f} MB"
                print(f"  {name}: {share}", file=sys.stderr, flush=True)


def main() -> int:
    """Runs a command; returns the exit status."""
    project = Path(__file__).resolve().parents[4]
    # Options may come before or after the command; defaults after it must not override values before it.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--lock", type=Path, help="the lock file (playbooks/vars/artifacts.yml)")
    common.add_argument("--mirror", type=Path, help="folder of the mirror (~/.cache/ictx/mirror)")
    common.add_argument("--from", dest="source", metavar="URL", help="mirror to use instead of the publishers")
    parser = argparse.ArgumentParser(
        prog="artifacts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[common]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("table", "list the entries"),
        ("fetch", "download what is missing"),
        ("export", "write a bundle"),
    ):
        command = commands.add_parser(name, help=text, parents=[common])
        if name == "export":
            command.add_argument("bundle", type=Path)
        command.add_argument("names", nargs="*", help="entries of the lock (default: all)")
        if name == "table":
            command.add_argument("--json", action="store_true", help="for programs")
    push = commands.add_parser("push", help="copy the mirrored images to a registry", parents=[common])
    push.add_argument("registry", metavar="HOST:PORT")
    push.add_argument("names", nargs="*", help="images of the lock (default: all mirrored ones)")
    push.add_argument("--ca", type=Path, help="CA certificate of the registry (default: this host's trusted CAs)")
    push.add_argument("--user", default="", help="user of the registry (default: anonymous)")
    push.add_argument("--password-file", type=Path, help="file with the password")
    commands.add_parser("import", help="import a bundle", parents=[common]).add_argument("bundle", type=Path)
    known = argparse.Namespace(
        lock=project / "playbooks/vars/artifacts.yml", mirror=Path.home() / ".cache/ictx/mirror", source=""
    )
    arguments = parser.parse_args(namespace=known)
    try:
        return run(arguments, project)
    except ArtifactError as error:
        print(f"artifacts: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace, project: Path) -> int:
    """Runs the command of the arguments; returns the exit status."""
    if arguments.source and not re.fullmatch(
        r"https?://([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?(/[^@]*)?", arguments.source
    ):
        # Not printed: it may contain a password. The table and every error contain the URL.
        raise ArtifactError("--from is not http(s)://HOST[:PORT][/PATH]; put a user and password in ~/.netrc")
    mirror = Mirror(arguments.mirror, project)
    if arguments.command == "import":
        print(f"imported: {', '.join(mirror.unpack(arguments.bundle))}")
        return 0
    artifacts = read(arguments.lock, arguments.names)
    if arguments.command == "table":
        with ThreadPoolExecutor(16) as pool:
            rows = list(pool.map(lambda each: row(mirror, each, arguments.source), artifacts))
        if arguments.json:
            print(json.dumps(rows, indent=1))
        else:
            print_table(rows)
        bad = [each["name"] for each in rows if each["cached"] == "no" and each["reachable"] != "yes"]
        if bad:
            print(f"\nneither cached nor reachable: {', '.join(bad)}", file=sys.stderr)
        return 1 if bad else 0
    if arguments.command == "export":
        files = mirror.export(artifacts, arguments.bundle)
        print(f"{arguments.bundle}: {len(artifacts)} entries, {files} files")
        return 0
    if arguments.command == "push":
        registry = images.Registry(arguments.registry, arguments.ca, arguments.user, arguments.password_file)
        wanted = [each for each in artifacts if each.kind == "image" and (arguments.names or mirror.cached(each))]
        for each in wanted:
            mirror.verify(each)
            fresh = images.push_image(each, arguments.mirror, registry)
            print(f"{'pushed' if fresh else 'already there'} {each.name} {each.version}", flush=True)
        print(f"{len(wanted)} images are in {arguments.registry}")
        return 0
    failed = mirror.fetch_all(artifacts, arguments.source, lambda line: print(line, flush=True), Progress())
    print(f"{len(artifacts) - failed} of {len(artifacts)} are in {arguments.mirror}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
