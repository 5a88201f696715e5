"""
Parts of one file over HTTP: which answers can be asked for parts, and whether a part is one of the same file. Pure.

Source: RFC 9110, 8.8 (validators), 13.1.5 (If-Range), 14 (ranges).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Final

_STRONG: Final = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.IGNORECASE)

# An owner who sets one of these has a say in what comes back that a range of ours would take away.
_CONDITIONS: Final = frozenset(
    {"range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since"}
)


def validator(headers: Mapping[str, str]) -> str | None:
    """
    What If-Range may be sent to tell this very content; *headers* are of the answer, names in any case of letters.

    A strong ETag, or a Last-Modified that lies a second before the answer: an earlier one could be that of two contents
    of the same second. None: there is none, and two answers cannot be told apart.
    """
    tag = headers.get("ETag")
    if tag is not None:
        # One that has only a weak tag says itself that equal tags may name different bytes.
        return tag if _STRONG.fullmatch(tag) else None
    modified, sent = headers.get("Last-Modified"), headers.get("Date")
    if not modified or not sent:
        return None
    try:
        apart = (parsedate_to_datetime(sent) - parsedate_to_datetime(modified)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return modified if apart >= 1 else None


def conditional(names: Iterable[str]) -> bool:
    """Whether a request with headers of these *names* asks for less than a whole file, or under conditions."""
    return any(name.lower() in _CONDITIONS for name in names)


def is_part(content_range: str | None, start: int, end: int, size: int) -> bool:
    """Whether a Content-Range tells the bytes from *start* to before *end*, of *size* in all."""
    told = _CONTENT_RANGE.fullmatch(content_range or "")
    return told is not None and (int(told[1]), int(told[2]) + 1, int(told[3])) == (start, end, size)
