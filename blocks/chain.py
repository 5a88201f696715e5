"""
Orders on an EVM chain: what a transaction has bought, read from the node; contract, section 7.

Only reads. Whatever a node or a contract answers may be written by a stranger: it is compared and counted here,
and never quoted. An event counts only if the contract it is about has emitted it; every contract can emit events
that look the same.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from hashlib import sha256
from typing import Annotated, Any, Final, TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
from eth_abi.exceptions import DecodingError
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_keys.exceptions import BadSignature as NoSuchPoint
from eth_typing import HexStr
from eth_utils.exceptions import ValidationError as NoSuchNumber
from hexbytes import HexBytes
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_core import from_json
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_fixed,
    wait_random_exponential,
)
from web3 import AsyncWeb3
from web3.contract.async_contract import AsyncContract, AsyncContractFunction
from web3.exceptions import (
    BadFunctionCallOutput,
    ContractLogicError,
    InvalidEventABI,
    LogTopicError,
    MismatchedABI,
    TransactionNotFound,
    Web3Exception,
)
from web3.providers.async_base import AsyncJSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from blocks.assets import ACTIVE, UNLISTED, Asset, AssetService
from blocks.files import Address

ZERO_ADDRESS: Final = "0x" + "00" * 20
ONE_TOKEN: Final = 10**18
"""Of any datatoken, in its smallest units."""

USABLE_STATES: Final = frozenset({ACTIVE, UNLISTED})
"""
``metaDataState`` of an NFT whose services may be used, as the contract says it now; a document may be older.
The others: 1 end of life, 2 deprecated, 3 revoked, 4 ordering disabled for now.
"""

BLOCK_SECONDS: Final = 90
"""How far a block's timestamp may be from the time; the original Provider grants as much †."""

_TX_ID: Final = re.compile(r"0x[0-9a-fA-F]{64}")
_LARGEST_ANSWER: Final = 2 * 1024 * 1024
"""Bytes. An order for fifty services takes a quarter; decoding holds up the event loop."""
_LONGEST_PROVIDER_DATA: Final = 4_096
_MOST_REUSES: Final = 4
_THE_TOKEN: Final = 1
"""Id of the one token of an asset's NFT; who owns it owns the asset."""
_MOST_TOKENS: Final = 8
_POLL_SECONDS: Final = 0.5
_LAST_MOMENT: Final = 2**53

SignHash = Callable[[bytes], tuple[int, bytes, bytes]]
"""Signs a digest of 32 bytes as EIP-191 with the provider's key: v, and r and s of 32 bytes."""

T = TypeVar("T")


class ChainUnavailable(Exception):
    """The node does not answer, or nothing that makes sense, or for another chain. Never names the node's URL."""


class OrderInvalid(Exception):
    """A transaction is not the order it would have to be. *reason* is a sentence that quotes nothing."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class ChainConfig(BaseModel):
    """A chain on which orders are taken."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    id: Annotated[int, Field(gt=0)]
    rpc: SecretStr
    """HTTP URL of the node; such URLs carry keys."""
    fee_token: Address = ZERO_ADDRESS
    """ERC20 in which fees are paid; the zero address takes none."""
    factory: Address | None = None
    """
    Ocean's ERC721Factory. With it, only what it has created is accepted. Without it, whoever fills the catalogue is
    trusted with that: a data set's owner can write contracts that claim the provider's fee was paid.
    """
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """A single request may take."""
    attempts: Annotated[int, Field(ge=1)] = 3
    """For each request."""
    patience: Annotated[float, Field(ge=0)] = 5.0
    """Seconds a transaction is waited for that is not mined yet, or that the node has not heard of."""

    @field_validator("rpc")
    @classmethod
    def _http(cls, rpc: SecretStr) -> SecretStr:
        try:
            parts = urlsplit(rpc.get_secret_value())
            usable = parts.scheme in {"http", "https"} and bool(parts.hostname)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("must be an http or https URL")
        return rpc


@dataclass(frozen=True)
class Order:
    """What a transaction has bought. Ids and addresses in lower case."""

    tx_id: str
    """The transaction asked about; it has paid the provider's fee."""
    start_tx_id: str
    """The transaction of ``OrderStarted``; another one if *tx_id* has reused an order."""
    consumer: str
    payer: str
    datatoken: str
    service_index: int
    timestamp: int
    """Unix time of the order, or of its reuse."""
    fee_amount: int
    """In smallest units of *fee_token*."""
    fee_token: str
    fee_valid_until: int
    """Unix time; 0 is for ever."""
    fee_seconds: int | None
    """What was bought: whole seconds from the offer of the fee to its end; None where it has no end."""
    environment: str | None

    def has_paid(self, amount: int, token: str) -> bool:
        """Whether the fee covers *amount* smallest units of *token*."""
        if amount <= 0:
            return True
        # A fee in no token is announced by the contract, and paid by nobody.
        return self.fee_token == token.lower() and token != ZERO_ADDRESS and self.fee_amount >= amount


@dataclass(frozen=True)
class Ordered:
    """Which service of which asset a transaction has ordered. Addresses in lower case."""

    nft: str
    datatoken: str
    service_index: int
    consumer: str


def did_of(nft_address: str, chain_id: int) -> str:
    """The DID of the asset whose NFT this is, as Ocean v4 defines it. Raises: ValueError for no address."""
    return "did:op:" + sha256(f"{AsyncWeb3.to_checksum_address(nft_address)}{chain_id}".encode()).hexdigest()


def fee_digest(provider_data: bytes, address: str, token: str, amount: int, valid_until: int) -> bytes:
    """The 32 bytes a provider signs (as EIP-191) for a fee; what the datatoken contract checks."""
    return bytes(
        AsyncWeb3.solidity_keccak(
            ["bytes", "address", "address", "uint256", "uint256"],
            [
                provider_data,
                AsyncWeb3.to_checksum_address(address),
                AsyncWeb3.to_checksum_address(token),
                amount,
                valid_until,
            ],
        )
    )


def digest_signer(digest: bytes, v: int, r: bytes, s: bytes) -> str | None:
    """Address in lower case whose key signed the 32 bytes as EIP-191; None if this is no signature."""
    try:
        vrs = (v, int.from_bytes(r, "big"), int.from_bytes(s, "big"))
        return str(Account.recover_message(encode_defunct(primitive=digest), vrs=vrs)).lower()
    except (NoSuchPoint, NoSuchNumber, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class _Log:
    address: str
    topic: bytes
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class _Receipt:
    tx_id: str
    block: HexBytes
    succeeded: bool
    logs: tuple[_Log, ...]

    def of(self, contract: str) -> tuple[_Log, ...]:
        return tuple(log for log in self.logs if log.address == contract)


@dataclass(frozen=True)
class _Fee:
    amount: int
    token: str
    valid_until: int
    data: Mapping[str, Any]

    @property
    def signed_at(self) -> float | None:
        moment = self.data.get("timestamp")
        usable = isinstance(moment, int | float) and not isinstance(moment, bool) and 0 < moment < _LAST_MOMENT
        return float(cast(float, moment)) if usable else None

    @property
    def seconds(self) -> int | None:
        """Both ends are signed, so this is the same whenever it is asked; None where one of them is missing."""
        if not self.valid_until or self.signed_at is None:
            return None
        return max(0, math.floor(self.valid_until - self.signed_at))

    @property
    def environment(self) -> str | None:
        named = self.data.get("environment")
        return named if isinstance(named, str) else None


class _NotYet(Exception):
    """A transaction without a receipt."""


class _NoAnswer(Exception):
    """A contract that does not understand the call, or an address without one."""


class _Garbage(ValueError):
    """An answer that is none."""


_ANSWERS: Final = (TransactionNotFound, ContractLogicError, BadFunctionCallOutput)
"""What web3 raises where the node has answered well, so that asking again is no use."""

# Formatters and decoders are handed whatever the node sends, and raise as they please.
_FAULTS: Final = (
    aiohttp.ClientError,
    Web3Exception,
    DecodingError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


class _Node(AsyncJSONBaseProvider):
    """
    JSON-RPC over HTTP.

    web3's own provider reads answers of any size, follows redirects, and logs its URL and all that comes back.
    And off-chain look-ups are on in it: a contract, thus any stranger, could make us fetch from URLs it names.
    """

    global_ccip_read_enabled = False

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self._config = config
        self._session: aiohttp.ClientSession | None = None

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self._config.seconds),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Content-Type": "application/json"},
            )
        request = self._session.post(
            self._config.rpc.get_secret_value(), data=self.encode_rpc_request(method, params), allow_redirects=False
        )
        body = bytearray()
        async with request as response:
            if response.status != 200:
                raise _Garbage
            async for chunk in response.content.iter_chunked(64 * 1024):
                body += chunk
                if len(body) > _LARGEST_ANSWER:
                    raise _Garbage
        answer = _json(bytes(body))
        if not isinstance(answer, dict):
            raise _Garbage
        return cast(RPCResponse, answer)

    async def disconnect(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


class Chain:
    """
    One chain, asked through one node. For one event loop; what it keeps open is closed by ``close``.

    Args:
        provider: Address to whom fees are paid, and whose signature they carry.
        now: The time, in Unix seconds.
    """

    def __init__(self, config: ChainConfig, provider: str, now: Callable[[], float] = time.time) -> None:
        self.config = config
        self.provider = provider.lower()
        self._now = now
        self._w3 = AsyncWeb3(_Node(config), middleware=[])
        self._nft_abi = _abi("ERC721Template", "getMetaData", "isDeployed", "ownerOf")
        self._token_abi = _abi(
            "ERC20Template", "getERC721Address", "decimals", "ProviderFee", "OrderStarted", "OrderReused"
        )
        self._factory_abi = _abi("ERC721Factory", "erc721List", "erc20List")
        events = self._w3.eth.contract(abi=self._token_abi).events
        self._events = {name: getattr(events, name)() for name in ("ProviderFee", "OrderStarted", "OrderReused")}
        self._topics = {name: bytes(HexBytes(event.topic)) for name, event in self._events.items()}
        self._checked = False
        self._decimals: int | None = None

    async def close(self) -> None:
        await self._w3.provider.disconnect()

    async def order(
        self,
        *,
        tx_id: str,
        asset: Asset,
        service: AssetService,
        consumer: str,
        environment: str | None,
        allow_expired_fees: bool = False,
        patient: bool = True,
    ) -> Order:
        """
        The order that *tx_id* has placed for *service* of *asset*.

        Args:
            consumer: Who wants to use it; has to be the order's consumer or its payer.
            environment: The fee has to be for it; None does not look.
            allow_expired_fees: For asking whether an order can be reused with a new fee.
            patient: Wait a moment for a transaction that is not mined yet.

        Raises:
            OrderInvalid: There is none, or it does not hold any more.
            ChainUnavailable: Nobody can say.

        Source: contract, section 7.
        """
        _check_tx_id(tx_id)
        if asset.chain_id != self.config.id:
            raise OrderInvalid("The asset is on another chain than the order.")
        receipt = await self._receipt(tx_id, patience=self.config.patience if patient else 0.0)
        await self._check_origin(asset.nft_address, service.datatoken)
        await self._check_state(asset.nft_address)
        fee = await self._fee(receipt, service, environment, allow_expired=allow_expired_fees)
        start, started, reused_at = await self._started(receipt, service.datatoken, service.index)
        own = [event for event in started if consumer.lower() in _parties(event)]
        if not own:
            raise OrderInvalid("The order is neither for this consumer nor paid by it.")
        paid = [event for event in own if event["amount"] >= ONE_TOKEN]
        if not paid:
            raise OrderInvalid("The order is for less than one datatoken.")
        event = max(paid, key=lambda event: int(event["timestamp"]))
        timestamp = int(event["timestamp"]) if reused_at is None else reused_at
        if service.timeout and self._now() - timestamp > service.timeout:
            raise OrderInvalid("The order has expired.")
        return Order(
            tx_id=receipt.tx_id,
            start_tx_id=start.tx_id,
            consumer=str(event["consumer"]).lower(),
            payer=str(event["payer"]).lower(),
            datatoken=service.datatoken,
            service_index=int(event["serviceIndex"]),
            timestamp=timestamp,
            fee_amount=fee.amount,
            fee_token=fee.token,
            fee_valid_until=fee.valid_until,
            fee_seconds=fee.seconds,
            environment=fee.environment,
        )

    async def ordered(self, tx_id: str) -> Ordered:
        """
        What *tx_id* has ordered, or reused an order of, where nothing but the transaction is known.

        Says only what the order is for: whether it holds is told by ``order``, once the asset is known.

        Raises:
            OrderInvalid: Nothing, or more than one service.
            ChainUnavailable
        """
        _check_tx_id(tx_id)
        receipt = await self._receipt(tx_id, patience=self.config.patience)
        started = [(log.address, event) for log, event in self._decoded("OrderStarted", receipt.logs)]
        if not started:
            for log, event in list(self._decoded("OrderReused", receipt.logs))[:_MOST_REUSES]:
                start = await self._reused(bytes(event["orderTxId"]))
                for _, first in self._decoded("OrderStarted", start.of(log.address)):
                    started.append((log.address, first))
        datatokens = {datatoken for datatoken, _ in started}
        if len(datatokens) > _MOST_TOKENS:
            raise OrderInvalid("The transaction orders more than one service.")
        nfts = {datatoken: await self._nft_of(datatoken) for datatoken in datatokens}
        found = {
            Ordered(nft, datatoken, int(event["serviceIndex"]), str(event["consumer"]).lower())
            for datatoken, event in started
            if (nft := nfts[datatoken]) is not None
        }
        if not found:
            raise OrderInvalid("The transaction orders no service of an asset.")
        if len(found) > 1:
            raise OrderInvalid("The transaction orders more than one service.")
        return found.pop()

    async def owner(self, nft: str) -> str | None:
        """
        Who owns the NFT of an asset now, in lower case; None if there is no such NFT, or none of the factory's where
        there is one to ask: any contract can say that it is owned by somebody well known.

        Raises:
            ChainUnavailable
        """
        await self._check_chain()
        try:
            contract = self._contract(nft, self._nft_abi)
            if not await self._is_factorys(contract.address):
                return None
            return str(await self._call(contract.functions.ownerOf(_THE_TOKEN))).lower()
        except (_NoAnswer, ValueError):
            return None

    async def required_fee(self, seconds: float, price_per_minute: Decimal | float) -> int:
        """
        The fee for *seconds*, in the smallest units of the fee token, rounded up.

        Raises:
            ChainUnavailable
            ValueError: Not a number, or below 0.
        """
        exact = Fraction(Decimal(str(seconds))) * Fraction(Decimal(str(price_per_minute))) / 60
        if exact < 0:
            raise ValueError("a fee is not negative")
        if self.config.fee_token == ZERO_ADDRESS or not exact:
            return 0
        if self._decimals is None:
            await self._check_chain()
            token = self._contract(self.config.fee_token, self._token_abi)
            try:
                self._decimals = int(await self._call(token.functions.decimals()))
            except _NoAnswer:
                self._decimals = None
            if self._decimals is None:
                raise ChainUnavailable(f"the fee token of chain {self.config.id} does not tell its decimals")
        return math.ceil(exact * Fraction(10) ** self._decimals)

    def provider_fee(
        self,
        sign_hash: SignHash,
        *,
        datatoken: str,
        service_id: str,
        environment: str | None,
        amount: int,
        valid_until: int,
        now: float,
    ) -> dict[str, str | int]:
        """
        A fee as the Provider answers it and ``startOrder`` takes it; *amount* in smallest units.

        Args:
            valid_until: Unix time; 0 is for ever.
            now: Unix time of this offer: what passes until it is paid is granted on top of *valid_until*.
        """
        data = json.dumps(
            {"environment": environment, "timestamp": now, "dt": datatoken, "id": service_id}, separators=(",", ":")
        ).encode()
        v, r, s = sign_hash(fee_digest(data, self.provider, self.config.fee_token, amount, valid_until))
        return {
            "providerFeeAddress": AsyncWeb3.to_checksum_address(self.provider),
            "providerFeeToken": AsyncWeb3.to_checksum_address(self.config.fee_token),
            # Text: JavaScript's numbers end at 2^53.
            "providerFeeAmount": str(amount),
            "providerData": f"0x{data.hex()}",
            # The contract knows no others.
            "v": v if v >= 27 else v + 27,
            "r": f"0x{r.rjust(32, bytes(1)).hex()}",
            "s": f"0x{s.rjust(32, bytes(1)).hex()}",
            "validUntil": valid_until,
        }

    async def _fee(
        self, receipt: _Receipt, service: AssetService, environment: str | None, *, allow_expired: bool
    ) -> _Fee:
        reason = "The transaction has paid no provider fee for this service."
        fees = []
        for _, event in self._decoded("ProviderFee", receipt.of(service.datatoken)):
            data = _provider_data(event["providerData"])
            if str(data.get("dt")).lower() != service.datatoken or data.get("id") != service.id:
                continue
            if environment is not None and data.get("environment") != environment:
                reason = "The provider fee is for another environment."
            elif str(event["providerFeeAddress"]).lower() != self.provider:
                reason = "The provider fee was paid to another provider."
            elif self._signer(event) != self.provider:
                reason = "The provider fee is not signed by this provider."
            else:
                token = str(event["providerFeeToken"]).lower()
                fees.append(_Fee(int(event["providerFeeAmount"]), token, int(event["validUntil"]), data))
        valid = [fee for fee in fees if allow_expired or await self._holds(fee, receipt)]
        if valid:
            return max(valid, key=lambda fee: fee.amount)
        raise OrderInvalid("The provider fee has expired." if fees else reason)

    async def _holds(self, fee: _Fee, receipt: _Receipt) -> bool:
        """Until when it is valid was said at the offer; the time bought begins with the payment."""
        now = self._now()
        if not fee.valid_until or now < fee.valid_until:
            return True
        if fee.signed_at is None:
            return False
        await self._check_chain()
        paid_at = await self._ask(lambda: self._block_time(receipt.block))
        return now < fee.valid_until + max(0.0, paid_at - fee.signed_at) + BLOCK_SECONDS

    def _signer(self, event: Mapping[str, Any]) -> str | None:
        digest = fee_digest(
            event["providerData"],
            event["providerFeeAddress"],
            event["providerFeeToken"],
            event["providerFeeAmount"],
            event["validUntil"],
        )
        return digest_signer(digest, event["v"], event["r"], event["s"])

    async def _started(
        self, receipt: _Receipt, datatoken: str, service_index: int
    ) -> tuple[_Receipt, list[Mapping[str, Any]], int | None]:
        """Receipt and ``OrderStarted`` events of an order of the service, and when it was reused, if it was."""
        events = self._starts(receipt, datatoken, service_index)
        if events:
            return receipt, events, None
        reuses = [event for _, event in self._decoded("OrderReused", receipt.of(datatoken))]
        for reuse in reuses[:_MOST_REUSES]:
            start = await self._reused(bytes(reuse["orderTxId"]))
            if events := self._starts(start, datatoken, service_index):
                return start, events, int(reuse["timestamp"])
        raise OrderInvalid("The transaction orders no such service.")

    def _starts(self, receipt: _Receipt, datatoken: str, service_index: int) -> list[Mapping[str, Any]]:
        started = self._decoded("OrderStarted", receipt.of(datatoken))
        return [event for _, event in started if event["serviceIndex"] == service_index]

    async def _reused(self, tx_id: bytes) -> _Receipt:
        try:
            receipt = await self._ask(lambda: self._read_receipt(f"0x{tx_id.hex()}"))
        except (TransactionNotFound, _NotYet):
            receipt = None
        if receipt is None or not receipt.succeeded:
            raise OrderInvalid("The transaction reuses an order that does not exist.")
        return receipt

    async def _check_origin(self, nft: str, datatoken: str) -> None:
        """The datatoken is the NFT's, and both are the factory's if there is one to ask."""
        try:
            genuine = await self._is_deployed(nft, datatoken)
        except (_NoAnswer, ValueError):
            genuine = False
        if not genuine:
            raise OrderInvalid("The service's datatoken does not belong to the asset.")

    async def _is_deployed(self, nft: str, datatoken: str) -> bool:
        """Raises: ValueError where one of them is no address; _NoAnswer; ChainUnavailable."""
        contract = self._contract(nft, self._nft_abi)
        token = AsyncWeb3.to_checksum_address(datatoken)
        if await self._call(contract.functions.isDeployed(token)) is not True:
            return False
        if self.config.factory is None:
            return True
        factory = self._contract(self.config.factory, self._factory_abi)
        return await self._is_factorys(nft) and await self._call(factory.functions.erc20List(token)) is True

    async def _is_factorys(self, nft: str) -> bool:
        """True without a factory. Raises: ValueError for no address; _NoAnswer; ChainUnavailable."""
        if self.config.factory is None:
            return True
        address = AsyncWeb3.to_checksum_address(nft)
        factory = self._contract(self.config.factory, self._factory_abi)
        return str(await self._call(factory.functions.erc721List(address))).lower() == address.lower()

    async def _check_state(self, nft: str) -> None:
        try:
            _, _, state, _ = await self._call(self._contract(nft, self._nft_abi).functions.getMetaData())
        except _NoAnswer:
            state = None
        if state not in USABLE_STATES:
            raise OrderInvalid("The asset is not offered any more.")

    async def _nft_of(self, datatoken: str) -> str | None:
        """The NFT by which the datatoken was deployed; None if it was by none."""
        try:
            token = self._contract(datatoken, self._token_abi)
            nft = str(await self._call(token.functions.getERC721Address())).lower()
            return nft if await self._is_deployed(nft, datatoken) else None
        except _NoAnswer:
            return None

    def _decoded(self, name: str, logs: Iterable[_Log]) -> Iterator[tuple[_Log, Mapping[str, Any]]]:
        """The events of that name among *logs*, with their arguments; what only looks like one is passed over."""
        for log in logs:
            if log.topic != self._topics[name]:
                continue
            try:
                yield log, self._events[name].process_log(cast(Any, log.raw))["args"]
            except (MismatchedABI, LogTopicError, InvalidEventABI, TypeError, DecodingError):
                continue

    async def _receipt(self, tx_id: str, *, patience: float) -> _Receipt:
        """
        Of a transaction that has succeeded; one that is new is waited for, *patience* seconds.

        Also one the node has not heard of: nodes behind one URL do not all know the same.
        """
        await self._check_chain()
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type((TransactionNotFound, _NotYet)),
                stop=stop_after_delay(patience),
                wait=wait_fixed(min(_POLL_SECONDS, patience)),
                reraise=True,
            ):
                with attempt:
                    receipt = await self._ask(lambda: self._read_receipt(tx_id))
        except (TransactionNotFound, _NotYet):
            receipt = None
        if receipt is None:
            try:
                await self._ask(lambda: self._w3.eth.get_transaction(HexStr(tx_id)))
                reason = "The transaction is not mined yet."
            except TransactionNotFound:
                reason = "There is no such transaction."
            raise OrderInvalid(reason)
        if not receipt.succeeded:
            raise OrderInvalid("The transaction has failed.")
        return receipt

    async def _read_receipt(self, tx_id: str) -> _Receipt:
        raw = await self._w3.eth.get_transaction_receipt(HexStr(tx_id))
        if raw.get("blockHash") is None:
            raise _NotYet
        return _Receipt(
            tx_id=tx_id.lower(),
            block=HexBytes(raw["blockHash"]),
            succeeded=raw["status"] == 1,
            logs=tuple(
                _Log(str(log["address"]).lower(), bytes(log["topics"][0]) if log["topics"] else b"", log)
                for log in raw["logs"]
            ),
        )

    async def _block_time(self, block: HexBytes) -> int:
        return int((await self._w3.eth.get_block(block))["timestamp"])

    async def _check_chain(self) -> None:
        if self._checked:
            return

        async def read() -> int:
            return int(await self._w3.eth.chain_id)

        if await self._ask(read) != self.config.id:
            raise ChainUnavailable(f"the node for chain {self.config.id} is on another chain")
        self._checked = True

    def _contract(self, address: str, abi: Any) -> AsyncContract:
        """Raises: ValueError for no address."""
        return self._w3.eth.contract(address=AsyncWeb3.to_checksum_address(address), abi=abi)

    async def _call(self, function: AsyncContractFunction) -> Any:
        try:
            return await self._ask(function.call)
        except (ContractLogicError, BadFunctionCallOutput):
            pass
        raise _NoAnswer

    async def _ask(self, read: Callable[[], Awaitable[T]]) -> T:
        """
        One read, tried again where that may help.

        Raises:
            ChainUnavailable: Without the cause, whose text may hold the node's URL.
        """
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(lambda fault: isinstance(fault, _FAULTS) and not isinstance(fault, _ANSWERS)),
                stop=stop_after_attempt(self.config.attempts),
                wait=wait_random_exponential(multiplier=0.2, max=1.0),
                reraise=True,
            ):
                with attempt:
                    # aiohttp's own limit ends with the answer; decoding is not in it, nor is a look-up of the host.
                    async with asyncio.timeout(self.config.seconds):
                        return await read()
        except _ANSWERS:
            raise
        except _FAULTS:
            pass
        raise ChainUnavailable(f"the node of chain {self.config.id} does not answer as it should")


def _check_tx_id(tx_id: str) -> None:
    if not _TX_ID.fullmatch(tx_id):
        raise OrderInvalid("This is no transaction id: 0x and 64 hex digits.")


def _parties(event: Mapping[str, Any]) -> set[str]:
    return {str(event["consumer"]).lower(), str(event["payer"]).lower()}


def _provider_data(written: bytes) -> Mapping[str, Any]:
    """What a fee says it is for; empty if it says nothing that can be read."""
    if len(written) > _LONGEST_PROVIDER_DATA:
        return {}
    try:
        data = _json(written)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _json(written: bytes) -> Any:
    """
    Raises: ValueError, also for what is nested too deep.

    Not by the standard library: it recurses on the stack of C up to Python's limit, and packages that eth_account
    imports set that limit to 100 000. Enough brackets in a row ended the process.
    """
    return from_json(written, allow_inf_nan=False)


def artifact(name: str) -> dict[str, Any]:
    """A contract of the package ``ocean-contracts`` as compiled: ``abi``, ``bytecode``."""
    # The package's modules are called just that.
    written = (importlib.resources.files("artifacts") / f"{name}.json").read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(written))


@functools.cache
def _abi(name: str, *entries: str) -> tuple[Mapping[str, Any], ...]:
    """Only *entries* of it: web3 makes a class of each one, for every contract that is asked."""
    return tuple(entry for entry in artifact(name)["abi"] if entry.get("name") in entries)
