"""`ictx adapters`: synchronizes the LoRA adapters of a running vLLM with a list, without a restart.

Runs beside vLLM in the same pod and reads the list in each pass: downloads new adapters from the registry (`ictx pull`)
and loads them, replaces those whose alias has changed, and unloads those that are not listed any more. Queries
`/v1/models` for the loaded adapters, so that a restarted vLLM gets all of them again.

vLLM's endpoints for adapters load any folder and are therefore closed to clients (`ictx.serve.gate`): at its start this
process writes its own key to a folder that only the pod's containers can read.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ictx.errors import UserError, printable
from ictx.folder import write_whole
from ictx.registry import ModelRef, as_user_error
from ictx.serve.gate import ADMIN_KEY, LOAD, UNLOAD
from ictx.serve.lora import check_adapter
from ictx.serve.pull import pull

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
READY = "ready"
"""File in the folder of the key; exists after all listed adapters were loaded, while the server responds."""


def read_list(file: Path) -> dict[str, ModelRef]:
    """Returns served name → version of the registry. Raises UserError with the invalid entry."""
    try:
        content: Any = yaml.safe_load(file.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected lines NAME: models:/MODEL@ALIAS")
    for name in content:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"{file}: {name!r} is not a name for an adapter: expected letters, digits, . _ -")
    return {name: ModelRef.parse(str(uri)) for name, uri in content.items()}


@dataclass
class Server:
    """The vLLM beside this process."""

    url: str
    key_file: Path
    certificate: Path | None = None
    """The server's certificate; compared as a whole, because its names are those of the Service."""

    def send(self, method: str, path: str, body: object = None) -> Any:
        """Sends a request; returns the parsed response. Raises UserError for an HTTP error, OSError without a reply."""
        context = None
        if self.certificate:
            context = ssl.create_default_context(cafile=str(self.certificate))
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.check_hostname = False
        headers = {"Authorization": f"Bearer {self.key_file.read_text()}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        # No proxy (HTTP_PROXY): the server is in this pod, and the key must not leave it.
        local = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with local.open(request, timeout=300) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise UserError(f"{path}: {error.code} {_message(error.read().decode(errors='replace'))}") from error
        return json.loads(text) if text.startswith("{") else text

    def loaded(self) -> dict[str, Path]:
        """Returns the loaded adapters and their folders."""
        cards = cast("list[dict[str, Any]]", self.send("GET", "/v1/models")["data"])
        return {card["id"]: Path(card["root"]) for card in cards if card.get("parent")}


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


@dataclass
class Adapters:
    """The adapters of one server; `state` is the folder for key and READY, `folder` that for the files."""

    client: MlflowClient
    server: Server
    list_file: Path
    folder: Path
    base: Path
    state: Path
    promoted: bool = True
    rank: int | None = None
    """Maximum rank that the server accepts; not checked if None."""
    _said: dict[str, str] = field(default_factory=dict)

    def open(self) -> None:
        """Writes the key with which this process authenticates."""
        write_whole(self.state / ADMIN_KEY, secrets.token_urlsafe(32))
        (self.state / READY).unlink(missing_ok=True)

    def follow(self, seconds: float) -> None:
        """Runs passes forever; errors are logged once and retried."""
        while True:
            ready = self.update()
            (self.state / READY).touch() if ready else (self.state / READY).unlink(missing_ok=True)
            time.sleep(seconds)

    def update(self) -> bool:
        """Runs one pass; returns whether the pod is ready: the server responds and has all listed adapters.

        An adapter that cannot be loaded keeps a new pod unready, but does not make a ready pod unready.
        """
        try:
            wanted, loaded = read_list(self.list_file), self.server.loaded()
        except OSError as error:
            self._say("", f"the server does not respond: {getattr(error, 'reason', error)}")
            return False
        except UserError as error:
            self._say("", str(error))
            return (self.state / READY).exists()
        self._said.pop("", None)
        for name in sorted(set(loaded) - set(wanted)):
            self._try(name, partial(self._unload, name))
        good = [self._try(name, partial(self._load, name, ref, loaded)) for name, ref in wanted.items()]
        self._clear(wanted)
        return all(good) or (self.state / READY).exists()

    def _try(self, name: str, step: Callable[[], None]) -> bool:
        try:
            step()
        except (UserError, MlflowException, OSError) as error:
            reason = as_user_error(error) if isinstance(error, MlflowException) else error
            self._say(name, f"{name}: {reason}")
            return False
        return True

    def _load(self, name: str, ref: ModelRef, loaded: dict[str, Path]) -> None:
        version = str(ref.find(self.client).version) if ref.alias else ref.version
        folder = self.folder / name / f"{ref.name}.{version}"
        if loaded.get(name) == folder:
            return
        pull(self.client, ModelRef(ref.name, version=version), folder, self.promoted, self._check)
        self.server.send("POST", LOAD, {"lora_name": name, "lora_path": str(folder), "load_inplace": name in loaded})
        for other in folder.parent.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other, ignore_errors=True)
        self._say(name, f"{name} is now {ref.name}/{version}")

    def _check(self, ref: ModelRef, directory: Path) -> None:
        check_adapter(ref, directory, self.base, self.rank)

    def _unload(self, name: str) -> None:
        self.server.send("POST", UNLOAD, {"lora_name": name})
        self._say(name, f"{name} is unloaded")

    def _clear(self, wanted: dict[str, ModelRef]) -> None:
        """Deletes the files of adapters that are not listed any more."""
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)

    def _say(self, name: str, text: str) -> None:
        """Prints without buffering; skips a repetition of the adapter's last line."""
        if self._said.get(name) != text:
            print(f"adapters: {printable(text)}", flush=True)
        self._said[name] = text
