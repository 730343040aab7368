"""Tracking of a run in Weights & Biases: one W&B run per job, also after restarts. Never blocks training."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.track.config import MODES, TrackConfig

T = TypeVar("T")
INIT_SECONDS = 30.0
"""Timeout of the start of an online run, after which the run is tracked offline."""
STOP_SECONDS = 10.0
"""Maximum time that a stopped or failed run waits for the upload, because a job's grace period is short."""
EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 75}


def check(track: TrackConfig) -> None:
    """Raises UserError for `online` without an API key, and for a mode without the package.

    Call it before a run acquires resources.
    """
    if _wanted(track) != "auto":
        mode(track)


def mode(track: TrackConfig) -> str:
    """Returns `online`, `offline` or `disabled` (also for `auto` without the package). Raises like `check`."""
    wanted = _wanted(track)
    if wanted != "disabled" and importlib.util.find_spec("wandb") is None:
        if wanted == "auto":
            return "disabled"
        raise UserError(f"track.wandb is {wanted}, but wandb is not installed: install it, or set track.wandb=disabled")
    if wanted not in ("auto", "online"):
        return wanted
    if _has_key():
        return "online"
    if wanted == "online":
        raise UserError(
            "track.wandb is online, but there is no W&B API key: set WANDB_API_KEY in the environment, run `wandb "
            "login`, or add --set track.wandb=offline"
        )
    return "offline"


def _wanted(track: TrackConfig) -> str:
    if track.wandb != "auto":
        return track.wandb
    wanted = os.environ.get("WANDB_MODE", "auto")
    return wanted if wanted in MODES else "offline"


def _has_key() -> bool:
    """Returns whether `wandb` finds an API key or token for its server; never prompts."""
    wandb = _library()
    from wandb.sdk.lib import wbauth

    try:
        return bool(wbauth.authenticate_session(host=wandb.setup().settings.base_url, source="ictx", prompt=False))
    except Exception as error:
        # The message describes the key's format, without the key itself.
        raise UserError(f"W&B: {str(error).splitlines()[0]}") from error


def _library() -> Any:
    """Imports `wandb` only when it is used, because that takes a second."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb


def _end_client() -> None:
    """Kills W&B's process, which would retry forever and keep the job's output open."""
    from wandb.sdk import wandb_setup

    with contextlib.suppress(AttributeError):  # no public API does this without waiting for the upload
        wandb_setup._singleton._connection._proc._process.kill()  # type: ignore[union-attr]


def _run_id(note: Path) -> str:
    """Returns the id of a folder's W&B run; for a new run, a W&B agent may set it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9A-Za-z_-]{1,64}", found := note.read_text().strip()):
            return found
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_whole(note, run_id + "\n")
    return run_id


@dataclass
class Description:
    """Description of a run in W&B: settings, links and tags."""

    name: str
    experiment: str
    settings: Mapping[str, Any]
    """Settings of the run, nested."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Links to the run in other trackers."""
    tags: Mapping[str, str] = field(default_factory=dict)


class WandbSink:
    """Logs to W&B's server, or to a folder that `wandb sync` uploads: the sink of an outbox.

    W&B's client runs in a separate process, and all calls to it in a separate thread: a server that is slow, hangs or
    fails affects only the upload, not the run.
    """

    name, failure = "W&B", RuntimeError

    def __init__(self, directory: Path, track: TrackConfig, about: Description, patience: float) -> None:
        """Continues the run whose id is stored in `directory`, or creates one; `finish` waits up to `patience` seconds.

        Raises UserError for `online` without an API key, and for a mode without the package.
        """
        self.mode = mode(track)
        self.directory, self.track, self.about, self.patience = directory, track, about, patience
        self.run_id = _run_id(directory / "wandb_run_id")
        self.url = ""
        """URL of the run's page, once known."""
        self.folder = directory / "wandb"
        self._run: Any = None
        self._next_step, self._left = 0, False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._calls.put(self._begin)
        self._thread.start()

    @property
    def path(self) -> str:
        """W&B's path of the run: ENTITY/PROJECT/ID, without ENTITY if it is the key's default."""
        return "/".join(filter(None, (self._entity, self._project, self.run_id)))

    @property
    def tags(self) -> dict[str, str]:
        """Tags for other trackers that link to this run."""
        return {"wandb.run_id": self.run_id, "wandb.path": self.path} | ({"wandb.url": self.url} if self.url else {})

    @property
    def _project(self) -> str:
        return self.track.project or os.environ.get("WANDB_PROJECT") or re.sub(r"[/\\#?%:]", "-", self.about.experiment)

    @property
    def _entity(self) -> str | None:
        return self.track.entity or os.environ.get("WANDB_ENTITY")

    def log(self, records: list[Mapping[str, float]]) -> None:
        """Queues records, each with `step` and `time` (Unix seconds)."""
        self._calls.put(lambda: self._log(records))

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED, and prints its URL or folder."""
        self._calls.put(lambda: self._run.finish(exit_code=EXIT_CODES[status]))
        self._calls.put(None)
        self._thread.join(self.patience if status == "FINISHED" else STOP_SECONDS)
        if self._thread.is_alive():
            self._left = True
            print(f"W&B does not answer: upload the rest with: wandb sync {self.folder}", flush=True)
            _end_client()
        elif self.url:
            print(f"W&B: {self.url}", flush=True)
        elif self._run:
            print(f"W&B: an offline run; upload it with: wandb sync {self.folder}", flush=True)

    def patiently(self, call: Callable[[], T]) -> T:
        """Returns the call's result; calls never fail because of the server."""
        return call()

    def reason(self, error: Exception) -> str:
        """Returns an error's cause in one line."""
        return str(error).partition("\n")[0] or type(error).__name__

    def _work(self) -> None:
        """Runs the queued calls in order; stops after a failure, and the next start sends what is missing."""
        while call := self._calls.get():
            try:
                call()
            except Exception as error:
                if not self._left:
                    print(f"W&B: {self.reason(error)}: not tracked there until the next start", flush=True)
                    _end_client()
                self._run = None
                return

    def _begin(self) -> None:
        try:
            self._run = self._init()
        except Exception as error:
            if self.mode == "offline":
                raise
            print(f"W&B does not answer ({self.reason(error)}): the run is tracked offline", flush=True)
            self.mode = "offline"
            # The client still has the online run open.
            _end_client()
            with contextlib.suppress(Exception, SystemExit):  # it exits with the status of the process
                _library().teardown(1)
            self._run = self._init()
        self._next_step = self._run.starting_step
        self.url = self._run.url or ""

    def _init(self) -> Any:
        # The client writes logs: to this folder instead of the home directory, which may be missing in a container.
        os.environ.setdefault("WANDB_CACHE_DIR", str(self.folder / "client"))
        wandb = _library()
        online = self.mode == "online"
        # An offline run is written again at each start, from metrics.jsonl, because a killed process may have truncated
        # it. Uploading it again replaces the previous upload.
        for left in self.folder.glob(f"offline-run-*-{self.run_id}"):
            shutil.rmtree(left, ignore_errors=True)
        settings = wandb.Settings(
            mode=self.mode,
            root_dir=str(self.directory),
            project=self._project,
            entity=self._entity,
            run_id=self.run_id,
            run_name=self.about.name,
            run_group=self.track.group,
            run_notes=" ".join(self.about.links.values()) or None,
            run_tags=tuple(f"{name}:{value}"[:64] for name, value in self.about.tags.items()),
            resume="allow" if online else None,
            reinit="create_new",
            init_timeout=INIT_SECONDS,
            finish_timeout=self.patience or STOP_SECONDS,
            # Send only metrics and settings, no data about the machine, console, code or packages.
            host="",
            console="off",
            silent=True,
            symlink=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        config = {**_plain(self.about.settings), "links": dict(self.about.links), "tags": dict(self.about.tags)}
        return wandb.init(config=config, allow_val_change=True, settings=settings)

    def _log(self, records: list[Mapping[str, float]]) -> None:
        for record in records:
            step = int(record["step"])
            if step < self._next_step:  # the server has it from an earlier start
                continue
            metrics = {name: value for name, value in record.items() if name not in ("step", "time")}
            self._run.log({**metrics, "_timestamp": record["time"]}, step=step)
            self._next_step = step + 1


def _plain(value: Any) -> Any:
    """Returns settings as JSON types."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, int | float | str | None) else str(value)
