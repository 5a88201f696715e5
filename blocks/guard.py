"""
The outgoing guard: what this house fetches on a consumer's word.

A URL is checked twice. Its text, before anything is asked of the network (``check_url``); and every address
really connected to, by the socket factory of the connector. Only the second holds against redirects, names
that change their address between two look-ups, and hosts spelt as ``2130706433`` or ``127.1``.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Any, Final
from urllib.parse import quote, urlsplit

import aiohttp
from yarl import URL

from blocks.limits import FetchLimits

HTTP: Final = frozenset({"http", "https"})
REDIRECTS: Final = 8

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BRACKETED_HOST = re.compile(r"^[a-z]+://\[[^\]/]*\]", re.IGNORECASE)

# Everything RFC 3986 lets stand in a URL, and %: what is escaped already stays as it is, because a pre-signed
# URL is signed over its exact spelling.
_LEGAL: Final = "!#$%&'()*+,/:;=?@[]~"

# Python before 3.12.4 calls most of 192.0.0.0/24 global; Oracle's metadata service lives in it.
# 168.63.129.16 is a public address by number and hands Azure's machines their secrets.
_NEVER: Final = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "168.63.129.16/32")))
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")


class ForbiddenUrl(Exception):
    """A URL that is not fetched. *reason* says what is wrong with it ("it has no host") quoting none of it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class ForbiddenAddress(OSError):
    """
    A host that leads to an address inside the house.

    An OSError, because that is what connecting may raise: aiohttp tries the next address and then wraps it.
    It names no address: telling a consumer where a name leads inside would be a port scan by proxy.
    """

    def __init__(self) -> None:
        super().__init__("address is not public")


def check_url(url: str, limits: FetchLimits) -> str:
    """
    The URL as it may be requested, its host in ASCII, illegal characters escaped, its fragment dropped.

    For schemes other than http and https only the text can be checked here: an operator who adds one trusts
    the hosts its file system connects to.

    Raises:
        ForbiddenUrl: Not one of ``limits.schemes``; a chain (``zip::…``); credentials in the URL; no host;
            control characters.
    """
    url = url.strip(" ")
    if _CONTROL.search(url):
        raise ForbiddenUrl("it contains control characters")
    if "::" in _BRACKETED_HOST.sub("", url):
        raise ForbiddenUrl("it is a chain; spell a literal :: as %3A%3A")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts = None
    if parts is None:
        raise ForbiddenUrl("its host or port is not valid")
    if parts.scheme not in limits.schemes:
        raise ForbiddenUrl(f"its scheme is not one of {', '.join(limits.schemes)}")
    if parts.scheme not in HTTP:
        if not (parts.netloc or parts.path.strip("/")):
            raise ForbiddenUrl("it names no file")
        return url
    if "@" in parts.netloc:
        raise ForbiddenUrl("it carries credentials")
    if not host:
        raise ForbiddenUrl("it has no host")
    return f"{_origin(parts.scheme, host, port)}{_escaped(parts.path or '/', parts.query)}"


def _escaped(path: str, query: str) -> str:
    return quote(f"{path}?{query}" if query else path, safe=_LEGAL).replace("#", "%23")


def _origin(scheme: str, host: str, port: int | None) -> str:
    try:
        return str(URL.build(scheme=scheme, host=host, port=port).origin())
    except ValueError:
        pass
    raise ForbiddenUrl("its host or port is not valid")


def is_allowed(address: str, limits: FetchLimits) -> bool:
    """Whether *address* (a scope id allowed) is public or inside ``limits.networks``."""
    found = _unwrapped(ipaddress.ip_address(address))
    if any(found in ipaddress.ip_network(network) for network in limits.networks):
        return True
    if any(found in network for network in _NEVER):
        return False
    if isinstance(found, ipaddress.IPv6Address) and found not in _GLOBAL_UNICAST:
        return False
    return found.is_global and not found.is_multicast


def _unwrapped(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address a gateway or the kernel would make of an IPv6 one that embeds it; else *address*."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if embedded := address.ipv4_mapped or address.sixtofour:
        return embedded
    # ::1 and :: are in ::/96 too; as 0.0.0.1 and 0.0.0.0 they would not match an operator's "::1/128".
    if address in _NAT64 or (address in _IPV4_COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def guarded_connector(limits: FetchLimits) -> aiohttp.TCPConnector:
    """A connector that opens no socket to an address ``is_allowed`` refuses. Needs a running event loop."""

    def open_socket(
        addr_info: tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[Any, ...]],
    ) -> socket.socket:
        family, kind, protocol, _, address = addr_info
        if not is_allowed(str(address[0]), limits):
            raise ForbiddenAddress
        return socket.socket(family=family, type=kind, proto=protocol)

    return aiohttp.TCPConnector(
        limit=limits.connections,
        limit_per_host=limits.connections_per_host,
        socket_factory=open_socket,
    )


def guarded_session(limits: FetchLimits, **more: Any) -> aiohttp.ClientSession:
    """
    An HTTP client behind the guard; *more* goes to ``aiohttp.ClientSession``. Needs a running event loop.

    A redirect may not leave the allowed schemes. No cookies: what one input's server sets is not told to
    another's. Proxies and ``.netrc`` of the environment are not used: a proxy would connect where the guard
    cannot look, and the credentials of this machine are not the consumer's.
    """

    async def check_scheme(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        if request.url.scheme not in limits.schemes:
            raise ForbiddenUrl("it redirects to a scheme that is not allowed")
        return await send(request)

    return aiohttp.ClientSession(
        connector=guarded_connector(limits),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        middlewares=(check_scheme,),
        timeout=aiohttp.ClientTimeout(
            total=None,
            # Not `connect`: that counts the wait for a free connection too, and fails the last of many.
            sock_connect=limits.seconds_to_connect,
            sock_read=limits.seconds_silent,
        ),
        **more,
    )
