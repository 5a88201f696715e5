"""
The outgoing guard: what this house fetches on a consumer's word.

A URL is checked twice. Its text, before anything is asked of the network (``blocks.urls``); and every address
really connected to, by the socket factory of the connector. Only the second holds against redirects, names
that change their address between two look-ups, and hosts spelt as ``2130706433`` or ``127.1``.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from blocks.limits import FetchLimits
from blocks.urls import ForbiddenUrl, check_host

REDIRECTS: Final = 8

# Python before 3.12.4 calls most of 192.0.0.0/24 global; Oracle's metadata service lives in it.
# 168.63.129.16 is a public address by number and hands Azure's machines their secrets. 192.88.99.0/24 was that of
# whatever 6to4 relay is nearest; 3fff::/20 is for documentation, which not every Python knows.
_NEVER: Final = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "168.63.129.16/32", "192.88.99.0/24", "3fff::/20")))
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")


class ForbiddenAddress(OSError):
    """
    A host that leads to an address inside the house.

    An OSError, because that is what connecting may raise: aiohttp tries the next address and then wraps it.
    It names no address: telling a consumer where a name leads inside would be a port scan by proxy.
    """

    def __init__(self) -> None:
        super().__init__("address is not public")


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


def guarded_connector(limits: FetchLimits, resolver: AbstractResolver | None = None) -> aiohttp.TCPConnector:
    """
    A connector that opens no socket to an address ``is_allowed`` refuses, whatever *resolver* (None: the machine's)
    makes of a name. Needs a running event loop.
    """

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
        resolver=resolver,
    )


def guarded_session(
    limits: FetchLimits, resolver: AbstractResolver | None = None, **more: Any
) -> aiohttp.ClientSession:
    """
    An HTTP client behind the guard; *more* goes to ``aiohttp.ClientSession``. Needs a running event loop.

    A redirect may not leave the allowed schemes, nor lead to a host that is spelt as something else. No cookies: what
    one input's server sets is not told to another's. Proxies and ``.netrc`` of the environment are not used: a proxy
    would connect where the guard cannot look, and the credentials of this machine are not the consumer's.
    """
    return _session(limits, guarded_connector(limits, resolver), middlewares=(schemes_only(limits),), **more)


def operators_session(limits: FetchLimits, **more: Any) -> aiohttp.ClientSession:
    """
    An HTTP client for what the operator has configured, which may be at any address: gateways, nodes of chains.

    It is no way round the guard as long as every request is sent with ``stays_at``: what such a server redirects
    to is not the operator's choice any more.
    """
    connector = aiohttp.TCPConnector(limit=limits.connections, limit_per_host=limits.connections_per_host)
    return _session(limits, connector, **more)


def _session(limits: FetchLimits, connector: aiohttp.TCPConnector, **more: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        timeout=aiohttp.ClientTimeout(
            total=None,
            # Not `connect`: that counts the wait for a free connection too, and fails the last of many.
            sock_connect=limits.seconds_to_connect,
            sock_read=limits.seconds_silent,
        ),
        **more,
    )


# Middlewares of a request. aiohttp calls them for each hop of a redirect; those of a request replace those of its
# session.


def schemes_only(limits: FetchLimits) -> aiohttp.ClientMiddlewareType:
    """Refuses a hop to a scheme that is not allowed, or to a host that ``check_host`` refuses."""

    async def check(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        if request.url.scheme not in limits.schemes:
            raise ForbiddenUrl("it redirects to a scheme that is not allowed")
        check_host(request.url.raw_host or "")
        return await send(request)

    return check


def keeps_to_itself(url: URL, headers: Iterable[str], *, body: bool) -> aiohttp.ClientMiddlewareType:
    """
    Keeps what was given for the origin of *url* from every other one.

    *headers* are taken off once a redirect has left it, and stay off if a later one comes back: where to, another
    server has said. With a *body*, leaving it with that body is refused. aiohttp alone takes off Authorization,
    Cookie and Proxy-Authorization; keys of APIs have any name.
    """
    names = tuple(headers)
    left = False

    async def keep(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        nonlocal left
        left = left or request.url.origin() != url.origin()
        if left:
            if body and request.method == "POST":
                raise ForbiddenUrl("it redirects what is sent to it to another server")
            for name in names:
                request.headers.popall(name, None)
        return await send(request)

    return keep


class LeftOrigin(Exception):
    """An operator's server redirects to another one, at *url*. The text does not say where."""

    def __init__(self, url: URL) -> None:
        self.url = url
        super().__init__("redirects to another server")


def stays_at(url: URL) -> aiohttp.ClientMiddlewareType:
    """Raises LeftOrigin before anything is sent to another origin than that of *url*."""

    async def stay(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        if request.url.origin() != url.origin():
            raise LeftOrigin(request.url)
        return await send(request)

    return stay
