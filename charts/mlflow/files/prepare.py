"""Runs before the server: migrates databases to this MLflow's schema (`migrate`), writes the auth settings and sets the
administrator's password (`auth-config`).
"""

import configparser
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path


def say(text):
    """Prints without buffering, so that the log can be followed."""
    print(text, flush=True)


def revisions(uri):
    """Returns the schema revision of the database (None if new) and the one that this MLflow requires."""
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
    """Migrates the tracking database. Copies a SQLite file first, since a migration cannot be reverted."""
    have, need = revisions(uri)
    if have == need:
        say(f"tracking database: schema {need} is current")
        return
    say(f"tracking database: schema {have} -> {need}")
    if have and uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        copy = path.with_name(f"{path.name}.before-{need}")
        say(f"tracking database: copy before the migration: {copy}")
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    from mlflow.cli import cli

    cli(["db", "upgrade", uri], standalone_mode=False)


def migrate_auth(uri):
    """Migrates the user database here, since several servers must not do it at the same time."""
    import sqlalchemy
    from mlflow.server.auth.db.utils import migrate_if_needed

    engine = sqlalchemy.create_engine(uri)
    try:
        migrate_if_needed(engine, "head")
    finally:
        engine.dispose()
    say("user database: ready")


def write_auth_config(path):
    """Writes the settings that MLflow reads only from a file. The environment has the administrator's credentials."""
    config = configparser.RawConfigParser()
    config["mlflow"] = {
        "default_permission": os.environ["AUTH_DEFAULT_PERMISSION"],
        # MLflow interpolates the values: the server would fail at a %2F in the password.
        "database_uri": os.environ["AUTH_DATABASE_URI"].replace("%", "%%"),
        "auth_cache_ttl_seconds": os.environ["AUTH_CACHE_SECONDS"],
        "authorization_function": "ictx_guard:authorize",
    }
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        config.write(file)
    say(f"auth settings: {path}")


def set_admin_password(uri, name, password):
    """Sets the password if the database has another: changed while no server ran, or a backup was restored."""
    import sqlalchemy
    from werkzeug.security import check_password_hash, generate_password_hash

    # Without MLflow's own store: its import takes as long as the start of a server.
    engine = sqlalchemy.create_engine(uri)
    query = "SELECT password_hash FROM users WHERE username = :name"
    with engine.begin() as connection:
        # The server creates the table and the account at its first start.
        known = sqlalchemy.inspect(connection).has_table("users")
        found = known and connection.execute(sqlalchemy.text(query), {"name": name}).scalar()
        if found and not check_password_hash(found, password):
            update = "UPDATE users SET password_hash = :new WHERE username = :name"
            connection.execute(sqlalchemy.text(update), {"new": generate_password_hash(password), "name": name})
            say(f"password of {name}: set from the Secret")
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
