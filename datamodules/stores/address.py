"""Addresses of shards: which protocol, which file, and what of them may be shown (never a key, password or token)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import fsspec
from fsspec.config import conf

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> our extra that brings its package
ENVIRONMENT = {  # what a protocol's package reads
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, FSSPEC_S3_ANON=true for a public "
    "bucket, and AWS_ENDPOINT_URL_S3 or FSSPEC_S3_ENDPOINT_URL for another server than Amazon's",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_GS_TOKEN=anon for a public bucket, STORAGE_EMULATOR_HOST",
    "http": 'FSSPEC_HTTP_HEADERS=\'{"Authorization": "..."}\', FSSPEC_HTTP_CLIENT_KWARGS=\'{"trust_env": true}\' for '
    "a proxy; a user, password or token may be in the address",
}
SECRET = re.compile(r"secret|token|password|passwd|key|auth|credential", re.IGNORECASE)
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>)]+")


@dataclass(frozen=True)
class Address:
    """A folder of a file system that fsspec knows. `raw` may hold secrets."""

    raw: str = field(repr=False)

    @classmethod
    def parse(cls, raw: str) -> "Address":
        """Raises ValueError when the address is not whole, or the package for its protocol is not installed."""
        address = cls(raw)
        try:
            host = urlsplit(raw).netloc
        except ValueError:
            host = ""
        if _odd_port(host):
            raise ValueError(
                f"{address.shown} has a port that is no number; expected <protocol>://<user>:<password>@<host>:<port>, "
                "where / ? # @ in the password are written %2F %3F %23 %40"
            )
        if "::" in raw and address.family != "http":
            raise ValueError(f"{address.shown} chains protocols (::); expected one: shards are cached without that")
        if not host:
            raise ValueError(
                f"{address.shown} names no server or bucket; expected {address.protocol}://<bucket>/<folder>"
            )
        try:
            fsspec.get_filesystem_class(address.protocol)
        except ImportError as error:
            raise ValueError(f"{address.shown}: {error}. Type: {_install(address.protocol)}") from error
        except ValueError as error:
            known = "s3://, gs://, http(s)://, or another protocol of fsspec's"
            raise ValueError(f"{address.shown}: no protocol {address.protocol!r} is known; expected {known}") from error
        return address

    @property
    def protocol(self) -> str:
        return self.raw.partition("://")[0].lower()

    @property
    def family(self) -> str:
        """The protocol under one name: s3, gcs, http, or the protocol itself."""
        return "http" if self.protocol == "https" else EXTRAS.get(self.protocol, self.protocol)

    @property
    def shown(self) -> str:
        """Without user, password, query string and fragment."""
        return without_secrets(self.raw).rstrip("/")

    @property
    def environment(self) -> str:
        """What to set where a server wants to know who asks."""
        return ENVIRONMENT.get(self.family, f"FSSPEC_{self.protocol.upper()}_<OPTION>")

    def file(self, name: str) -> str:
        """The address of a file in the folder, secrets included."""
        parts = urlsplit(self.raw)
        name = quote(name) if self.family == "http" else name
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}", fragment=""))

    def clean(self, text: str) -> str:
        """What others say, without what must not be shown."""
        for secret in sorted(self._secrets(), key=len, reverse=True):  # first: a URL may end within a secret
            text = text.replace(secret, "***")
        return URL.sub(lambda match: without_secrets(match[0]), text)

    def _secrets(self) -> set[str]:
        parts = urlsplit(self.raw)
        user = parts.netloc.rpartition("@")[0]
        found = {user, user.partition(":")[2], parts.query, *re.findall(r"=([^&]+)", parts.query)}
        for protocol in {self.protocol, self.family, "https" if self.family == "http" else self.protocol}:
            found |= set(_secret_options(conf.get(protocol, {})))
        return {form for secret in found for form in (secret, unquote(secret)) if len(form) >= 4}


def without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = host.rpartition("@")[2]
    return f"{scheme}://***" if _odd_port(host) else f"{scheme}://{host}{slash}{path}"


def _odd_port(host: str) -> bool:
    """Whether a password with a / or ? in it makes its start look like the port."""
    return not re.fullmatch(r"(\[.*\]|[^:]*)(:\d*)?", host.rpartition("@")[2])


def _secret_options(options: Any, secret: bool = False) -> Iterator[str]:
    """Values in fsspec's configuration whose names say that they are secret."""
    if isinstance(options, dict):
        for name, value in options.items():
            yield from _secret_options(value, secret or bool(SECRET.search(str(name))))
    elif secret and isinstance(options, str):
        yield options


def _install(protocol: str) -> str:
    extra = EXTRAS.get(protocol)
    return f"pip install 'mmfusion[{extra}]'" if extra else f"pip install the package for {protocol}://"
