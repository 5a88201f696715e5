"""
Who may use an asset, and which algorithm may run on a data set. Pure; contract, sections 6 and 7.

Both questions are answered as the original Provider answers them, except where a comment says otherwise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from typing import Final

from blocks.assets import ComputeRules, Container, Credential, Credentials, TrustedAlgorithm

ANY: Final = "*"
"""In a list of addresses or algorithms, and as a checksum: whichever. Newer assets write it so."""

_CHECKSUM: Final = re.compile(r"sha256:[0-9a-fA-F]{64}")


def consumer_may(credentials: Credentials, address: str) -> bool:
    """
    Whether *address* may use an asset.

    An address that is denied may not, whatever else is said of it: the original asks the deny list only where
    there is no allow list. An allow list that names addresses has to name this one. One that asks for nothing
    but other credentials lets nobody in, because they cannot be checked here; the original lets everybody in.
    """
    address = address.lower()
    denied = _addresses(credentials.deny)
    if address in denied or ANY in denied:
        return False
    if allowed := _addresses(credentials.allow):
        return address in allowed or ANY in allowed
    return all(_is_address(credential) for credential in credentials.allow)


def _addresses(credentials: Iterable[Credential]) -> frozenset[str]:
    return frozenset(value for credential in credentials if _is_address(credential) for value in credential.values)


def _is_address(credential: Credential) -> bool:
    return credential.type.lower() == "address"


def algorithm_refusal(
    rules: ComputeRules,
    *,
    did: str | None,
    publisher: str | None,
    files_checksum: str | None,
    container_checksum: str | None,
    deny_unlisted: bool,
) -> str | None:
    """
    The code under which an algorithm is refused, or None if it may run.

    *did* is None for raw code; *publisher* owns the algorithm's NFT. Where a data set lists both publishers and
    algorithms, **both** have to name this one: the second list narrows the first, as in the original. The
    checksums are those of ``files_checksum`` and ``container_checksum``, None where they are not known; they
    count only where the list gives one.
    """
    if did is None:
        return None if rules.allow_raw_algorithm else "no_raw_algo_allowed"
    if not rules.trusted_publishers and not rules.trusted_algorithms:
        return "not_trusted_algo" if deny_unlisted else None
    if rules.trusted_publishers and not _names(rules.trusted_publishers, publisher):
        return "not_trusted_algo_publisher"
    if rules.trusted_algorithms:
        return _unlisted_refusal(rules.trusted_algorithms, did, files_checksum, container_checksum)
    return None


def _names(publishers: Collection[str], publisher: str | None) -> bool:
    return ANY in publishers or (publisher is not None and publisher.lower() in publishers)


def _unlisted_refusal(
    trusted: Collection[TrustedAlgorithm], did: str, files: str | None, container: str | None
) -> str | None:
    if not all(entry.did for entry in trusted):
        return "no_publisherTrustedAlgorithms"
    # What is said of this very algorithm goes before what is said of any: else a checksum could not be asked
    # of one of them.
    entries = [entry for entry in trusted if entry.did == did] or [entry for entry in trusted if entry.did == ANY]
    if not entries:
        return "not_trusted_algo"
    # Several entries for one algorithm are several versions that are trusted; the original knows the last only.
    refusals = [_checksum_refusal(entry, files, container) for entry in entries]
    return None if None in refusals else refusals[-1]


def _checksum_refusal(entry: TrustedAlgorithm, files: str | None, container: str | None) -> str | None:
    if not _matches(entry.files_checksum, files):
        return "algorithm_file_checksum_mismatch"
    if not _matches(entry.container_checksum, container):
        return "algorithm_container_checksum_mismatch"
    return None


def _matches(wanted: str | None, found: str | None) -> bool:
    return not wanted or wanted == ANY or (found is not None and wanted.lower() == found.lower())


def files_checksum(per_file_sha256: Iterable[str]) -> str:
    """``filesChecksum`` of an algorithm: the SHA-256 of each file's content, in hex, one after the other."""
    return "".join(per_file_sha256).lower()


def container_checksum(entrypoint: str, checksum: str) -> str:
    """``containerSectionChecksum`` of an algorithm; *checksum* is that of its image, prefix and all."""
    return hashlib.sha256(f"{entrypoint}{checksum}".encode()).hexdigest()


def container_refusal(container: Container) -> str | None:
    """
    The code under which an algorithm's container is refused, or None.

    The image has to be given by checksum: a tag can be pointed at other code after the algorithm was trusted.
    """
    if not (container.entrypoint and container.image and container.checksum):
        return "missing_entrypoint_image_checksum"
    return None if _CHECKSUM.fullmatch(container.checksum) else "checksum_prefix"
