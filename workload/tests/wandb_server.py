"""A server that W&B's own client takes for W&B: the few answers that an upload needs, and what it was sent."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Holds runs as the client uploads them; `blocked`, it accepts requests and answers none."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Rows of each run."""
        self.upserts: dict[str, dict[str, Any]] = {}
        """What each run is described by."""
        self.exit_codes: dict[str, list[int]] = {}
        self.blocked = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def query(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Answers a query of GraphQL."""
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
        return {}

    def resumable(self, rows: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        """Returns what a resumed run goes on from; nothing where there is no such run."""
        if rows is None:
            return None
        tail = [json.dumps(row) for row in rows[-1:]]
        counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        return counts | texts | {"id": "1", "name": "1", "displayName": "", "tags": [], "wandbConfig": '{"t": 1}'}

    def stream(self, run: str, content: dict[str, Any]) -> None:
        """Takes rows, at the place that the client wants them at."""
        if rows := content.get("files", {}).get("wandb-history.jsonl"):
            place = rows["offset"]
            self.history[run][place : place + len(rows["content"])] = map(json.loads, rows["content"])
        if content.get("complete"):
            self.exit_codes.setdefault(run, []).append(content["exitcode"])


class Handler(BaseHTTPRequestHandler):
    """Reads a request and answers with JSON."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def answer(self) -> None:
        """Answers a request of any kind."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        while self.server.blocked:
            threading.Event().wait(0.1)
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        result: dict[str, Any] = {}
        if self.path == "/graphql":
            request = json.loads(body)
            result = {"data": self.server.query(request.get("operationName") or "", request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        text = json.dumps(result).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = answer
