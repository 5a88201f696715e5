"""Which URLs and headers a consumer or an owner may name: what their text tells. Pure; plan and guard both ask here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final
from urllib.parse import quote, urlsplit

from yarl import URL

from blocks.files import GraphqlFile, UrlFile

HTTP: Final = frozenset({"http", "https"})

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BRACKETED_HOST = re.compile(r"^[a-z]+://\[[^\]/]*\]", re.IGNORECASE)
_IPV6_AND_PORT = re.compile(r"\[[0-9A-Fa-f:.]+\](?::[0-9]*)?")
_NAME = re.compile(r"(?=.{1,254}\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?")
# What the WHATWG's standard calls "ends in a number": of such a host some resolver or other makes an address.
_LIKE_AN_ADDRESS = re.compile(r"(?:\A|\.)(?:[0-9]+|0x[0-9a-f]*)\.*\Z")

# Everything RFC 3986 lets stand in a URL, and %: what is escaped already stays as it is, because a pre-signed
# URL is signed over its exact spelling.
_LEGAL: Final = "!#$%&'()*+,/:;=?@[]~"

# They say where a request goes, where it ends or what becomes of the connection. Who sets them could speak to
# another host behind the same address, or smuggle a second request behind the first.
_NOT_THE_OWNERS: Final = frozenset(
    {
        *("host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade"),
        *("expect", "http2-settings", "via", "forwarded", "x-forwarded-for", "x-forwarded-host", "x-http-method"),
        *("x-http-method-override", "x-method-override"),
    }
)


class ForbiddenUrl(Exception):
    """A file that is not fetched. *reason* says what is wrong with it ("it has no host") quoting none of it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def scheme_of(url: str) -> str:
    return url.strip(" ").partition(":")[0].lower()


def check_url(url: str, schemes: Iterable[str] | None) -> str:
    """
    The URL as it may be requested, its host in ASCII, illegal characters escaped, its fragment dropped.

    For schemes other than http and https only the text can be checked: an operator who adds one trusts the hosts
    its file system connects to. Any scheme passes where *schemes* is None.

    Raises:
        ForbiddenUrl: Not one of *schemes*; a chain (``zip::…``); credentials in the URL; no host, or one that
            ``check_host`` refuses; control characters.
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
    allowed = None if schemes is None else tuple(schemes)
    if not parts.scheme or (allowed is not None and parts.scheme not in allowed):
        raise ForbiddenUrl(f"its scheme is not one of {', '.join(allowed or sorted(HTTP))}")
    if parts.scheme not in HTTP:
        if not (parts.netloc or parts.path.strip("/")):
            raise ForbiddenUrl("it names no file")
        return url
    if "@" in parts.netloc:
        raise ForbiddenUrl("it carries credentials")
    if not host:
        raise ForbiddenUrl("it has no host")
    return f"{_origin(parts.scheme, parts.netloc, host, port)}{_escaped(parts.path or '/', parts.query)}"


def check_request(file: UrlFile | GraphqlFile, schemes: Iterable[str] | None) -> str:
    """
    ``check_url`` of the file's URL, and of what is sent along with it.

    Raises:
        ForbiddenUrl: A header that is not the owner's to set; a method or headers for what is not http; a query
            to what is not http.
    """
    url = check_url(file.url, schemes)
    if scheme_of(url) not in HTTP:
        if isinstance(file, GraphqlFile):
            raise ForbiddenUrl("its scheme is not http or https")
        if file.headers or file.method != "GET":
            raise ForbiddenUrl("it has a method or headers, which only http and https know")
    for name in file.headers:
        if name.lower() in _NOT_THE_OWNERS or name.lower().startswith(("proxy-", "sec-")):
            raise ForbiddenUrl("it sets a header that is not its owner's to set")
    return url


def _escaped(path: str, query: str) -> str:
    return quote(f"{path}?{query}" if query else path, safe=_LEGAL).replace("#", "%23")


def _origin(scheme: str, netloc: str, host: str, port: int | None) -> str:
    try:
        origin = URL.build(scheme=scheme, host=host, port=port).origin()
    except ValueError:
        origin = None
    if origin is None or ("[" in netloc and not _IPV6_AND_PORT.fullmatch(netloc)):
        raise ForbiddenUrl("its host or port is not valid")
    check_host(origin.raw_host or "")
    # Digits and dots of other scripts have become an address on the way here.
    if not host.isascii() and _LIKE_AN_ADDRESS.search(origin.raw_host or ""):
        raise ForbiddenUrl(_DISGUISED)
    return str(origin)


_DISGUISED: Final = "its host is an address that is not spelt as one"


def check_host(host: str) -> None:
    """
    Whether a host in ASCII, in lower case and without brackets is a name or an address, and cannot be taken for what it
    is not: ``2130706433``, ``127.1`` and ``0177.0.0.1`` are loopback to some, names to others.

    Raises:
        ForbiddenUrl
    """
    if _LIKE_AN_ADDRESS.search(host) and ":" not in host:
        if not _is_address(host):
            raise ForbiddenUrl(_DISGUISED)
    elif "%" in host or not (_NAME.fullmatch(host) or _is_address(host)):
        raise ForbiddenUrl("its host or port is not valid")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
