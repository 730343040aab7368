"""`backup` creates a backup (databases, artifacts, list of checksums) and removes old ones; `restore` restores one.

Both verify checksums, report damaged files and exit with an error if there are any. A backup without the damaged files
of the server is kept. A restore of a damaged backup changes nothing unless PARTIAL is `true`.

Environment: the databases' URIs, BACKUP_DIR, ARTIFACTS_DIR (empty: none). For `backup`: RETENTION and SHARED_COPIES
(number of backups that share one copy of a file). For `restore`: SNAPSHOT, PARTIAL, SERVER (host:port) and SERVER_GRACE
(seconds that the server may take to stop).
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

MANIFEST = "manifest.json"


def say(text):
    """Prints without buffering, so that the log can be followed."""
    print(text, flush=True)


def libpq(uri):
    """Returns the environment for PostgreSQL's programs: every user of the node can read a password in arguments."""
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


def checksum(path):
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe(path):
    """Returns the SHA-256, the size in bytes and the modification time of a file."""
    about = path.stat()
    return {"sha256": checksum(path), "size": about.st_size, "time": int(about.st_mtime)}


def read_manifest(folder):
    """Returns a backup's databases (checksums by name) and artifacts (checksum, size and time by path).

    Raises ValueError if the manifest has another form.
    """
    file, content = folder / MANIFEST, None
    with suppress(ValueError):
        content = json.loads(file.read_text())
    known = content if isinstance(content, dict) else {}
    databases, artifacts = known.get("databases"), known.get("artifacts")
    if not is_table(databases, str):
        raise ValueError(f"{file} is damaged: databases is not a table of checksums")
    if isinstance(artifacts, bool):
        # Older versions recorded only whether there are artifacts: describe the current files.
        files = (path for path in sorted((folder / "artifacts").rglob("*")) if path.is_file())
        artifacts = {str(path.relative_to(folder / "artifacts")): describe(path) for path in files}
    if not is_table(artifacts, dict) or not all({"sha256", "size"} <= set(each) for each in artifacts.values()):
        raise ValueError(f"{file} is damaged: artifacts is not a table of checksums and sizes")
    return databases, artifacts


def is_table(value, kind):
    """Returns whether a value is a dictionary whose values are of a type."""
    return isinstance(value, dict) and all(isinstance(each, kind) for each in value.values())


def intact(folder, where, known):
    """Returns a backup's copy of an artifact, or None if it is missing or damaged."""
    copy = folder / "artifacts" / where
    return copy if copy.is_file() and checksum(copy) == known["sha256"] else None


def copy_artifact(path, target, old, known, shared):
    """Copies a file, or links the previous backup's copy; returns the description of the copy, and a list of damage.

    At most `shared` backups share one copy; the next gets its own, so that damage to one copy does not affect all
    backups. `old` is the path of the previous copy, and `known` its description, or None.
    """
    found, damaged = describe(path), []
    silent = known and known["sha256"] != found["sha256"] and {**known, "sha256": found["sha256"]} == found
    whole = known and old.is_file() and checksum(old) == known["sha256"]
    if silent:
        # MLflow replaces files, which changes their time.
        damaged.append(
            f"{path} is damaged: its content changed, its size and time did not; intact copy: {old if whole else None}"
        )
    if known and not whole:
        damaged.append(f"{old} is damaged: its checksum is not the one in {MANIFEST}")
    if silent and not whole:
        return None, damaged
    if whole and (silent or known["sha256"] == found["sha256"]):
        os.link(old, target) if old.stat().st_nlink < shared else shutil.copy2(old, target)
        return known, damaged
    shutil.copy2(path, target)
    return describe(target), damaged


def copy_artifacts(source, target, previous, shared):
    """Copies artifacts; returns their manifest and a list of damage. `previous` is the last backup, or None."""
    before, files, damaged = {}, {}, []
    try:
        before = read_manifest(previous)[1] if previous else {}
    except ValueError as error:
        damaged.append(f"{error}; all artifacts were copied")
    for path in sorted(source.rglob("*")):
        where = str(path.relative_to(source))
        try:
            if path.is_dir():
                (target / where).mkdir(parents=True, exist_ok=True)
                continue
            (target / where).parent.mkdir(parents=True, exist_ok=True)
            old = previous / "artifacts" / where if previous else None
            found, wrong = copy_artifact(path, target / where, old, before.get(where), shared)
        except (FileNotFoundError, NotADirectoryError):
            say(f"deleted during the backup: {path}")
            continue
        except OSError as error:
            # Users choose the names of artifacts, and the path in the backup is longer.
            if error.errno != errno.ENAMETOOLONG:
                raise
            damaged.append(f"{path} is not in the backup: its path is too long")
            continue
        damaged += wrong
        if found:
            files[where] = found
    return files, damaged


def backup():
    """Creates a backup in a folder `.*.unfinished`, renamed when complete, and removes old backups."""
    root = Path(os.environ["BACKUP_DIR"])
    done = sorted(path.parent for path in root.glob(f"*Z/{MANIFEST}"))
    name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    folder = root / f".{name}.unfinished"
    for rest in root.glob(".*.unfinished"):
        shutil.rmtree(rest)
    folder.mkdir()
    # Databases first: an artifact without a record is harmless, a record without its artifact is not.
    backend, auth = os.environ["MLFLOW_BACKEND_STORE_URI"], os.environ.get("AUTH_DATABASE_URI", "")
    dump(backend, folder, "mlflow")
    # The server creates its user database at its first start.
    missing = auth.startswith("sqlite:///") and not Path(auth.removeprefix("sqlite:///")).exists()
    if auth and auth != backend and not missing:
        dump(auth, folder, "basic_auth")
    sums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    artifacts, files, damaged = os.environ.get("ARTIFACTS_DIR", ""), {}, []
    if artifacts and Path(artifacts).is_dir():
        previous, shared = done[-1] if done else None, int(os.environ.get("SHARED_COPIES", "7"))
        files, damaged = copy_artifacts(Path(artifacts), folder / "artifacts", previous, shared)
    (folder / MANIFEST).write_text(json.dumps({"databases": sums, "artifacts": files}, indent=1))
    folder.rename(root / name)
    say(f"backup {name}: {', '.join(sums)}{f' and {len(files)} artifacts' if artifacts else ''}")
    for old in [*done, root / name][: -int(os.environ["RETENTION"])]:
        shutil.rmtree(old)
        say(f"removed {old.name}")
    if damaged:
        sys.exit("\n".join(damaged))


def wait_for_the_server_to_end(address, grace, seconds=300):
    """Waits until the server has stopped: it would write to the database while it is replaced."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), timeout=3).close()
        except OSError:
            # The Service removes a pod before its processes stop.
            time.sleep(grace)
            return
        say(f"waiting for the server at {address} to stop")
        time.sleep(2)
    sys.exit(f"the server at {address} still runs: scale it to zero, then try again")


def choose(root, name):
    """Returns the folder of the complete backup `name`, or of the newest for `latest`."""
    complete = sorted(path.parent for path in root.glob(f"*Z/{MANIFEST}"))
    wanted = complete[-1:] if name == "latest" else [path for path in complete if path.name == name]
    if not wanted:
        sys.exit(f"no complete backup {name!r}; there are: {', '.join(path.name for path in complete) or 'none'}")
    return wanted[0]


def verify(folder, sums):
    """Returns the backup's database files by name; exits if one is damaged."""
    for name, wanted in sums.items():
        if checksum(folder / name) != wanted:
            sys.exit(f"{folder / name} is damaged: its checksum is not the one in {MANIFEST}")
    return {Path(name).stem: folder / name for name in sums}


def load(uri, file):
    """Replaces a database; the previous SQLite file is kept as `*.before-restore`."""
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
            sys.exit(f"{file} is damaged: SQLite's integrity check failed")
    if path.exists():
        # Merge the journal first, so that the kept file is complete.
        with closing(sqlite3.connect(path)) as old:
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        path.replace(path.with_name(path.name + ".before-restore"))
    for journal in ("-wal", "-shm", "-journal"):
        path.with_name(path.name + journal).unlink(missing_ok=True)
    fresh.replace(path)


def find_copies(folder, known):
    """Returns an intact copy of each artifact of a backup, from this backup or another; None where there is none."""
    others = sorted((path.parent for path in folder.parent.glob(f"*Z/{MANIFEST}")), reverse=True)
    places = [folder, *(place for place in others if place != folder)]
    return {
        where: next(filter(None, (intact(place, where, known[where]) for place in places)), None) for where in known
    }


def put_back(source, known, root, where):
    """Restores an artifact that is missing or differs; files created after the backup are kept."""
    target = root / where
    if target.is_file() and target.stat().st_size == known["size"] and checksum(target) == known["sha256"]:
        return
    # A file may have replaced a folder since the backup, or a folder a file.
    wrong = [folder for folder in target.parents if folder.is_file()] + [target] * target.is_dir()
    for path in wrong:
        aside = root / f".before-restore-{time.time_ns()}"
        path.rename(aside)
        say(f"moved {path} to {aside}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the root, since a suffix could make the name that a user chose too long.
    partial = root / ".restoring"
    shutil.copy2(source, partial)
    partial.replace(target)


def restore():
    """Restores databases and artifacts; can be repeated."""
    wait_for_the_server_to_end(os.environ["SERVER"], float(os.environ["SERVER_GRACE"]))
    folder = choose(Path(os.environ["BACKUP_DIR"]), os.environ["SNAPSHOT"])
    try:
        sums, known = read_manifest(folder)
    except ValueError as error:
        sys.exit(f"{error}; nothing was changed: choose another backup")
    databases = verify(folder, sums)
    artifacts = os.environ.get("ARTIFACTS_DIR", "")
    known = known if artifacts else {}
    copies = find_copies(folder, known)
    damaged = [where for where, copy in copies.items() if not copy]
    for where in damaged:
        say(f"{folder / 'artifacts' / where} is damaged (not what {MANIFEST} lists), and no other backup has it")
    if damaged and os.environ.get("PARTIAL") != "true":
        sys.exit("nothing was changed: choose another backup, or set restore.partial to restore what is intact")
    uris = {"mlflow": os.environ["MLFLOW_BACKEND_STORE_URI"], "basic_auth": os.environ.get("AUTH_DATABASE_URI", "")}
    for name, file in databases.items():
        if uris[name]:
            load(uris[name], file)
            say(f"restored {file}")
    for where, copy in copies.items():
        if copy:
            put_back(copy, known[where], Path(artifacts), where)
    if copies:
        say(f"restored {folder / 'artifacts'}")
    if damaged:
        sys.exit(f"restored without {', '.join(damaged)}")


{"backup": backup, "restore": restore}[sys.argv[1]]()
