"""Backups: `backup` makes one (databases, artifacts, list of checksums) and removes old ones, `restore` puts one back.

Environment: the databases' URIs, BACKUP_DIR, ARTIFACTS_DIR (empty: none); RETENTION to back up; SNAPSHOT, SERVER
(host:port) and SERVER_GRACE (seconds that it may take to end) to restore.
"""

import hashlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

MANIFEST = "manifest.json"


def say(text):
    """Prints at once: the log is read while the program runs."""
    print(text, flush=True)


def libpq(uri):
    """Returns an environment for PostgreSQL's programs: a password among arguments is seen by everyone on the node."""
    parts = urlsplit(uri)
    values = {
        "PGHOST": parts.hostname,
        "PGPORT": parts.port,
        "PGUSER": unquote(parts.username or ""),
        "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": parts.path.lstrip("/"),
    }
    values |= {"PG" + key.upper(): value for key, value in parse_qsl(parts.query) if key.startswith("ssl")}
    return os.environ | {key: str(value) for key, value in values.items() if value}


def dump(uri, folder, name):
    """Writes a consistent copy of a database that is in use."""
    if uri.startswith("sqlite:///"):
        file, copy = uri.removeprefix("sqlite:///"), folder / f"{name}.db"
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    else:
        command = ["pg_dump", "--format=custom", "--no-owner", f"--file={folder / f'{name}.pgdump'}"]
        subprocess.run(command, env=libpq(uri), check=True)


def same(one, other):
    """Tells whether two files have the same size and time: MLflow never changes an artifact in place."""
    one, other = one.stat(), other.stat()
    return one.st_size == other.st_size and int(one.st_mtime) == int(other.st_mtime)


def copy_tree(source, target, previous):
    """Copies files; what the previous backup has already is linked instead and takes no space."""
    for path in sorted(source.rglob("*")):
        where = path.relative_to(source)
        copy, old = target / where, previous / where if previous else None
        try:
            if path.is_dir():
                copy.mkdir(parents=True, exist_ok=True)
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            if old and old.is_file() and same(path, old):
                os.link(old, copy)
            else:
                shutil.copy2(path, copy)
        except FileNotFoundError:
            say(f"gone meanwhile: {path}")


def checksum(path):
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def backup():
    """Makes the backup under a name that says it is unfinished, and renames it last."""
    root = Path(os.environ["BACKUP_DIR"])
    done = sorted(path.parent for path in root.glob(f"*Z/{MANIFEST}"))
    name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    folder = root / f".{name}.unfinished"
    for rest in root.glob(".*.unfinished"):
        shutil.rmtree(rest)
    folder.mkdir()
    # Databases come first: an artifact that is newer than its record does no harm, a record without its artifact does.
    backend, auth = os.environ["MLFLOW_BACKEND_STORE_URI"], os.environ.get("AUTH_DATABASE_URI", "")
    dump(backend, folder, "mlflow")
    # The server makes its users' database at its first start.
    missing = auth.startswith("sqlite:///") and not Path(auth.removeprefix("sqlite:///")).exists()
    if auth and auth != backend and not missing:
        dump(auth, folder, "basic_auth")
    sums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    artifacts = os.environ.get("ARTIFACTS_DIR", "")
    if artifacts and Path(artifacts).is_dir():
        copy_tree(Path(artifacts), folder / "artifacts", done[-1] / "artifacts" if done else None)
    (folder / MANIFEST).write_text(json.dumps({"databases": sums, "artifacts": bool(artifacts)}, indent=1))
    folder.rename(root / name)
    say(f"backup {name}: {', '.join(sums)}{' and artifacts' if artifacts else ''}")
    for old in [*done, root / name][: -int(os.environ["RETENTION"])]:
        shutil.rmtree(old)
        say(f"removed {old.name}")


def wait_for_the_server_to_end(address, grace, seconds=300):
    """A server that runs would write into the database while it is replaced."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), timeout=3).close()
        except OSError:
            # The Service forgets a pod before its processes end.
            time.sleep(grace)
            return
        say(f"waiting for the server at {address} to end")
        time.sleep(2)
    sys.exit(f"the server at {address} still runs: scale it to zero, then try again")


def choose(root, name):
    """Returns the folder of a complete backup."""
    complete = sorted(path.parent for path in root.glob(f"*Z/{MANIFEST}"))
    wanted = complete[-1:] if name == "latest" else [path for path in complete if path.name == name]
    if not wanted:
        sys.exit(f"no complete backup {name!r}; there are: {', '.join(path.name for path in complete) or 'none'}")
    return wanted[0]


def verify(folder):
    """Returns the files of the databases; ends the program when one is not what was written."""
    sums = json.loads((folder / MANIFEST).read_text())["databases"]
    for name, wanted in sums.items():
        if checksum(folder / name) != wanted:
            sys.exit(f"{folder / name} is damaged: its checksum is not the one in {MANIFEST}")
    return {Path(name).stem: folder / name for name in sums}


def load(uri, file):
    """Replaces a database; a SQLite file is kept beside it as `*.before-restore`."""
    if not uri.startswith("sqlite:///"):
        command = ["pg_restore", "--clean", "--if-exists", "--no-owner", "--single-transaction"]
        environment = libpq(uri)
        subprocess.run([*command, f"--dbname={environment['PGDATABASE']}", str(file)], env=environment, check=True)
        return
    path = Path(uri.removeprefix("sqlite:///"))
    fresh = path.with_name(path.name + ".restoring")
    fresh.unlink(missing_ok=True)
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(fresh)) as target:
        source.backup(target)
        if target.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            sys.exit(f"{file} is damaged: SQLite finds it inconsistent")
    if path.exists():
        # One file: what its journal holds is taken in first.
        with closing(sqlite3.connect(path)) as old:
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        path.replace(path.with_name(path.name + ".before-restore"))
    for journal in ("-wal", "-shm", "-journal"):
        path.with_name(path.name + journal).unlink(missing_ok=True)
    fresh.replace(path)


def copy_missing(source, target):
    """Copies artifacts that are not there, or not whole; what came after the backup stays."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        elif not copy.is_file() or copy.stat().st_size != path.stat().st_size:
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_name(copy.name + ".restoring")
            shutil.copy2(path, partial)
            partial.replace(copy)


def restore():
    """Restores; a second run does the same again."""
    wait_for_the_server_to_end(os.environ["SERVER"], float(os.environ["SERVER_GRACE"]))
    folder = choose(Path(os.environ["BACKUP_DIR"]), os.environ["SNAPSHOT"])
    databases = verify(folder)
    uris = {"mlflow": os.environ["MLFLOW_BACKEND_STORE_URI"], "basic_auth": os.environ.get("AUTH_DATABASE_URI", "")}
    for name, file in databases.items():
        if uris[name]:
            load(uris[name], file)
            say(f"restored {file}")
    if os.environ.get("ARTIFACTS_DIR") and (folder / "artifacts").is_dir():
        copy_missing(folder / "artifacts", Path(os.environ["ARTIFACTS_DIR"]))
        say(f"restored {folder / 'artifacts'}")


{"backup": backup, "restore": restore}[sys.argv[1]]()
