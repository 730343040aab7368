"""Before the server: brings databases to this MLflow's schema (`migrate`), writes the auth settings and sets the
administrator's password (`auth-config`).
"""

import configparser
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path


def say(text):
    """Prints at once: the log is read while the program runs."""
    print(text, flush=True)


def revisions(uri):
    """Returns the schema that the database has (None if it is new) and the one that this MLflow needs."""
    import mlflow
    import sqlalchemy
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    head = ScriptDirectory(Path(mlflow.__file__).parent / "store" / "db_migrations").get_current_head()
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision(), head
    finally:
        engine.dispose()


def migrate(uri):
    """Upgrades the tracking database; a SQLite file is copied first, because a migration cannot be taken back."""
    have, need = revisions(uri)
    if have == need:
        say(f"tracking database: schema {need}, as needed")
        return
    say(f"tracking database: schema {have} -> {need}")
    if have and uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        copy = path.with_name(f"{path.name}.before-{need}")
        say(f"the database as it was: {copy}")
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    from mlflow.cli import cli

    cli(["db", "upgrade", uri], standalone_mode=False)


def migrate_auth(uri):
    """Upgrades the users' database; a server would do so too, but several must not do it at once."""
    import sqlalchemy
    from mlflow.server.auth.db.utils import migrate_if_needed

    engine = sqlalchemy.create_engine(uri)
    try:
        migrate_if_needed(engine, "head")
    finally:
        engine.dispose()
    say("users' database: ready")


def write_auth_config(path):
    """Writes what MLflow reads from a file only; name and password of the administrator stay in the environment."""
    config = configparser.RawConfigParser()
    config["mlflow"] = {
        "default_permission": os.environ["AUTH_DEFAULT_PERMISSION"],
        # MLflow interpolates: a password's %2F would end the server.
        "database_uri": os.environ["AUTH_DATABASE_URI"].replace("%", "%%"),
        "auth_cache_ttl_seconds": os.environ["AUTH_CACHE_SECONDS"],
        "authorization_function": "ictx_guard:authorize",
    }
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        config.write(file)
    say(f"auth settings: {path}")


def set_admin_password(uri, name, password):
    """Sets it where the database has another one: it was changed while no server ran, or came back with a backup."""
    import sqlalchemy
    from werkzeug.security import check_password_hash, generate_password_hash

    # Not by MLflow's own store: importing it takes as long as starting a server.
    engine = sqlalchemy.create_engine(uri)
    query = "SELECT password_hash FROM users WHERE username = :name"
    with engine.begin() as connection:
        # The server makes table and account at its first start.
        known = sqlalchemy.inspect(connection).has_table("users")
        found = known and connection.execute(sqlalchemy.text(query), {"name": name}).scalar()
        if found and not check_password_hash(found, password):
            update = "UPDATE users SET password_hash = :new WHERE username = :name"
            connection.execute(sqlalchemy.text(update), {"new": generate_password_hash(password), "name": name})
            say(f"password of {name}: set to that of the Secret")
    engine.dispose()


if "migrate" in sys.argv[1:]:
    migrate(os.environ["MLFLOW_BACKEND_STORE_URI"])
    if os.environ.get("AUTH_DATABASE_URI", "").startswith("postgresql"):
        migrate_auth(os.environ["AUTH_DATABASE_URI"])
if "auth-config" in sys.argv[1:]:
    write_auth_config(os.environ["MLFLOW_AUTH_CONFIG_PATH"])
    if "MLFLOW_AUTH_ADMIN_PASSWORD" in os.environ:
        credentials = (os.environ["MLFLOW_AUTH_ADMIN_USERNAME"], os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"])
        set_admin_password(os.environ["AUTH_DATABASE_URI"], *credentials)
