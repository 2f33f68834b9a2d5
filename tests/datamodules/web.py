"""A real web server on 127.0.0.1 that answers as each test says, and counts what it was asked."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Request"], None]


class Web:
    """Pages by path; any other path is 404.

    `requests` counts them by path, `most` is the greatest number that waited for an answer at a time by host, `sent`
    what `endless` wrote, `clients` are the addresses of the connections that requests came by.
    """

    def __init__(self, port: int) -> None:
        self.port, self.pages = port, dict[str, Answer]()
        self.requests, self.sent, self.most = Counter[str](), Counter[str](), defaultdict[str, int](int)
        self.clients = set[tuple[str, int]]()
        self.headers = dict[str, dict[str, str]]()
        self._now, self._lock = Counter[str](), threading.Lock()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """The address of a path; "localhost" is the same server, and another host to a client."""
        return f"http://{host}:{self.port}{path}"

    def add(self, path: str, answer: Answer) -> str:
        self.pages[path] = answer
        return self.url(path)

    def asked(self, request: "Request") -> None:
        with self._lock:
            self.requests[request.path] += 1
            self.clients.add(request.client_address)
            self.headers[request.path] = dict(request.headers)
            for host in request.hosts():
                self._now[host] += 1
                self.most[host] = max(self.most[host], self._now[host])

    def answered(self, request: "Request") -> None:
        with self._lock:
            self._now.subtract(request.hosts())


class Request(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.waiting = True
        self.web.asked(self)
        try:
            self.web.pages.get(self.path, status(404))(self)
        finally:
            self._answered()

    def hosts(self) -> tuple[str, str]:
        return "", self.headers.get("Host", "").split(":")[0]  # "" stands for all

    def _answered(self) -> None:
        if self.waiting:
            self.waiting = False
            self.web.answered(self)

    def start(self, code: int = 200, **headers: str | int) -> None:
        self._answered()  # first: once it has the answer, the client rightly asks for the next while we are still here
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextmanager
def web_server() -> Iterator[Web]:
    class Bound(Request):
        pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        block_on_close = False  # a thread may still sleep in an answer

        def handle_error(self, *args: object) -> None:
            """A client that went away, which is what some tests are about."""

    with Server(("127.0.0.1", 0), Bound) as server:
        Bound.web = Web(server.server_port)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Bound.web
        finally:
            server.shutdown()
            thread.join()


def page(content: bytes, code: int = 200, **headers: str | int) -> Answer:
    def answer(request: Request) -> None:
        request.start(code, Content_Length=len(content), **headers)
        request.wfile.write(content)

    return answer


def status(code: int, **headers: str | int) -> Answer:
    return page(b"<html>no photo</html>", code, Content_Type="text/html", **headers)


def redirect(location: str, code: int = 302) -> Answer:
    return status(code, Location=location)


def in_turn(*answers: Answer) -> Answer:
    """The first answer to the first request, and so on; the last one to all further ones."""
    left = list(answers)

    def answer(request: Request) -> None:
        now = left.pop(0) if len(left) > 1 else left[0]
        now(request)

    return answer


def half(content: bytes) -> Answer:
    """Announces all and sends half."""

    def answer(request: Request) -> None:
        request.start(Content_Length=len(content))
        request.wfile.write(content[: len(content) // 2])
        request.close_connection = True

    return answer


def late(seconds: float, then: Answer) -> Answer:
    def answer(request: Request) -> None:
        time.sleep(seconds)
        then(request)

    return answer


def hang_up(request: Request) -> None:
    """Closes the connection without a word."""
    request.close_connection = True


def endless(start: bytes, part: bytes, pause: float = 0.0) -> Answer:
    """Says nothing of its length and ends only when the client goes away."""

    def answer(request: Request) -> None:
        request.start(Connection="close")
        request.wfile.write(start)
        while True:
            request.wfile.write(part)
            request.web.sent[request.path] += len(part)
            time.sleep(pause)

    return answer
