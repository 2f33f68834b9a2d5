"""Downloads from a real server that misbehaves in every way we know: what comes back, and how often it was asked."""

import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from datamodules.photos.decode import FORMATS
from datamodules.photos.download import Downloads
from datamodules.photos.options import Failure, PhotoOptions, shared
from tests.datamodules.images import encoded
from tests.datamodules.web import Web, endless, half, hang_up, in_turn, late, page, redirect, status, web_server


def jpeg(colour: int = 0) -> bytes:
    return encoded(Image.new("RGB", (40, 30), (colour, 90, 30)), "JPEG")


PHOTO = jpeg()
OPTIONS = PhotoOptions(timeout=2.0, retries=2)
HASTY = replace(OPTIONS, timeout=0.2)  # for answers that never come


def download(urls: list[str], options: PhotoOptions) -> list[bytes | Failure]:
    return Downloads(options).get(urls)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with web_server() as server:
        yield server


def test_photos_come_in_the_order_of_their_urls(web: Web) -> None:
    urls = [web.add(f"/{i}.jpg", late(0.02 * (5 - i), page(jpeg(i)))) for i in range(5)]
    assert download(urls, OPTIONS) == [jpeg(i) for i in range(5)]
    assert download([], OPTIONS) == []


def test_a_url_named_twice_is_fetched_once(web: Web) -> None:
    url = web.add("/p.jpg", page(PHOTO))
    assert download([url, web.url("/none"), url], OPTIONS) == [PHOTO, Failure("HTTP 404", False), PHOTO]
    assert web.requests == {"/p.jpg": 1, "/none": 1}


def test_a_client_says_who_it_is_and_what_it_reads(web: Web) -> None:
    download([web.add("/p.jpg?size=2&b=%2B", page(PHOTO))], replace(OPTIONS, user_agent="our shop"))
    sent = web.headers["/p.jpg?size=2&b=%2B"]  # the query as the table has it
    assert sent["User-Agent"] == "our shop"
    assert sent["Accept"].startswith("image/jpeg")


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 451])
def test_a_refusal_is_final(web: Web, code: int) -> None:
    assert download([web.add("/p.jpg", status(code))], OPTIONS) == [Failure(f"HTTP {code}", False)]
    assert web.requests["/p.jpg"] == 1


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(web: Web, code: int) -> None:
    urls = [web.add("/once", in_turn(status(code), page(PHOTO))), web.add("/always", status(code))]
    assert download(urls, OPTIONS) == [PHOTO, Failure(f"HTTP {code}", True)]
    assert web.requests == {"/once": 2, "/always": 3}


def test_retries_are_an_option(web: Web) -> None:
    assert download([web.add("/p.jpg", status(500))], replace(OPTIONS, retries=0)) == [Failure("HTTP 500", True)]
    assert web.requests["/p.jpg"] == 1


def test_waits_grow(web: Web) -> None:
    times: list[float] = []

    def busy(request: object) -> None:
        times.append(time.monotonic())
        status(503)(request)

    download([web.add("/p.jpg", busy)], PhotoOptions(timeout=4.0, retries=3))
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert len(waits) == 3
    for number, wait in enumerate(waits):  # a fortieth of the timeout, doubled; at least half of that by chance
        assert wait > 0.05 * 2**number


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_host_that_asks_for_a_pause_gets_it(web: Web, form: str) -> None:
    times: list[float] = []

    def busy(request: object) -> None:
        times.append(time.monotonic())
        date = datetime.now(UTC) + timedelta(seconds=2)
        status(429, Retry_After="1" if form == "seconds" else format_datetime(date, usegmt=True))(request)

    def free(request: object) -> None:
        times.append(time.monotonic())
        page(PHOTO)(request)

    urls = [web.add("/busy.jpg", in_turn(busy, free)), web.add("/other.jpg", free)]
    assert download(urls, replace(OPTIONS, per_host=1)) == [PHOTO, PHOTO]
    assert times[1] - times[0] > 0.95  # a date has whole seconds: 2 of them are more than 1
    assert web.requests == {"/busy.jpg": 2, "/other.jpg": 1}


def test_a_pause_is_bounded_by_three_timeouts(web: Web) -> None:
    url = web.add("/p.jpg", in_turn(status(429, Retry_After=86400), page(PHOTO)))
    assert download([url], HASTY) == [PHOTO]


@pytest.mark.parametrize("words", ["soon", "Mon, 99 Nov 2026", "-5", "", "9" * 40])
def test_a_pause_that_makes_no_sense_is_none(web: Web, words: str) -> None:
    assert download([web.add("/p.jpg", in_turn(status(429, Retry_After=words), page(PHOTO)))], OPTIONS) == [PHOTO]


def test_a_server_that_does_not_answer_times_out(web: Web) -> None:
    urls = [web.add("/once.jpg", in_turn(late(0.9, page(PHOTO)), page(PHOTO))), web.add("/never", late(0.9, hang_up))]
    assert download(urls, PhotoOptions(timeout=0.4, retries=1)) == [PHOTO, Failure("timed out", True)]
    assert web.requests == {"/once.jpg": 2, "/never": 2}


def test_a_photo_that_drips_in_times_out(web: Web) -> None:
    url = web.add("/p.jpg", endless(PHOTO, b"\0", pause=0.02))
    options = PhotoOptions(timeout=0.1, retries=0)
    assert download([url], options) == [Failure("timed out", True)]


def test_waiting_for_a_turn_is_no_timeout(web: Web) -> None:
    urls = [
        web.add(f"/{i}.jpg", late(0.02, page(PHOTO))) for i in range(110)
    ]  # the last one waits for over ten timeouts
    assert download(urls, replace(HASTY, per_host=1, retries=0)) == [PHOTO] * 110


def test_lost_connections_are_tried_again(web: Web) -> None:
    urls = [web.add("/once", in_turn(hang_up, hang_up, page(PHOTO))), web.add("/always", hang_up)]
    assert download(urls, replace(OPTIONS, retries=3)) == [PHOTO, Failure("connection failed", True)]


def test_a_port_without_a_server_and_one_that_speaks_no_tls_are_failed_connections(web: Web) -> None:
    urls = ["http://127.0.0.1:1/p.jpg", f"https://127.0.0.1:{web.port}/p.jpg"]
    assert download(urls, replace(OPTIONS, retries=0)) == [Failure("connection failed", True)] * 2


def test_a_truncated_body_is_tried_again(web: Web) -> None:
    urls = [web.add("/once", in_turn(half(PHOTO), page(PHOTO))), web.add("/always", half(PHOTO))]
    assert download(urls, OPTIONS) == [PHOTO, Failure("truncated", True)]
    assert web.requests == {"/once": 2, "/always": 3}


@pytest.mark.parametrize("content", [b"<html>sorry</html>", b"", b'{"error": 1}', b"%!PS-Adobe", b"<svg/>"])
def test_what_is_no_photo_is_final(web: Web, content: bytes) -> None:
    url = web.add("/p.jpg", page(content, Content_Type="image/jpeg"))
    assert download([url], OPTIONS) == [Failure("not a photo", False)]
    assert web.requests["/p.jpg"] == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_we_decode_is_a_photo(web: Web, kind: str) -> None:
    content = encoded(Image.new("RGB", (9, 9)), kind)
    url = web.add("/p", page(content, Content_Type="text/html"))  # its bytes count, not what it is called
    assert download([url], OPTIONS) == [content]


def test_a_photo_of_the_greatest_size_comes_and_one_byte_more_does_not(web: Web) -> None:
    limit = 2**20
    urls = [
        web.add("/fits", page(PHOTO.ljust(limit, b"\0"))),
        web.add("/larger", page(PHOTO.ljust(limit + 1, b"\0"))),
        web.add("/announced", lambda request: request.start(Content_Length=10**12)),
    ]
    found = download(urls, replace(OPTIONS, max_mib=1.0))
    assert found == [PHOTO.ljust(limit, b"\0"), Failure("too large", False), Failure("too large", False)]


def test_a_body_without_a_length_is_read_up_to_the_limit(web: Web) -> None:
    url = web.add("/p.jpg", endless(PHOTO, bytes(2**16)))
    assert download([url], replace(OPTIONS, max_mib=1.0)) == [Failure("too large", False)]
    assert web.requests["/p.jpg"] == 1
    assert web.sent["/p.jpg"] < 2**25  # what the sockets held, too


def hops(web: Web, number: int, code: int = 302) -> str:
    """The address of a photo behind so many redirects."""
    web.add(f"/{number}/0.jpg", page(PHOTO))
    for hop in range(1, number + 1):
        web.add(f"/{number}/{hop}.jpg", redirect(f"{hop - 1}.jpg", code))
    return web.url(f"/{number}/{number}.jpg")


def test_five_redirects_are_followed_and_six_are_not(web: Web) -> None:
    assert download([hops(web, 5), hops(web, 6)], OPTIONS) == [PHOTO, Failure("redirected too often", False)]
    loop = web.add("/loop", redirect("/loop"))
    assert download([loop], OPTIONS) == [Failure("redirected too often", False)]
    assert web.requests["/loop"] == 6


@pytest.mark.parametrize("code", [301, 303, 307, 308])
def test_every_kind_of_redirect_is_followed(web: Web, code: int) -> None:
    assert download([hops(web, 1, code)], OPTIONS) == [PHOTO]


def test_a_redirect_leads_to_the_web_only(web: Web) -> None:
    targets = ["file:///etc/passwd", "ftp://127.0.0.1/p.jpg", "data:image/png;base64,AAAA", "http://[::1"]
    urls = [web.add(f"/{i}", redirect(target)) for i, target in enumerate(targets)]
    found = download(urls, OPTIONS)
    assert found == [Failure("not http or https", False)] * 3 + [Failure("invalid address", False)]
    assert download([web.add("/nowhere", status(302))], OPTIONS) == [Failure("HTTP 302", False)]


def test_other_schemes_and_broken_addresses_are_failures() -> None:
    urls = ["ftp://host/p.jpg", "data:image/png;base64,AAAA", "file:///etc/passwd", "javascript://x", "HTTPX://x"]
    assert download(urls, OPTIONS) == [Failure("not http or https", False)] * 5
    broken = ["http://", "http://[::1/p.jpg", "http://host:99999/p.jpg", "http://a..b/p.jpg", f"http://{'a' * 70}.b/"]
    assert download(broken, replace(OPTIONS, retries=0)) == [Failure("invalid address", False)] * 5


def together(number: int) -> threading.Barrier:
    """Opens when so many requests are answered at a time."""
    return threading.Barrier(number, timeout=10)


def meeting(barrier: threading.Barrier) -> object:
    def answer(request: object) -> None:
        barrier.wait()
        page(PHOTO)(request)

    return answer


def test_as_many_at_a_time_as_one_host_may_have_and_no_more(web: Web) -> None:
    urls = [web.add(f"/{i}.jpg", meeting(barrier)) for barrier in [together(4)] for i in range(12)]
    assert download(urls, replace(OPTIONS, per_host=4)) == [PHOTO] * 12
    assert web.most["127.0.0.1"] == 4


def test_as_many_at_a_time_as_connections_over_all_hosts(web: Web) -> None:
    barrier = together(3)
    for i in range(12):
        web.add(f"/{i}.jpg", meeting(barrier) if i < 3 else late(0.01, page(PHOTO)))
    urls = [web.url(f"/{i}.jpg", ("127.0.0.1", "localhost")[i % 2]) for i in range(12)]
    assert download(urls, replace(OPTIONS, connections=3, per_host=2)) == [PHOTO] * 12
    assert web.most[""] == 3
    assert max(web.most["127.0.0.1"], web.most["localhost"]) == 2


def test_proxies_of_the_environment_are_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", web.url(""))
    web.add("http://photos.invalid/p.jpg", page(PHOTO))
    assert download(["http://photos.invalid/p.jpg"], OPTIONS) == [PHOTO]


def test_one_job_has_its_part_of_the_connections() -> None:
    options = PhotoOptions(connections=64, per_host=8, retries=1)
    assert shared(options, 1) == options
    assert shared(options, 3) == replace(options, connections=21, per_host=2)
    assert shared(options, 100) == replace(options, connections=1, per_host=1)


@pytest.mark.parametrize(
    "wrong",
    [
        "max_side=0",
        "quality=0",
        "quality=96",
        "connections=0",
        "per_host=0",
        "retries=-1",
        "timeout=0.0",
        "timeout=nan",
        "max_mib=-1.0",
        "max_failed=1.5",
        "max_failed=-0.1",
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: str) -> None:
    name, value = wrong.split("=")
    with pytest.raises(ValueError, match=rf"photos.{name} is {value}; expected"):
        PhotoOptions(**{name: float(value) if "." in value or value == "nan" else int(value)})


def test_limits_hold_over_the_threads_that_download(web: Web) -> None:
    barrier = together(4)
    urls = [web.add(f"/{i}.jpg", meeting(barrier)) for i in range(16)]
    downloads = Downloads(replace(OPTIONS, per_host=4))
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(downloads.get, [urls[i::4] for i in range(4)])) == [[PHOTO] * 4] * 4
    assert web.most["127.0.0.1"] == 4


def test_connections_are_kept_from_call_to_call(web: Web) -> None:
    url, downloads = web.add("/p.jpg", page(PHOTO)), Downloads(OPTIONS)
    assert [downloads.get([url]) for _ in range(3)] == [[PHOTO]] * 3
    assert len(web.clients) == 1


def test_a_copy_downloads_by_itself(web: Web) -> None:
    url, downloads = web.add("/p.jpg", page(PHOTO)), Downloads(OPTIONS)
    assert downloads.get([url]) == [PHOTO]
    assert pickle.loads(pickle.dumps(downloads)).get([url]) == [PHOTO]
    assert len(web.clients) == 2


def test_the_thread_ends_with_the_downloads(web: Web) -> None:
    before = set(threading.enumerate())
    downloads = Downloads(OPTIONS)
    downloads.get([web.add("/p.jpg", page(PHOTO))])
    (thread,) = [thread for thread in threading.enumerate() if thread not in before and thread.name == "downloads"]
    del downloads
    assert not thread.is_alive()


PROGRAM = """
import sys
from datamodules.photos.download import Downloads
from datamodules.photos.options import PhotoOptions
kept = Downloads(PhotoOptions())
print(len(kept.get(sys.argv[1:])[0]))
"""
INTERRUPTED = """
import os, signal, sys, threading
from datamodules.photos.download import Downloads
from datamodules.photos.options import PhotoOptions
kept = Downloads(PhotoOptions(per_host=1))
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    kept.get(sys.argv[2:])
except KeyboardInterrupt:
    print(len(kept.get(sys.argv[1:2])[0]))
"""
WAITING = """
import sys, threading, time
from contextlib import suppress
from concurrent.futures import CancelledError
from datamodules.photos.download import Downloads
from datamodules.photos.options import PhotoOptions
kept = Downloads(PhotoOptions())
def wait():
    with suppress(CancelledError):
        kept.get(sys.argv[2:6])
threading.Thread(target=wait, daemon=True).start()
print(len(kept.get(sys.argv[1:2])[0]))
"""


@pytest.mark.parametrize("program", [PROGRAM, INTERRUPTED, WAITING])
def test_a_program_ends_in_peace_whatever_is_still_awaited(web: Web, program: str) -> None:
    slow = [web.add(f"/{i}.jpg", late(30.0, page(PHOTO))) for i in range(20)]
    urls = [web.add("/p.jpg", page(PHOTO)), *slow[: 0 if program == PROGRAM else 20]]
    command = [sys.executable, "-X", "dev", "-c", program, *urls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    assert (done.stdout, done.stderr) == (f"{len(PHOTO)}\n", "")


@pytest.mark.parametrize("by_proxy", [False, True])
def test_passwords_of_netrc_stay_here(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_proxy: bool
) -> None:
    """A table decides whom we ask: the logins of this machine's user are no business of theirs."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\ndefault login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if by_proxy:
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("http_proxy", web.url(""))
    url = web.add("/p.jpg", page(PHOTO))
    web.pages[url] = web.pages["/p.jpg"]  # what a proxy is asked for
    assert download([url], OPTIONS) == [PHOTO]
    assert web.requests.total() == 1
    for headers in web.headers.values():
        assert not {"Authorization", "Proxy-Authorization"} & set(headers)
