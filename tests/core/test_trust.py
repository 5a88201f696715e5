"""Who may use an asset and what may run on it: every code, and where it is not given."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from blocks.assets import ComputeRules, Container, Credentials
from flows.trust import (
    algorithm_refusal,
    consumer_may,
    container_checksum,
    container_refusal,
    files_checksum,
)

ALICE = "0xC41808BBef371AD5CFc76466dDF9dEe228d2BdAA"
BOB = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"
DID = "did:op:01"
FILES = "ab" * 32
CONTAINER = "cd" * 32


def addresses(*values: str) -> dict[str, Any]:
    return {"type": "address", "values": list(values)}


@pytest.mark.parametrize(
    ("credentials", "may"),
    [
        ({}, True),
        ({"allow": [], "deny": []}, True),
        ({"allow": None, "deny": None}, True),
        ({"allow": [addresses()]}, True),
        ({"allow": [addresses(ALICE)]}, True),
        ({"allow": [addresses(ALICE.lower())]}, True),
        ({"allow": [addresses(BOB), addresses(ALICE)]}, True),
        ({"allow": [addresses("*")]}, True),
        ({"allow": [addresses(BOB)]}, False),
        ({"deny": [addresses(ALICE.upper().replace("X", "x"))]}, False),
        ({"deny": [addresses("*")]}, False),
        ({"deny": [addresses(BOB)]}, True),
        ({"allow": [addresses(ALICE)], "deny": [addresses(ALICE)]}, False),
        ({"allow": [{"type": "membership", "values": [ALICE]}]}, False),
        ({"allow": [{"type": "membership", "values": ["gold"]}, addresses(ALICE)]}, True),
        ({"deny": [{"type": "membership", "values": [ALICE]}]}, True),
    ],
)
def test_who_may_use_an_asset(credentials: dict[str, Any], may: bool) -> None:
    """Deny wins; an allow list has to name the address; what cannot be checked lets nobody in."""
    assert may == consumer_may(Credentials.model_validate(credentials), ALICE)


def test_nobody_in_particular() -> None:
    """Without an address one may use what is open to everybody, and nothing else."""
    assert consumer_may(Credentials(), "")
    assert not consumer_may(Credentials.model_validate({"allow": [addresses(ALICE)]}), "")


def refusal(rules: dict[str, Any], *, deny_unlisted: bool = False, **changes: Any) -> str | None:
    asked = {"did": DID, "publisher": ALICE, "files_checksum": FILES, "container_checksum": CONTAINER, **changes}
    return algorithm_refusal(ComputeRules.model_validate(rules), deny_unlisted=deny_unlisted, **asked)


def trusting(*entries: dict[str, Any], publishers: list[str] | None = None) -> dict[str, Any]:
    return {"publisherTrustedAlgorithms": list(entries), "publisherTrustedAlgorithmPublishers": publishers}


@pytest.mark.parametrize("deny_unlisted", [False, True])
def test_raw_code(deny_unlisted: bool) -> None:
    """Runs where the owner says so, whatever lists there are."""
    assert "no_raw_algo_allowed" == refusal({}, did=None, deny_unlisted=deny_unlisted)
    assert "no_raw_algo_allowed" == refusal(trusting(publishers=["*"]), did=None, deny_unlisted=deny_unlisted)
    assert refusal({"allowRawAlgorithm": True}, did=None, deny_unlisted=deny_unlisted) is None


@pytest.mark.parametrize("rules", [{}, trusting(), {"publisherTrustedAlgorithms": None}])
def test_no_lists(rules: dict[str, Any]) -> None:
    """Any published algorithm runs, or none, as the operator has set it."""
    assert refusal(rules) is None
    assert "not_trusted_algo" == refusal(rules, deny_unlisted=True)


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        (trusting(publishers=[ALICE]), None),
        (trusting(publishers=[ALICE.lower(), BOB]), None),
        (trusting(publishers=["*"]), None),
        (trusting(publishers=[BOB]), "not_trusted_algo_publisher"),
        (trusting({"did": DID}), None),
        (trusting({"did": "*"}), None),
        (trusting({"did": "did:op:02"}), "not_trusted_algo"),
        # Both lists: both have to name it.
        (trusting({"did": DID}, publishers=[ALICE]), None),
        (trusting({"did": DID}, publishers=[BOB]), "not_trusted_algo_publisher"),
        (trusting({"did": "did:op:02"}, publishers=[ALICE]), "not_trusted_algo"),
        # One entry without a did spoils the list.
        (trusting({"filesChecksum": FILES}), "no_publisherTrustedAlgorithms"),
        (trusting({"did": DID}, {"filesChecksum": FILES}), "no_publisherTrustedAlgorithms"),
        (trusting({"did": ""}), "no_publisherTrustedAlgorithms"),
        # Checksums.
        (trusting({"did": DID, "filesChecksum": FILES.upper(), "containerSectionChecksum": CONTAINER}), None),
        (trusting({"did": DID, "filesChecksum": "", "containerSectionChecksum": None}), None),
        (trusting({"did": "*", "filesChecksum": "*", "containerSectionChecksum": "*"}), None),
        (trusting({"did": DID, "filesChecksum": "00"}), "algorithm_file_checksum_mismatch"),
        (trusting({"did": "*", "filesChecksum": "00"}), "algorithm_file_checksum_mismatch"),
        (trusting({"did": DID, "containerSectionChecksum": "00"}), "algorithm_container_checksum_mismatch"),
        (
            trusting({"did": DID, "filesChecksum": FILES, "containerSectionChecksum": "00"}),
            "algorithm_container_checksum_mismatch",
        ),
        # Two versions of one algorithm are trusted.
        (trusting({"did": DID, "filesChecksum": "00"}, {"did": DID, "filesChecksum": FILES}), None),
        (trusting({"did": DID, "filesChecksum": FILES}, {"did": DID, "filesChecksum": "00"}), None),
        # What is said of this one goes before what is said of any.
        (trusting({"did": "*"}, {"did": DID, "filesChecksum": "00"}), "algorithm_file_checksum_mismatch"),
    ],
)
@pytest.mark.parametrize("deny_unlisted", [False, True])
def test_published_algorithms(rules: dict[str, Any], code: str | None, deny_unlisted: bool) -> None:
    """The lists of the data set decide; what the operator has set for data sets without lists does not count."""
    assert code == refusal(rules, deny_unlisted=deny_unlisted)


def test_what_is_not_known_does_not_match() -> None:
    """A checksum that was asked for and could not be made is a mismatch; so is a publisher nobody knows."""
    listed = trusting({"did": DID, "filesChecksum": FILES, "containerSectionChecksum": CONTAINER})
    assert "algorithm_file_checksum_mismatch" == refusal(listed, files_checksum=None)
    assert "algorithm_container_checksum_mismatch" == refusal(listed, container_checksum=None)
    assert "not_trusted_algo_publisher" == refusal(trusting(publishers=[""]), publisher=None)


def test_checksums_as_publishers_make_them() -> None:
    """One digest per file, in their order; entrypoint and image checksum together, prefix included."""
    first, second = (hashlib.sha256(body).hexdigest() for body in (b"one", b"two"))
    assert first + second == files_checksum([first.upper(), second])
    assert "" == files_checksum([])
    expected = hashlib.sha256(b"python3 $ALGOsha256:00").hexdigest()
    assert expected == container_checksum("python3 $ALGO", "sha256:00")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"tag": "3.12"}, None),
        ({"entrypoint": ""}, "missing_entrypoint_image_checksum"),
        ({"image": ""}, "missing_entrypoint_image_checksum"),
        ({"checksum": ""}, "missing_entrypoint_image_checksum"),
        ({"checksum": "ab" * 32}, "checksum_prefix"),
        ({"checksum": "md5:" + "ab" * 16}, "checksum_prefix"),
        ({"checksum": "sha256:" + "ab" * 31}, "checksum_prefix"),
        ({"checksum": "sha256:" + "ab" * 32 + "\n"}, "checksum_prefix"),
    ],
)
def test_containers(changes: dict[str, str], code: str | None) -> None:
    """An algorithm's image is given by checksum, in full."""
    container = {"entrypoint": "python3 $ALGO", "image": "python", "checksum": "sha256:" + "ab" * 32, **changes}
    assert code == container_refusal(Container.model_validate(container))
