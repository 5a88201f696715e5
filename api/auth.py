"""Who is calling: addresses out of signatures, and the gate before the operator API."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from eth_account import Account
from eth_account.messages import encode_defunct
from eth_keys.exceptions import BadSignature as NoSuchPoint
from eth_utils.crypto import keccak
from eth_utils.exceptions import ValidationError as NoSuchNumber
from fastapi.requests import Request
from starlette.concurrency import run_in_threadpool

from api.nonces import Nonces
from api.settings import Settings, is_loopback
from flows.errors import BadSignature, InvalidParameter, NotAllowed

_SIGNATURE: Final = re.compile(r"(?:0x)?([0-9a-fA-F]{130})")
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")
_LAST_BYTES: Final = frozenset({0, 1, 27, 28})
_FORWARDED: Final = frozenset({"forwarded", "x-forwarded-for", "x-real-ip"})
"""With one of these a proxy speaks for somebody who may be anywhere."""


def provider_signer(message: str, signature: str) -> str:
    """
    The address, in lower case, whose key signed *message* in the Provider scheme: EIP-191 over the 32 bytes of
    the message's keccak. Contract, section 5.

    A signature over another message gives some other address, not an error.

    Raises:
        BadSignature: This is no signature at all.
    """
    written = _SIGNATURE.fullmatch(signature)
    if written is None:
        raise BadSignature
    raw = bytes.fromhex(written[1])
    # eth_account reads any last byte from 35 on as a chain's; only these four are in use here.
    if raw[-1] not in _LAST_BYTES:
        raise BadSignature
    try:
        address = Account.recover_message(encode_defunct(primitive=keccak(text=message)), signature=raw)
    except (NoSuchPoint, NoSuchNumber, ValueError):
        raise BadSignature from None
    return str(address).lower()


@dataclass(frozen=True)
class Caller:
    """*address* is None for a caller that has not signed."""

    address: str | None
    admin: bool


ANONYMOUS: Final = Caller(address=None, admin=False)


@dataclass(frozen=True)
class OperatorGate:
    """
    Lets providers and admins use the operator API by signature; with no list of providers, everybody on this
    machine without. A right comes from a signature and an unused nonce, never from where the call came from.
    """

    settings: Settings
    nonces: Nonces

    def admit(self, request: Request) -> None:
        """
        Without a list of providers: this machine only, and no page in a browser of this machine either. A page
        may post blindly to 127.0.0.1, and by a DNS name of its own that points here even read the answers.

        Raises:
            NotAllowed
        """
        if not self.settings.open_to_loopback_only:
            return
        peer = request.client.host if request.client else ""
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if not is_loopback(peer) or not is_loopback(_name_in(host)) or not _FORWARDED.isdisjoint(request.headers):
            raise NotAllowed("Without a list of providers the operator API answers this machine only")
        foreign_origin = origin is not None and urlsplit(origin).netloc != host
        if foreign_origin or request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise NotAllowed("Without a list of providers the operator API answers no other site's pages")

    async def caller(self, *, owner: str, job_id: str, signature: str, nonce: str) -> Caller:
        """
        Who signed ``owner + [job_id] + nonce``; absent parts are empty. Uses the nonce up.

        Raises:
            BadSignature, NotAllowed, ReplayedNonce
            InvalidParameter: The owner is no address. Of a run of characters without separators, another owner
                and another nonce could be made; a part of known length rules that out.
        """
        if owner and not _ADDRESS.fullmatch(owner):
            raise InvalidParameter("owner: in a signed call it must be an address, 0x and 40 hex digits")
        signer = await run_in_threadpool(provider_signer, f"{owner}{job_id}{nonce}", signature)
        sequence = signer
        known = self.settings.providers | self.settings.admins
        if signer not in known and (owner or job_id):
            # The form the original checked by mistake: the nonce is not signed. It counts in a sequence of its
            # own, else whoever sees one such signature could use up all nonces of that address.
            earlier = await run_in_threadpool(provider_signer, f"{owner}{job_id}", signature)
            if earlier in known:
                signer, sequence = earlier, f"{earlier} nonce not signed"
        if self.settings.providers and signer not in known:
            raise NotAllowed(f"{signer} signed owner + [jobId] + nonce and is not on the list of providers")
        await self.nonces.accept(sequence, nonce)
        return Caller(address=signer, admin=signer in self.settings.admins)


def _name_in(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
