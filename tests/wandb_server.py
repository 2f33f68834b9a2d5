"""What of W&B's server its own `wandb sync` talks to: it keeps each run's history, line by line, in memory."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class WandbServer:
    """history: by run's id, the lines that were logged. upserts: what each part of a run said of the run, in order.

    refused: ids of runs that it will not take.
    """

    url: str
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    upserts: list[dict[str, Any]] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = str(variables.get("name"))
        if operation == "RunResumeStatus":
            return {"model": {"id": "p", "name": "p", "entity": {"id": "me", "name": "me"}, "bucket": self._kept(run)}}
        if operation == "UpsertBucket":
            if run in self.refused:
                raise PermissionError(run)
            self.upserts.append(variables)
            project = {"id": "p", "name": variables["project"], "entity": {"id": "me", "name": "me"}}
            new = {"id": run, "name": run, "displayName": run, "config": "{}", "sweepName": None, "project": project}
            return {"upsertBucket": {"inserted": run not in self.history, "bucket": new | {"historyLineCount": 0}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def _kept(self, run: str) -> dict[str, Any] | None:
        if run not in self.history:
            return None
        lines = self.history[run]
        tail = [json.dumps(line) for line in lines[-1:]]
        return {
            "id": run, "name": run, "displayName": run, "summaryMetrics": "{}", "config": "{}", "tags": [],
            "notes": "", "wandbConfig": '{"t": 1}', "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]",
            "historyLineCount": len(lines), "historyTail": json.dumps(tail),
        }  # fmt: skip

    def take(self, run: str, files: dict[str, Any]) -> None:
        """Lines from an offset on: they replace what was there, as the server's do."""
        history = self.history.setdefault(run, [])
        if sent := files.get("wandb-history.jsonl"):
            history[sent["offset"] :] = [json.loads(line) for line in sent["content"]]


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.wandb = WandbServer(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.wandb  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body, server = self._body(), self.server.wandb  # type: ignore[attr-defined]
        if self.path == "/graphql":
            asked = json.loads(body)
            try:
                self._answer({"data": server.answer(asked["operationName"], asked["variables"])})
            except PermissionError:
                self._answer({"errors": [{"message": "permission denied"}]}, 403)
        else:
            if self.path.endswith("/file_stream"):  # /files/<entity>/<project>/<run>/file_stream
                server.take(self.path.split("/")[4], json.loads(body).get("files", {}))
            self._answer({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Silent."""
