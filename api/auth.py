"""Who is calling: addresses out of signatures and tokens, and the gates before the dialects."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from eth_account import Account
from eth_account.messages import SignableMessage, encode_defunct
from eth_keys.exceptions import BadSignature as NoSuchPoint
from eth_utils.crypto import keccak
from eth_utils.exceptions import ValidationError as NoSuchNumber
from fastapi.requests import Request
from starlette.concurrency import run_in_threadpool

from api.nonces import Nonces
from api.settings import Settings, is_loopback
from api.tokens import Tokens
from flows.errors import BadSignature, BadToken, InvalidParameter, NotAllowed

_SIGNATURE: Final = re.compile(r"(?:0x)?([0-9a-fA-F]{130})")
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")
_LAST_BYTES: Final = frozenset({0, 1, 27, 28})
BRIZO_TOKEN_MESSAGE: Final = "Ocean Protocol Authentication"  # noqa: S105 - what is signed, known to all
BRIZO_TOKEN_SECONDS: Final = 86_400
BRIZO_CLOCK_SECONDS: Final = 300
"""How far a client's clock may be ahead of ours."""
_BRIZO_TOKEN: Final = re.compile(r"(0x[0-9a-fA-F]{130})-([0-9]{1,12})")
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
    return _signer(encode_defunct(primitive=keccak(text=message)), signature)


def brizo_signer(message: str, signature: str) -> str:
    """As ``provider_signer``, in Brizo's scheme: plain EIP-191 over the text. Contract, section 5."""
    return _signer(encode_defunct(text=message), signature)


def _signer(signable: SignableMessage, signature: str) -> str:
    written = _SIGNATURE.fullmatch(signature)
    if written is None:
        raise BadSignature
    raw = bytes.fromhex(written[1])
    # eth_account reads any last byte from 35 on as a chain's; only these four are in use here.
    if raw[-1] not in _LAST_BYTES:
        raise BadSignature
    try:
        address = Account.recover_message(signable, signature=raw)
    except (NoSuchPoint, NoSuchNumber, ValueError):
        raise BadSignature from None
    return str(address).lower()


@dataclass(frozen=True)
class Caller:
    """*address*, in lower case, is None for a caller that has not signed."""

    address: str | None
    admin: bool
    sequence: str = ""
    """Where its nonce counts."""
    nonce: str = ""
    """Not yet used up; "" when there is none to use."""
    text: str = ""
    """What it has signed."""


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


@dataclass(frozen=True)
class ConsumerGate:
    """
    Knows consumers of the Provider dialect by a signature in its scheme, or by a token.

    The nonce of a signature counts in the sequence of its address; it is used up by ``use``, which a handler calls
    when all that could still refuse the call for the caller to wait out is done.
    """

    settings: Settings
    nonces: Nonces
    tokens: Tokens

    async def caller(
        self, address: str, message: str, signature: str, nonce: str, *, token: str = "", bare: str = ""
    ) -> Caller:
        """
        That *address* has signed *message* followed by *nonce*; or, without a signature, holds *token*.

        A *nonce* left out means the next one: a client of the original that deletes a job signs it and does not send
        it. A signature over *bare*, where that is given, will do too, its nonce counting in a sequence of its own: a
        client of the original that stops a job signs no more than that. Whatever was signed is good once.

        Raises:
            BadSignature, BadToken, ReplayedNonce, NotReady
        """
        if token and not signature:
            holder = await self.tokens.holder(token)
            if holder != address.lower():
                raise BadToken("The token is another address's")
            return self._caller(holder)
        nonce = nonce or str(await self.nonces.latest(address) + 1)
        signer = address.lower()
        sequence, text = signer, f"{message}{nonce}"
        if await run_in_threadpool(provider_signer, text, signature) != signer:
            sequence, text = f"{signer} nonce not signed", bare
            if not bare or await run_in_threadpool(provider_signer, bare, signature) != signer:
                raise BadSignature("Invalid signature provided.")
        await self.nonces.check(sequence, nonce, text)
        return self._caller(signer, sequence=sequence, nonce=nonce, text=text)

    async def use(self, caller: Caller) -> None:
        """
        Use the caller's nonce up, and what it has signed. Raises: ReplayedNonce, when another call has used either
        meanwhile; NotReady.
        """
        if caller.nonce:
            await self.nonces.accept(caller.sequence, caller.nonce, caller.text)

    async def brizo_caller(self, address: str, message: str, signature: str) -> Caller:
        """
        That *address* has signed *message* in Brizo's scheme, or that *signature* is its auth token. There are no
        nonces in that dialect, so what is signed holds for ever; a token does for ``BRIZO_TOKEN_SECONDS``.

        Raises:
            BadSignature, BadToken
        """
        token = _BRIZO_TOKEN.fullmatch(signature)
        if token is not None:
            age = time.time() - int(token[2])
            if not -BRIZO_CLOCK_SECONDS <= age <= BRIZO_TOKEN_SECONDS:
                raise BadToken("The token has expired; sign a new one")
            message, signature = f"{BRIZO_TOKEN_MESSAGE}\n{token[2]}", token[1]
        if await run_in_threadpool(brizo_signer, message, signature) != address.lower():
            raise BadSignature("The signature is not that of consumerAddress over this call")
        return self._caller(address.lower())

    def _caller(self, address: str, *, sequence: str = "", nonce: str = "", text: str = "") -> Caller:
        admin = address in self.settings.admins
        return Caller(address=address, admin=admin, sequence=sequence, nonce=nonce, text=text)


def _name_in(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
