"""One request after the other for a photo: redirects, retries with growing waits, and limits on all that is asked."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypedDict
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from datamodules.photos.options import Failure, PhotoOptions

# How the files of photos.FORMATS begin: JPEG, PNG, WebP, GIF, BMP, TIFF.
PHOTO = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM|II\*\0|MM\0\*", re.DOTALL)
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
PASSING = (408, 425, 429)  # statuses that may be another one the next time, beside 5xx
# Of `timeout`: the first wait before a retry; the longest that a server may ask for; a photo that arrives drop by drop.
FIRST_WAIT, LONGEST_WAIT, LONGEST_PHOTO = 1 / 40, 3, 10
HEADERS = {"Accept": "image/jpeg,image/png,image/webp,image/gif,*/*;q=0.1", "Accept-Encoding": "identity"}


class _AttemptError(Exception):
    def __init__(self, reason: str, transient: bool = False) -> None:
        super().__init__(reason)
        self.failure = Failure(reason, transient)


class _Way(TypedDict, total=False):
    proxy: URL
    proxy_auth: aiohttp.BasicAuth | None


class _Host:
    """Turns at one host, and the time until which it asked not to be disturbed."""

    def __init__(self, turns: int) -> None:
        self.turns, self.quiet_until = asyncio.Semaphore(turns), 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        async with self.turns:
            while (wait := self.quiet_until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            yield


class Visits:
    """Requests within the limits of the options; belongs to one event loop.

    Reasons of failure: HTTP <status>, timed out, connection failed, truncated, too large, not a photo (by its first
    bytes; whether it decodes is not looked at), redirected too often, not http or https, invalid address.
    """

    def __init__(self, session: aiohttp.ClientSession, options: PhotoOptions) -> None:
        self._session, self._options = session, options
        self._proxies = {scheme: URL(proxy) for scheme, proxy in getproxies().items() if scheme in ("http", "https")}
        self._turns, self._hosts = asyncio.Semaphore(options.connections), dict[str, _Host]()

    @classmethod
    async def open(cls, options: PhotoOptions) -> "Visits":
        silence = options.timeout
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the limits are ours: waiting for a turn is no timeout
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={**HEADERS, "User-Agent": options.user_agent},
            timeout=aiohttp.ClientTimeout(total=LONGEST_PHOTO * silence, sock_connect=silence, sock_read=silence),
        )
        return cls(session, options)

    async def close(self) -> None:
        await self._session.close()

    async def photos(self, urls: Sequence[str]) -> list[bytes | Failure]:
        return await asyncio.gather(*(self._photo(url) for url in urls))

    async def _photo(self, url: str) -> bytes | Failure:
        """After as many attempts as it takes or the options allow."""
        wait = FIRST_WAIT * self._options.timeout
        for _ in range(self._options.retries):
            outcome = await self._attempt(url)
            if isinstance(outcome, bytes) or not outcome.transient:
                return outcome
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))
            wait *= 2
        return await self._attempt(url)

    async def _attempt(self, url: str) -> bytes | Failure:
        try:
            return await self._follow(url)
        except _AttemptError as error:
            return error.failure
        except TimeoutError:
            return Failure("timed out", True)
        except aiohttp.ClientPayloadError:
            return Failure("truncated", True)
        except ValueError:  # yarl's, and aiohttp.InvalidURL, which is a ClientError as well
            return Failure("invalid address", False)
        except (aiohttp.ClientError, OSError):
            return Failure("connection failed", True)

    async def _follow(self, url: str) -> bytes:
        address = URL(url)
        for _ in range(1 + MAX_REDIRECTS):
            if address.scheme not in ("http", "https"):
                raise _AttemptError("not http or https")
            answer = await self._ask(address)
            if isinstance(answer, bytes):
                return answer
            address = address.join(answer)
        raise _AttemptError("redirected too often")

    async def _ask(self, address: URL) -> bytes | URL:
        """The photo, or the address where it is said to be."""
        host = self._hosts.setdefault(address.host or "", _Host(self._options.per_host))
        way = self._by(address)
        async with host.turn(), self._turns, self._session.get(address, allow_redirects=False, **way) as response:
            if response.status in REDIRECTS and "Location" in response.headers:
                return URL(response.headers["Location"])
            if response.status == 429:
                wait = min(_asked(response.headers.get("Retry-After", "")), LONGEST_WAIT * self._options.timeout)
                host.quiet_until = max(host.quiet_until, time.monotonic() + wait)
            if not 200 <= response.status < 300:
                raise _AttemptError(f"HTTP {response.status}", response.status in PASSING or response.status >= 500)
            return await self._content(response)

    def _by(self, address: URL) -> _Way:
        """The proxy that the environment names; aiohttp's trust_env would send the passwords of ~/.netrc as well."""
        proxy = self._proxies.get(address.scheme)
        if proxy is None or proxy_bypass(address.host or ""):
            return {}
        login = aiohttp.BasicAuth(proxy.user, proxy.password or "") if proxy.user else None
        return {"proxy": proxy.with_user(None), "proxy_auth": login}

    async def _content(self, response: aiohttp.ClientResponse) -> bytes:
        limit, content = int(self._options.max_mib * 2**20), bytearray()
        if (response.content_length or 0) > limit:
            raise _AttemptError("too large")
        async for part in response.content.iter_any():
            content += part
            if len(content) > limit:
                raise _AttemptError("too large")
        if not PHOTO.match(content):
            raise _AttemptError("not a photo")
        return bytes(content)


def _asked(retry_after: str) -> float:
    """Seconds that the header Retry-After, a number or a date, asks for; 0 where it says nothing."""
    if re.fullmatch(r"\d{1,9}", retry_after):
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date; a date without a zone
        return 0.0
