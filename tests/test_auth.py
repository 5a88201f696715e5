"""Signatures in the Provider's scheme, with real keys."""

from __future__ import annotations

import pytest

from api.auth import provider_signer
from flows.errors import BadSignature
from tests.factories import PROVIDER, sign

MESSAGE = "0xC41808BBef371AD5CFc76466dDF9dEe228d2BdAA1644317370"
ADDRESS = PROVIDER.address.lower()
_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def test_the_signer_is_found() -> None:
    """EIP-191 over the keccak of the message; with 0x or without, in any case."""
    signature = sign(PROVIDER, MESSAGE)
    assert ADDRESS == provider_signer(MESSAGE, signature)
    assert ADDRESS == provider_signer(MESSAGE, signature[2:].upper())


def test_a_message_in_any_script_is_utf8() -> None:
    """As every client encodes it."""
    assert ADDRESS == provider_signer("größe 文件", sign(PROVIDER, "größe 文件"))


@pytest.mark.parametrize("base", [0, 27])
def test_both_ways_to_write_the_last_byte_are_read(base: int) -> None:
    """0 and 1, or 27 and 28."""
    raw = bytes.fromhex(sign(PROVIDER, MESSAGE)[2:])
    assert ADDRESS == provider_signer(MESSAGE, (raw[:-1] + bytes([base + raw[-1] - 27])).hex())


@pytest.mark.parametrize("last", [2, 3, 26, 29, 35, 36, 255])
def test_any_other_last_byte_is_refused(last: int) -> None:
    """Libraries read some of them as a chain's number."""
    with pytest.raises(BadSignature):
        provider_signer(MESSAGE, sign(PROVIDER, MESSAGE)[:-2] + f"{last:02x}")


def test_another_message_gives_another_address() -> None:
    """So it is the list of providers that refuses it."""
    assert ADDRESS != provider_signer(MESSAGE + "0", sign(PROVIDER, MESSAGE))


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "0x",
        "0x00110011",
        "0x" + "0" * 130,
        "0x" + "f" * 128 + "1b",
        "0x" + "0" * 64 + "1" * 64 + "1b",
        "0x" + "1" * 64 + f"{_ORDER:064x}" + "1b",
        "0x" + "1" * 129,
        "0x" + "1" * 132,
        "0x" + "g" * 130,
        " 0x" + "1" * 128 + "1b",
        "0x" + "１" * 130,
    ],
)
def test_what_is_no_signature_is_refused(signature: str) -> None:
    """Never a fault of ours, whatever it is."""
    with pytest.raises(BadSignature, match="Failed to recover address"):
        provider_signer(MESSAGE, signature)
