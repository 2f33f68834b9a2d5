"""A web server on 127.0.0.1 with a folder of files, that takes ranges and fails as each test says."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

# Given the file's name and how often it was asked for before: one of the faults below, or "" to answer as one should.
Faults = Callable[[str, int], str]
STATUS = {"500": 500, "503": 503, "403": 403, "404": 404}


def named(path: str) -> str:
    """The file that a request is for."""
    found = re.search(r"(pairs/)?[^/]*$", urlsplit(path).path)
    return found[0] if found else ""


class Site:
    """`asked` lists the (name, start, end) of all answers begun, `headers` the last request's."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        self.faults: Faults = lambda name, before: ""
        self.gate = threading.Event()  # an answer "wait"s for it
        self.waiting = threading.Event()  # and says so
        self.asked: list[tuple[str, int, int]] = []
        self.counts, self.headers = Counter[str](), dict[str, str]()
        self.lock = threading.Lock()

    def counted(self, name: str) -> int:
        with self.lock:
            self.counts[name] += 1
            return self.counts[name] - 1


class Answer(BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        path = self.site.folder / named(self.path)
        self._head(200 if path.is_file() else 404, path.stat().st_size if path.is_file() else 0)

    def do_GET(self) -> None:
        name = named(self.path)
        self.site.headers = {**dict(self.headers), "path": self.path}
        fault = self.site.faults(name, self.site.counted(name))
        path = self.site.folder / name
        if fault in STATUS or not path.is_file():
            return self._head(STATUS.get(fault, 404), 0)
        whole = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(found[1]), min(int(found[2]) + 1, len(whole))) if found else (0, len(whole))
        if start >= len(whole):
            return self._head(416, 0)
        with self.site.lock:
            self.site.asked.append((name, start, end))
        self._answer(fault, whole, start, end, ranged=found is not None)

    def _answer(self, fault: str, whole: bytes, start: int, end: int, ranged: bool) -> None:
        if fault == "wait":
            self.site.waiting.set()
            assert self.site.gate.wait(60)
        if fault in ("no ranges", "no ranges, dropped"):
            start, end, ranged = 0, len(whole), False
        content = whole[start:end]
        if fault == "short":
            content = content[:1000]
        if fault == "garbled":
            content = bytes(byte ^ 255 for byte in content)
        self._head(206 if ranged else 200, len(content), {"Content-Range": f"bytes {start}-{end - 1}/{len(whole)}"})
        if fault in ("dropped", "no ranges, dropped"):
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Tests read what they need from the site."""


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed hangs up."""


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    handler = type("Answers", (Answer,), {})
    server = Quiet(("127.0.0.1", 0), handler)
    handler.site = site = Site(folder, server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield site
    finally:
        site.gate.set()
        server.shutdown()
        server.server_close()
