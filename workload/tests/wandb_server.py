"""A server that W&B's client accepts as W&B's, with the responses that an upload needs; it stores uploads."""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Stores uploaded runs; if `blocked`, it accepts requests without a response."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Rows of each run."""
        self.upserts: dict[str, dict[str, Any]] = {}
        """Description of each run."""
        self.exit_codes: dict[str, list[int]] = {}
        self.sweep = ""
        """Definition of the agents' sweep, in YAML."""
        self.trials: dict[str, dict[str, Any]] = {}
        """Unassigned runs of the sweep: values by setting."""
        self.blocked = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def query(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the result of a GraphQL query."""
        if name == "UpsertBucket":
            run = str(values["name"])
            self.history.setdefault(run, [])
            given = {key: value for key, value in values.items() if value}
            self.upserts[run] = self.upserts.get(run, {}) | given
            project = {"id": "1", "name": values["project"], "entity": {"id": "1", "name": "team"}}
            bucket = {"id": "1", "name": run, "displayName": self.upserts[run].get("displayName"), "config": "{}"}
            return {"upsertBucket": {"bucket": bucket | {"project": project, "historyLineCount": 0}, "inserted": True}}
        if name == "RunResumeStatus":
            rows = self.history.get(values["name"])
            entity = {"id": "1", "name": "team"}
            return {"model": {"id": "1", "name": values["project"], "entity": entity, "bucket": self.resumable(rows)}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/file"} for file in values["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if name in ("Viewer", "GetViewer") and self.sweep:
            names = dict.fromkeys(("id", "name", "username", "entity", "email"), "team")
            lists = {"apiKeys": {"edges": []}, "teams": {"edges": []}}
            return {"viewer": {**names, **lists, "admin": False, "flags": "{}", "deletedAt": None}}
        if name == "SweepWithRuns":
            return {"project": {"sweep": {"id": "1", "name": "s", "config": self.sweep, "runs": {"edges": []}}}}
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": "1"}}}
        if name == "Heartbeat":
            commands = self.next_trial(json.loads(values["runState"]))
            return {"agentHeartbeat": {"agent": {"id": "1"}, "commands": json.dumps(commands)}}
        return {}

    def next_trial(self, running: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns an agent's command: the next run after the end of the previous one, and exit after the last."""
        if running:
            return []
        if not self.trials:
            return [{"type": "exit"}]
        run = next(iter(self.trials))
        values = {setting: {"value": value} for setting, value in self.trials.pop(run).items()}
        return [{"type": "run", "run_id": run, "program": None, "args": values}]

    def resumable(self, rows: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        """Returns the state from which a run resumes; nothing if there is no such run."""
        if rows is None:
            return None
        tail = [json.dumps(row) for row in rows[-1:]]
        counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        return counts | texts | {"id": "1", "name": "1", "displayName": "", "tags": [], "wandbConfig": '{"t": 1}'}

    def stream(self, run: str, content: dict[str, Any]) -> None:
        """Stores rows at the client's offset."""
        if rows := content.get("files", {}).get("wandb-history.jsonl"):
            place = rows["offset"]
            self.history[run][place : place + len(rows["content"])] = map(json.loads, rows["content"])
        if content.get("complete"):
            self.exit_codes.setdefault(run, []).append(content["exitcode"])


class Handler(BaseHTTPRequestHandler):
    """Responds to requests with JSON."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: Any) -> None:
        """Suppresses the log of requests."""

    def answer(self) -> None:
        """Responds to a request of any kind."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        while self.server.blocked:
            threading.Event().wait(0.1)
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        result: dict[str, Any] = {}
        if self.path == "/graphql":
            request = json.loads(body)
            stated = re.match(r"\s*(?:query|mutation)\s+(\w+)", request.get("query") or "")
            name = request.get("operationName") or (stated[1] if stated else "")
            result = {"data": self.server.query(name, request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        text = json.dumps(result).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = answer
