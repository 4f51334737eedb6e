"""Fetching an image from an address that the service's owner allows, and from nowhere else.

The address must match a pattern; its host is resolved once, every address found must be public, and the connection goes
to the address that was checked, so that a second answer of the name server cannot lead elsewhere. Redirects pass the
same checks. Proxies, cookies and credentials are not used. Size and time are bounded.
"""

import contextlib
import fnmatch
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

PORTS = {"http": 80, "https": 443}
_REDIRECTS = 3
# The standard library of Python 3.11 counts these as global: relays of 6to4, site-local and documentation addresses.
_NOT_GLOBAL = [ipaddress.ip_network(n) for n in ("192.88.99.0/24", "fec0::/10", "3fff::/20", "5f00::/16")]
_NAT64, _LOCAL_NAT64 = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48")


class FetchError(Exception):
    """An image that is not fetched. `code` is a short stable name."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class UrlPattern:
    """Scheme, host (`*.` at its beginning stands for any subdomain), port, and a path (`*` stands for anything)."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> "UrlPattern":
        """Read https://HOST[:PORT]/PATH. Raises ValueError."""
        try:
            parts = urlsplit(text)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise ValueError(f"image_urls: {text!r} is not a URL ({error})") from error
        plain = host.removeprefix("*.")
        if parts.scheme not in PORTS or not plain or "*" in plain or parts.username or parts.query or parts.fragment:
            raise ValueError(
                f"image_urls: {text!r} is not of the form https://HOST/PATH; the host may begin with `*.` and the path "
                "may hold `*`"
            )
        return cls(parts.scheme, host, port or PORTS[parts.scheme], parts.path or "/*")

    def matches(self, url: SplitResult) -> bool:
        """Whether a URL, already split, is of this pattern."""
        host = (url.hostname or "").lower().rstrip(".")
        right = host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host
        port = url.port or PORTS.get(url.scheme)
        return (
            right
            and (url.scheme, port) == (self.scheme, self.port)
            and fnmatch.fnmatchcase(url.path or "/", self.path.replace("[", "[[]").replace("?", "[?]"))
        )


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also one that another form of address contains."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.sixtofour or ip.teredo or ip in _LOCAL_NAT64:
            return False
        if ip.ipv4_mapped or ip in _NAT64 or int(ip) >> 32 == 0:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if any(ip in network for network in _NOT_GLOBAL):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class Fetcher:
    """Fetches images.

    Args:
        patterns: which addresses are allowed; see `UrlPattern`.
        most_bytes: largest image.
        seconds: longest time for one image, redirects included.
        allowed: whether an IP address may be connected to.
        resolve: host and port to addresses, as `socket.getaddrinfo`.
        context: how TLS servers are verified; the system's authorities by default.
    """

    def __init__(
        self,
        patterns: tuple[str, ...],
        most_bytes: int,
        seconds: float,
        allowed: Callable[[str], bool] = is_public,
        resolve: Callable = socket.getaddrinfo,
        context: ssl.SSLContext | None = None,
    ):
        self._patterns = [UrlPattern.parse(pattern) for pattern in patterns]
        self._most_bytes, self._seconds = most_bytes, seconds
        self._allowed, self._resolve, self._context = allowed, resolve, context

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def fetch(self, url: str) -> bytes:
        """The bytes behind a URL.

        Raises:
            FetchError: the address is not allowed, or there is no image of the allowed size there in time.
        """
        end = time.monotonic() + self._seconds
        for _ in range(_REDIRECTS + 1):
            parts = self._check(url)
            address = self._address(parts)
            try:
                found = self._get(parts, address, end)
            except TimeoutError as error:
                raise FetchError("image_slow", f"the image did not come within {self._seconds:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                message = f"the image's server could not be read ({type(error).__name__})"
                raise FetchError("image_unavailable", message) from error
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise FetchError("image_unavailable", f"the image's server redirects more than {_REDIRECTS} times")

    def _check(self, url: str) -> SplitResult:
        try:
            if not url.isascii() or any(character <= " " or character in '\\"<>' for character in url):
                raise ValueError("a character that a URL cannot have")
            parts = urlsplit(url)
            _ = parts.port  # raises where it is no number
        except ValueError as error:
            raise FetchError("image_forbidden", "the image's address is not a URL") from error
        steps = unquote(parts.path).replace("\\", "/").split("/")
        named = parts.username is None and parts.password is None
        if ".." in steps or not named or not any(pattern.matches(parts) for pattern in self._patterns):
            raise FetchError("image_forbidden", "this server does not fetch images from that address")
        return parts

    def _address(self, parts: SplitResult) -> str:
        """An IP address of the host; all that it has must be allowed."""
        try:
            found = self._resolve(parts.hostname, parts.port or PORTS[parts.scheme], type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise FetchError("image_unavailable", "the image's host has no address") from error
        addresses = [entry[4][0] for entry in found]
        if not addresses or not all(map(self._allowed, addresses)):
            raise FetchError("image_forbidden", "this server does not fetch images from that address")
        return addresses[0]

    def _get(self, parts: SplitResult, address: str, end: float) -> bytes | str:
        """The body, or where it redirects to."""
        connection = _Pinned(parts, address, end - time.monotonic(), self._context)
        alarm = threading.Timer(end - time.monotonic(), connection.abort)  # a server may send byte by byte
        alarm.daemon = True
        alarm.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            reply = connection.getresponse()
            if reply.status in (301, 302, 303, 307, 308) and reply.headers.get("Location"):
                return reply.headers["Location"]
            if reply.status != 200:
                raise FetchError("image_unavailable", f"the image's server answers with status {reply.status}")
            body = reply.read(self._most_bytes + 1)
            if len(body) > self._most_bytes:
                raise FetchError("image_too_large", f"the image is over the limit of {self._most_bytes:,} bytes")
            return body
        finally:
            alarm.cancel()
            connection.close()
            if time.monotonic() >= end:  # also where the body seemed to end, because the alarm cut it off
                raise TimeoutError


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that was checked, whatever the name says by now."""

    def __init__(self, parts: SplitResult, address: str, seconds: float, context: ssl.SSLContext | None):
        if seconds <= 0:
            raise TimeoutError
        super().__init__(parts.hostname, parts.port or PORTS[parts.scheme], timeout=seconds)
        self._address, self._context = address, context
        self._secure = parts.scheme == "https"
        self._open: socket.socket | None = None

    def connect(self) -> None:
        """Connect to the address; TLS verifies the name."""
        self._open = self.sock = socket.create_connection((self._address, self.port), timeout=self.timeout)
        if self._secure:
            context = self._context or ssl.create_default_context()
            self._open = self.sock = context.wrap_socket(self.sock, server_hostname=self.host)

    def abort(self) -> None:
        """End all reading and writing, from another thread."""
        if self._open is not None:
            with contextlib.suppress(OSError):
                self._open.shutdown(socket.SHUT_RDWR)
