"""Orders on a chain: a real node, Ocean's real contracts, and people who do not mean well."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from eth_abi.abi import encode
from hexbytes import HexBytes
from pydantic import ValidationError
from web3 import Web3

from blocks.assets import Asset
from blocks.chain import (
    ONE_TOKEN,
    USABLE_STATES,
    ZERO_ADDRESS,
    Chain,
    ChainConfig,
    ChainUnavailable,
    Order,
    OrderInvalid,
    did_of,
    digest_signer,
    fee_digest,
)
from cli.local_chain import Fee, LocalChain, Node, Published, TransactionFailed
from tests.chain import (
    ENVIRONMENT,
    SERVICE,
    Call,
    Log,
    Return,
    Revert,
    asset_of,
    config,
    next_contract,
    order_started_log,
    poke,
    provider_fee_log,
    replace_code,
    run_code,
    signing,
)
from tests.file_server import FileServer

pytestmark = [pytest.mark.anyio, pytest.mark.chain]


@pytest.fixture(autouse=True)
def rolled_back(chain: LocalChain) -> Iterator[None]:
    with chain.rolled_back():
        yield


@pytest.fixture
async def orders(chain: LocalChain) -> AsyncIterator[Chain]:
    """The chain as the service sees it, without fees."""
    async with reading(chain) as orders:
        yield orders


@pytest.fixture
def bought(chain: LocalChain) -> Published:
    """An asset, and its consumer has two datatokens of it."""
    published = chain.publish()
    chain.mint(published.datatoken, chain.consumer.address, 2 * ONE_TOKEN)
    return published


@asynccontextmanager
async def reading(chain: LocalChain, *, now: Callable[[], float] = time.time, **changes: Any) -> AsyncIterator[Chain]:
    """The chain as the service sees it."""
    orders = Chain(config(chain, **changes), chain.provider.address, now)
    yield orders
    await orders.close()


def offer(chain: LocalChain, orders: Chain, published: Published, **changes: Any) -> Fee:
    """A fee of this provider's for the asset."""
    values: dict[str, Any] = {
        "datatoken": published.datatoken.lower(),
        "service_id": SERVICE,
        "environment": ENVIRONMENT,
        "amount": 0,
        "valid_until": chain.now + 3600,
        "now": float(chain.now),
    }
    return orders.provider_fee(signing(chain.provider), **{**values, **changes})


async def check(chain: LocalChain, orders: Chain, tx_id: str, asset: Asset, **changes: Any) -> Order:
    """The order, for the consumer and the environment everything here is about."""
    values: dict[str, Any] = {"consumer": chain.consumer.address, "environment": ENVIRONMENT}
    return await orders.order(tx_id=tx_id, asset=asset, service=asset.services[0], **{**values, **changes})


async def refusal(chain: LocalChain, orders: Chain, tx_id: str, asset: Asset, **changes: Any) -> str:
    with pytest.raises(OrderInvalid) as refused:
        await check(chain, orders, tx_id, asset, **changes)
    return refused.value.reason


async def test_a_paid_order_is_accepted(chain: LocalChain, bought: Published) -> None:
    """What was ordered and paid is told, and the fee has reached the provider."""
    token = chain.new_token(6)
    chain.give(token, chain.consumer.address, 10_000_000)
    async with reading(chain, fee_token=token) as orders:
        amount = await orders.required_fee(90, 2.5)
        fee = offer(chain, orders, bought, amount=amount)
        tx_id = chain.order(bought.datatoken, fee)
        order = await check(chain, orders, tx_id.upper().replace("0X", "0x"), asset_of(bought, chain.chain_id))
    assert 3_750_000 == amount == chain.balance(token, chain.provider.address)
    assert order == Order(
        tx_id=tx_id,
        start_tx_id=tx_id,
        consumer=chain.consumer.address.lower(),
        payer=chain.consumer.address.lower(),
        datatoken=bought.datatoken.lower(),
        service_index=0,
        timestamp=chain.now,
        fee_amount=amount,
        fee_token=token.lower(),
        fee_valid_until=int(fee["validUntil"]),
        fee_seconds=3600,
        environment=ENVIRONMENT,
    )
    assert order.has_paid(amount, token)
    assert order.has_paid(0, ZERO_ADDRESS)
    assert not order.has_paid(amount + 1, token)
    assert not order.has_paid(1, chain.new_token())


async def test_a_fee_in_no_token_is_no_payment(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """The contract announces any amount of the zero address's token, and moves nothing."""
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought, amount=5))
    order = await check(chain, orders, tx_id, asset_of(bought, chain.chain_id))
    assert 5 == order.fee_amount
    assert not order.has_paid(1, ZERO_ADDRESS)


async def test_an_order_can_be_reused(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """Its age counts from the reuse; what was ordered is in the first transaction."""
    asset = asset_of(bought, chain.chain_id, timeout=600)
    first = chain.order(bought.datatoken, offer(chain, orders, bought))
    chain.move_time(500)
    again = chain.reuse(bought.datatoken, first, offer(chain, orders, bought))
    reused_at = chain.now
    async with reading(chain, now=lambda: reused_at + 500) as later:
        assert "The order has expired." == await refusal(chain, later, first, asset)
        order = await check(chain, later, again, asset)
    assert (again, first, reused_at) == (order.tx_id, order.start_tx_id, order.timestamp)


async def test_a_reuse_needs_an_order(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """The contract lets any number be reused: one that is no transaction, one that failed, one of another asset."""
    asset = asset_of(bought, chain.chain_id)
    fee = offer(chain, orders, bought)
    nothing = chain.reuse(bought.datatoken, "0x" + "ab" * 32, fee)
    call = chain.start_order(bought.datatoken, fee, consumer=chain.stranger.address)
    failed = chain.reuse(bought.datatoken, chain.send(call, chain.stranger, mined=False), fee)
    other = chain.publish("other")
    chain.mint(other.datatoken, chain.consumer.address)
    elsewhere = chain.reuse(bought.datatoken, chain.order(other.datatoken, offer(chain, orders, other)), fee)
    assert "reuses an order that does not exist" in await refusal(chain, orders, nothing, asset)
    assert "reuses an order that does not exist" in await refusal(chain, orders, failed, asset)
    assert "orders no such service" in await refusal(chain, orders, elsewhere, asset)


async def test_an_order_expires(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """After the service's timeout; never if that is 0."""
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought, valid_until=0))
    chain.move_time(601)
    async with reading(chain, now=lambda: chain.now) as later:
        assert "The order has expired." == await refusal(
            chain, later, tx_id, asset_of(bought, chain.chain_id, timeout=600)
        )
        await check(chain, later, tx_id, asset_of(bought, chain.chain_id, timeout=602))
        await check(chain, later, tx_id, asset_of(bought, chain.chain_id, timeout=0))


async def test_an_order_is_for_one_service(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """Neither the fee nor the order of one is good for another of the same asset."""
    asset = asset_of(bought, chain.chain_id)
    for_other = chain.order(bought.datatoken, offer(chain, orders, bought, service_id="compute-2"))
    mixed = chain.order(bought.datatoken, offer(chain, orders, bought), service_index=1)
    assert "paid no provider fee for this service" in await refusal(chain, orders, for_other, asset)
    assert "orders no such service" in await refusal(chain, orders, mixed, asset)


async def test_an_order_is_for_one_datatoken(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """The order of a cheap asset does not open a dear one, whatever the fee says it is for."""
    cheap = chain.publish("cheap")
    chain.mint(cheap.datatoken, chain.consumer.address)
    paid_less = chain.order(bought.datatoken, offer(chain, orders, cheap))
    assert "paid no provider fee for this service" in await refusal(
        chain, orders, paid_less, asset_of(bought, chain.chain_id)
    )
    tx_id = chain.order(cheap.datatoken, offer(chain, orders, bought))
    assert "paid no provider fee for this service" in await refusal(
        chain, orders, tx_id, asset_of(bought, chain.chain_id)
    )
    assert "does not belong to the asset" in await refusal(
        chain, orders, tx_id, asset_of(Published(bought.nft, cheap.datatoken, bought.did), chain.chain_id)
    )


async def test_events_of_other_contracts_do_not_count(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """
    A real order whose fee goes to the one who places it, and in the same transaction an event that looks like the
    provider's; and a real fee beside an order that only looks like one.
    """
    asset = asset_of(bought, chain.chain_id)
    offered = offer(chain, orders, bought)
    looks_paid = provider_fee_log(
        signing(chain.provider),
        address=chain.provider.address,
        token=ZERO_ADDRESS,
        amount=0,
        data=bytes(HexBytes(str(offered["providerData"]))),
        valid_until=int(offered["validUntil"]),
    )
    me = chain.consumer.address
    looks_ordered = order_started_log(consumer=me, payer=me, amount=ONE_TOKEN, service_index=0, timestamp=chain.now)

    def data_of(call: Any) -> bytes:
        return bytes(HexBytes(call._encode_transaction_data()))

    poke(chain, chain.stranger.address)  # an account's first contract has an address of another length
    chain.mint(bought.datatoken, next_contract(chain))
    own = Chain(config(chain), chain.stranger.address)
    to_itself = own.provider_fee(
        signing(chain.stranger),
        datatoken=bought.datatoken.lower(),
        service_id=SERVICE,
        environment=ENVIRONMENT,
        amount=0,
        valid_until=0,
        now=0,
    )
    order = data_of(chain.start_order(bought.datatoken, to_itself, consumer=me))
    unpaid = run_code(chain, looks_paid, Call(bought.datatoken, order))
    assert 3 <= len(chain.receipt(unpaid)["logs"]), "the order was really placed"
    assert "paid to another provider" in await refusal(chain, orders, unpaid, asset)

    reuse = chain.datatoken(bought.datatoken).functions.reuseOrder(b"\xab" * 32, _tuple(offered))
    unordered = run_code(chain, Call(bought.datatoken, data_of(reuse)), looks_ordered)
    assert 3 == len(chain.receipt(unordered)["logs"])
    assert "reuses an order that does not exist" in await refusal(chain, orders, unordered, asset)


async def test_a_fee_is_for_one_environment(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """A service that is no computation has none, and does not look."""
    asset = asset_of(bought, chain.chain_id)
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought, environment="small"))
    assert "for another environment" in await refusal(chain, orders, tx_id, asset)
    assert "small" == (await check(chain, orders, tx_id, asset, environment=None)).environment


async def test_consumer_and_payer_may_use_an_order(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """In any case of letters; nobody else may."""
    asset = asset_of(bought, chain.chain_id)
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought), consumer=chain.owner.address)
    for account in (chain.owner, chain.consumer):
        order = await check(chain, orders, tx_id, asset, consumer=account.address.lower())
        assert (chain.owner.address.lower(), chain.consumer.address.lower()) == (order.consumer, order.payer)
    assert "neither for this consumer" in await refusal(chain, orders, tx_id, asset, consumer=chain.stranger.address)


async def test_a_fee_cannot_be_forged(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """The contract refuses a fee in this provider's name; one in the forger's own name is refused here."""
    forged = dict(offer(chain, orders, bought))
    v, r, s = signing(chain.stranger)(b"\x11" * 32)
    with pytest.raises(TransactionFailed):
        chain.order(bought.datatoken, {**forged, "v": v, "r": f"0x{r.hex()}", "s": f"0x{s.hex()}"})
    own = Chain(config(chain), chain.stranger.address)
    fee = own.provider_fee(
        signing(chain.stranger),
        datatoken=bought.datatoken.lower(),
        service_id=SERVICE,
        environment=ENVIRONMENT,
        amount=0,
        valid_until=0,
        now=0,
    )
    tx_id = chain.order(bought.datatoken, fee)
    assert "paid to another provider" in await refusal(chain, orders, tx_id, asset_of(bought, chain.chain_id))


@pytest.mark.parametrize(
    ("tampered", "reason"),
    [
        ({}, None),
        ({"signer": "stranger"}, "not signed by this provider"),
        ({"amount": ONE_TOKEN - 1}, "less than one datatoken"),
        ({"data": b"[" * 4_000}, "no provider fee for this service"),
        ({"padding": 5_000}, "no provider fee for this service"),
        ({"data": b"\xff"}, "no provider fee for this service"),
        ({"data": b"null"}, "no provider fee for this service"),
    ],
)
async def test_a_datatoken_that_lies(
    chain: LocalChain, orders: Chain, bought: Published, tampered: dict[str, Any], reason: str | None
) -> None:
    """Nothing is taken on a contract's word that can be checked, whoever has written the contract."""
    offered = bytes(HexBytes(str(offer(chain, orders, bought)["providerData"])))
    signer = chain.stranger if tampered.get("signer") == "stranger" else chain.provider
    fee = provider_fee_log(
        signing(signer),
        address=chain.provider.address,
        token=ZERO_ADDRESS,
        amount=0,
        data=tampered.get("data", offered) + b" " * tampered.get("padding", 0),
        valid_until=0,
    )
    me = chain.consumer.address
    started = order_started_log(
        consumer=me, payer=me, amount=tampered.get("amount", ONE_TOKEN), service_index=0, timestamp=chain.now
    )
    cut_short = Log(started.topics, started.data[:32])
    replace_code(chain, bought.datatoken, cut_short, fee, started)
    tx_id = poke(chain, bought.datatoken)
    asset = asset_of(bought, chain.chain_id)
    if reason is None:
        await check(chain, orders, tx_id, asset)
    else:
        assert reason in await refusal(chain, orders, tx_id, asset)


async def test_with_a_factory_only_its_contracts_count(chain: LocalChain, bought: Published) -> None:
    """An NFT that says yes to everything is no way around."""
    async with reading(chain, factory=chain.factory.address) as orders:
        tx_id = chain.order(bought.datatoken, offer(chain, orders, bought))
        await check(chain, orders, tx_id, asset_of(bought, chain.chain_id))
        assert bought.nft.lower() == (await orders.ordered(tx_id)).nft
        yes_man = Web3.to_checksum_address("0x" + "77" * 20)
        replace_code(chain, yes_man, Return(encode(["uint256"], [1])))
        asset = asset_of(Published(yes_man, bought.datatoken, bought.did), chain.chain_id)
        assert "does not belong to the asset" in await refusal(chain, orders, tx_id, asset)
    async with reading(chain) as trusting:
        assert "not offered any more" in await refusal(chain, trusting, tx_id, asset)


async def test_a_fee_expires(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """What passed between offer and payment is granted on top, and 90 s for the clocks of the chain."""
    offered_at = chain.now
    asset = asset_of(bought, chain.chain_id)
    fee = offer(chain, orders, bought, valid_until=offered_at + 600)
    chain.move_time(300)
    tx_id = chain.order(bought.datatoken, fee)
    end = offered_at + 600 + (chain.now - offered_at) + 90
    async with reading(chain, now=lambda: end - 1) as just_before:
        await check(chain, just_before, tx_id, asset)
    async with reading(chain, now=lambda: end) as too_late:
        assert "The provider fee has expired." == await refusal(chain, too_late, tx_id, asset)
        assert "The provider fee has expired." == await refusal(chain, too_late, tx_id, asset, environment=None)
        order = await check(chain, too_late, tx_id, asset, allow_expired_fees=True)
    assert offered_at + 600 == order.fee_valid_until


async def test_a_fee_for_ever_does_not_expire(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """Valid until 0."""
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought, valid_until=0))
    async with reading(chain, now=lambda: 2**40) as later:
        await check(chain, later, tx_id, asset_of(bought, chain.chain_id, timeout=0))


async def test_a_failed_transaction_orders_nothing(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """It is mined and has a receipt like any other."""
    call = chain.start_order(bought.datatoken, offer(chain, orders, bought), consumer=chain.consumer.address)
    tx_id = chain.send(call, chain.stranger, mined=False)  # has no datatoken
    assert 0 == chain.receipt(tx_id)["status"]
    assert "The transaction has failed." == await refusal(chain, orders, tx_id, asset_of(bought, chain.chain_id))


@pytest.mark.parametrize("tx_id", ["", "0x12", "ab" * 32, "0x" + "ab" * 31 + "zz", "0x" + "ab" * 32 + "\n"])
async def test_only_transaction_ids_are_looked_up(
    chain: LocalChain, orders: Chain, bought: Published, tx_id: str
) -> None:
    """Anything else is not shown to the node, nor back."""
    assert "no transaction id" in await refusal(chain, orders, tx_id, asset_of(bought, chain.chain_id))


async def test_an_unknown_transaction(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """After a moment of patience."""
    asset = asset_of(bought, chain.chain_id)
    assert "There is no such transaction." == await refusal(chain, orders, "0x" + "ab" * 32, asset)


async def test_a_transaction_is_waited_for_a_moment(chain: LocalChain, bought: Published) -> None:
    """One that is still not mined then is refused; the node is told nothing."""
    chain.ask("evm_setAutomine", False)
    asset = asset_of(bought, chain.chain_id)
    async with reading(chain, patience=0.2) as orders:
        call = chain.start_order(bought.datatoken, offer(chain, orders, bought), consumer=chain.consumer.address)
        tx_id = chain.send(call, chain.consumer, mined=False)
        assert "The transaction is not mined yet." == await refusal(chain, orders, tx_id, asset)
    async with reading(chain, patience=10) as orders:
        waiting = asyncio.create_task(check(chain, orders, tx_id, asset))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        chain.ask("evm_mine")
        assert tx_id == (await waiting).tx_id


@pytest.mark.parametrize("state", range(6))
async def test_the_state_of_the_nft(chain: LocalChain, orders: Chain, bought: Published, state: int) -> None:
    """As it is now: a publisher can withdraw what was ordered before."""
    asset = asset_of(bought, chain.chain_id)
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought))
    chain.set_state(bought.nft, state)
    if state in USABLE_STATES:
        await check(chain, orders, tx_id, asset)
    else:
        assert "not offered any more" in await refusal(chain, orders, tx_id, asset)


async def test_who_owns_an_asset(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """Whoever has its NFT now; written in any way."""
    assert chain.publisher.address.lower() == await orders.owner(bought.nft.lower())
    call = chain.nft(bought.nft).functions.transferFrom(chain.publisher.address, chain.stranger.address, 1)
    chain.send(call, chain.publisher)
    assert chain.stranger.address.lower() == await orders.owner(bought.nft)


@pytest.mark.parametrize("nft", ["", "0x12", ZERO_ADDRESS, "0x" + "12" * 20])
async def test_what_is_no_nft_has_no_owner(chain: LocalChain, orders: Chain, nft: str) -> None:
    """An address that is none, or where nothing is; with a factory and without."""
    assert await orders.owner(nft) is None
    async with reading(chain, factory=chain.factory.address) as strict:
        assert await strict.owner(nft) is None


async def test_whose_an_nft_says_it_is(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """Any contract can say so; with a factory only its own are believed, and nonsense is nobody's."""
    fake = Web3.to_checksum_address("0x" + "78" * 20)
    replace_code(chain, fake, Return(encode(["address"], [chain.publisher.address])))
    assert chain.publisher.address.lower() == await orders.owner(fake)
    async with reading(chain, factory=chain.factory.address) as strict:
        assert await strict.owner(fake) is None
        assert chain.publisher.address.lower() == await strict.owner(bought.nft)
    replace_code(chain, fake, Return(b"\xff" * 3))
    assert await orders.owner(fake) is None
    replace_code(chain, fake, Revert(b""))
    assert await orders.owner(fake) is None


@pytest.mark.parametrize(
    ("valid_until", "offered_at", "seconds"),
    [(1_000, 400.0, 600), (1_000, 400.25, 599), (1_000, 1_000.5, 0), (0, 400.0, None)],
)
async def test_how_much_time_was_bought(
    chain: LocalChain, orders: Chain, bought: Published, valid_until: int, offered_at: float, seconds: int | None
) -> None:
    """Whole seconds between the offer and its end, whenever the order is looked at."""
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought, valid_until=valid_until, now=offered_at))
    order = await check(chain, orders, tx_id, asset_of(bought, chain.chain_id), allow_expired_fees=True)
    assert seconds == order.fee_seconds


async def test_who_is_impatient_is_answered_at_once(chain: LocalChain, bought: Published) -> None:
    """For asking what can be reused: no transaction of a moment ago."""
    async with reading(chain, patience=60) as orders:
        began = time.monotonic()
        reason = await refusal(chain, orders, "0x" + "ab" * 32, asset_of(bought, chain.chain_id), patient=False)
    assert "There is no such transaction." == reason
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("nft", ["", "0x12", ZERO_ADDRESS, "0x" + "12" * 20])
async def test_an_asset_without_its_contracts(chain: LocalChain, orders: Chain, bought: Published, nft: str) -> None:
    """An address that is none, or where nothing is."""
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought))
    asset = asset_of(bought, chain.chain_id, nftAddress=nft)
    assert "does not belong to the asset" in await refusal(chain, orders, tx_id, asset)


async def test_an_asset_of_another_chain(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """The same addresses may exist on many."""
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought))
    assert "on another chain" in await refusal(chain, orders, tx_id, asset_of(bought, 1))


async def test_contracts_cannot_send_us_anywhere(
    chain: LocalChain, orders: Chain, bought: Published, file_server: FileServer
) -> None:
    """A contract may ask its caller to fetch from a URL it names (EIP-3668); nothing is fetched."""
    tx_id = chain.order(bought.datatoken, offer(chain, orders, bought))
    url = file_server.add(b"{}", name="{sender}/{data}.json")
    asking = bytes(Web3.keccak(text="OffchainLookup(address,string[],bytes,bytes4,bytes)"))[:4] + encode(
        ["address", "string[]", "bytes", "bytes4", "bytes"], [bought.nft, [url], b"", b"\0" * 4, b""]
    )
    replace_code(chain, bought.nft, Revert(asking))
    assert "does not belong to the asset" in await refusal(chain, orders, tx_id, asset_of(bought, chain.chain_id))
    assert not file_server.requests


async def test_what_a_transaction_has_ordered(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """For callers who know nothing else; the order may be reused, and for another service."""
    first = chain.order(bought.datatoken, offer(chain, orders, bought), service_index=3)
    again = chain.reuse(bought.datatoken, first, offer(chain, orders, bought))
    for tx_id in (first, again):
        ordered = await orders.ordered(tx_id)
        assert (bought.nft.lower(), bought.datatoken.lower()) == (ordered.nft, ordered.datatoken)
        assert (3, chain.consumer.address.lower()) == (ordered.service_index, ordered.consumer)
        assert bought.did == did_of(ordered.nft, chain.chain_id)


async def test_a_transaction_that_orders_nothing(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """Also one in which a stranger's contract says that it orders; two orders in one are too many."""
    me = chain.consumer.address
    looks_ordered = order_started_log(consumer=me, payer=me, amount=ONE_TOKEN, service_index=0, timestamp=chain.now)
    plain = poke(chain, chain.stranger.address)
    lie = run_code(chain, looks_ordered)
    liars = [Web3.to_checksum_address("0x" + f"{number:02x}" * 20) for number in range(0x60, 0x70)]
    for liar in liars:
        replace_code(chain, liar, looks_ordered)
    many = run_code(chain, *[Call(liar, b"") for liar in liars])
    for tx_id, reason in ((plain, "orders no service"), (lie, "orders no service"), (many, "more than one")):
        with pytest.raises(OrderInvalid, match=reason):
            await orders.ordered(tx_id)

    other = chain.publish("other")
    chain.mint(bought.datatoken, chain.consumer.address)
    chain.mint(other.datatoken, chain.consumer.address)
    free = (ZERO_ADDRESS, ZERO_ADDRESS, 0)
    batch = [(each.datatoken, me, 0, _tuple(offer(chain, orders, each)), free) for each in (bought, other)]
    for each in (bought, other):
        approve = chain.datatoken(each.datatoken).functions.approve(chain.factory.address, ONE_TOKEN)
        chain.send(approve, chain.consumer)
    both = chain.send(chain.factory.functions.startMultipleTokenOrder(batch), chain.consumer)
    with pytest.raises(OrderInvalid, match="more than one"):
        await orders.ordered(both)
    for each in (bought, other):
        await check(chain, orders, both, asset_of(each, chain.chain_id))


@pytest.mark.parametrize(
    ("decimals", "seconds", "price", "expected"),
    [
        (18, 60, 1, ONE_TOKEN),
        (18, 3600, 0.1, 6 * ONE_TOKEN),
        (18, 1, 1, 16_666_666_666_666_667),
        (6, 60, 1, 1_000_000),
        (6, 1, 1, 16_667),
        (6, 1, 0.000001, 1),
        (6, 0.5, 120, 1_000_000),
        (6, 60, 0, 0),
        (0, 61, 1, 2),
    ],
)
async def test_fees_in_smallest_units(
    chain: LocalChain, decimals: int, seconds: float, price: float, expected: int
) -> None:
    """Rounded up, and exact however many decimals there are."""
    async with reading(chain, fee_token=chain.new_token(decimals)) as orders:
        assert expected == await orders.required_fee(seconds, price)
        assert expected == await orders.required_fee(seconds, price)


async def test_without_a_token_there_is_no_fee(orders: Chain) -> None:
    """Whatever the price; and no time is negative."""
    assert 0 == await orders.required_fee(3600, 10)
    with pytest.raises(ValueError):
        await orders.required_fee(-1, 10)


async def test_a_fee_token_that_is_none(chain: LocalChain, bought: Published) -> None:
    """The operator's mistake, not the consumer's."""
    async with reading(chain, fee_token="0x" + "12" * 20) as orders:
        with pytest.raises(ChainUnavailable, match="decimals"):
            await orders.required_fee(1, 1)


async def test_the_fee_as_the_provider_answers_it(chain: LocalChain, orders: Chain, bought: Published) -> None:
    """Field by field as clients of the Provider read it; its signature is the provider's."""

    def low_v(digest: bytes) -> tuple[int, bytes, bytes]:
        v, r, s = signing(chain.provider)(digest)
        return v - 27, r, s

    fee = orders.provider_fee(
        low_v,
        datatoken=bought.datatoken.lower(),
        service_id=SERVICE,
        environment=ENVIRONMENT,
        amount=12,
        valid_until=1_800_000_000,
        now=1_700_000_000.25,
    )
    data = bytes.fromhex(str(fee["providerData"])[2:])
    assert f'{{"environment":"{ENVIRONMENT}","timestamp":1700000000.25,' == data.decode().split('"dt"')[0]
    assert {"dt": bought.datatoken.lower(), "id": SERVICE}.items() <= json.loads(data).items()
    assert (chain.provider.address, ZERO_ADDRESS) == (fee["providerFeeAddress"], fee["providerFeeToken"])
    assert ("12", 1_800_000_000) == (fee["providerFeeAmount"], fee["validUntil"])
    digest = fee_digest(data, chain.provider.address, ZERO_ADDRESS, 12, 1_800_000_000)
    v, r, s = int(fee["v"]), HexBytes(str(fee["r"])), HexBytes(str(fee["s"]))
    assert v in (27, 28)
    assert 32 == len(r) == len(s)
    assert chain.provider.address.lower() == digest_signer(digest, v, r, s)
    chain.order(bought.datatoken, fee)


@pytest.mark.parametrize("v", [0, 26, 29, 255])
@pytest.mark.parametrize("number", [b"\0" * 32, b"\xff" * 32])
def test_what_is_no_signature_has_no_signer(v: int, number: bytes) -> None:
    """Nobody's, rather than an error."""
    assert digest_signer(b"\x11" * 32, v, number, number) is None


def test_the_did_of_an_nft() -> None:
    """As Ocean publishes it: over the address with its checksum, whatever way it is written here."""
    address = "0xCFDdA22C9837aE76E0faA845354f33C62E03653a"
    checked = Web3.to_checksum_address(address)
    expected = f"did:op:{sha256(f'{checked}8996'.encode()).hexdigest()}"
    assert expected == did_of(address.lower(), 8996) == did_of(checked, 8996)
    assert expected != did_of(checked, 1)


async def test_a_node_that_hangs(tmp_path: Path) -> None:
    """An end is made of it, every time, and its URL is not told."""
    with Node(tmp_path) as node:
        orders = Chain(config(node, seconds=0.5, attempts=2), ZERO_ADDRESS)
        os.kill(node.process.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(ChainUnavailable) as unavailable:
                await orders.ordered("0x" + "ab" * 32)
            assert 1 <= time.monotonic() - began < 4
        finally:
            os.kill(node.process.pid, signal.SIGCONT)
        with pytest.raises(OrderInvalid, match="no such transaction"):
            await orders.ordered("0x" + "ab" * 32)
        await orders.close()
    assert str(node.port) not in str(unavailable.value)
    assert unavailable.value.__cause__ is unavailable.value.__context__ is None


async def test_a_node_that_is_gone(tmp_path: Path) -> None:
    """Nobody listens any more."""
    with Node(tmp_path) as node:
        pass
    orders = Chain(config(node), ZERO_ADDRESS)
    with pytest.raises(ChainUnavailable) as unavailable:
        await orders.ordered("0x" + "ab" * 32)
    assert str(node.port) not in str(unavailable.value)
    await orders.close()


async def test_a_node_of_another_chain(chain: LocalChain) -> None:
    """Orders there are none here."""
    async with reading(chain, id=1) as orders:
        with pytest.raises(ChainUnavailable, match="another chain"):
            await orders.ordered("0x" + "ab" * 32)
        with pytest.raises(ChainUnavailable, match="another chain"):
            await orders.ordered("0x" + "ab" * 32)


@pytest.mark.parametrize(
    "answer",
    [
        {"body": b"<html>a-secret</html>"},
        {"body": b"[]"},
        {"body": b"{}"},
        {"body": b'{"jsonrpc": "2.0", "id": 0, "result": "a-secret"}'},
        {"body": b'{"jsonrpc": "2.0", "id": 0, "result": null}'},
        {"body": b'{"jsonrpc": "2.0", "id": 0, "error": {"code": -32000, "message": "a-secret"}}'},
        {"body": b"[" * 100_000},
        {"body": b"\xff\xfe"},
        {"body": b'{"jsonrpc": "2.0", "id": 0, "result": "0x1"' + b" " * 3 * 1024 * 1024 + b"}"},
        {"body": b"a-secret", "status": 401},
        {"redirect_to": "http://127.0.0.1:1/a-secret"},
        {"body": b'{"jsonrpc"', "drop_after": 5},
    ],
    ids=lambda answer: str(answer)[:40],
)
async def test_a_node_that_answers_nonsense(file_server: FileServer, answer: dict[str, Any]) -> None:
    """Asked as often as was said, then given up; nothing of what it says is passed on."""
    url = file_server.add(name="key-in-the-path", **answer)
    orders = Chain(ChainConfig.model_validate({"id": 1, "rpc": url, "attempts": 2, "seconds": 5}), ZERO_ADDRESS)
    with pytest.raises(ChainUnavailable) as unavailable:
        await orders.ordered("0x" + "ab" * 32)
    await orders.close()
    assert "the node of chain 1 does not answer as it should" == str(unavailable.value)
    assert 2 == file_server.requests[url]


@pytest.mark.parametrize("url", ["", "node:8545", "ws://node/key", "http://", "http://[", "file:///key"])
def test_a_url_that_is_none_is_not_quoted(url: str) -> None:
    """It may be a key that was put in the wrong place."""
    with pytest.raises(ValidationError) as refused:
        ChainConfig.model_validate({"id": 1, "rpc": url})
    assert "key" not in str(refused.value)
    assert "s3cr3t" not in repr(ChainConfig.model_validate({"id": 1, "rpc": "https://node.example/s3cr3t"}))


def _tuple(fee: Fee) -> tuple[Any, ...]:
    texts = [fee[name] for name in ("providerFeeAddress", "providerFeeToken")]
    r, s, data = (HexBytes(str(fee[name])) for name in ("r", "s", "providerData"))
    return (*texts, int(fee["providerFeeAmount"]), fee["v"], r, s, fee["validUntil"], data)
