"""What tests need of a chain beyond ``cli.local_chain``: assets, keys, and contracts that lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from eth_abi.abi import encode
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount
from hexbytes import HexBytes
from web3 import Web3

from blocks.assets import Asset, parse_asset
from blocks.chain import ChainConfig, SignHash, fee_digest
from cli.local_chain import LocalChain, Node, Published

ENVIRONMENT: Final = "withgpu"
SERVICE: Final = "compute-1"
DAY: Final = 86_400


def config(node: Node, **changes: Any) -> ChainConfig:
    """Of the node, and impatient."""
    values = {"id": node.chain_id, "rpc": node.url, "seconds": 5.0, "attempts": 2, "patience": 0.3}
    return ChainConfig.model_validate({**values, **changes})


def signing(account: LocalAccount) -> SignHash:
    """As the provider's key signs."""

    def sign(digest: bytes) -> tuple[int, bytes, bytes]:
        signed = account.sign_message(encode_defunct(primitive=digest))
        return signed.v, signed.r.to_bytes(32, "big"), signed.s.to_bytes(32, "big")

    return sign


def asset_of(published: Published, chain_id: int, *, timeout: int = DAY, **changes: Any) -> Asset:
    """The asset as its DDO would say; its one service is ``SERVICE``."""
    service = {
        "id": SERVICE,
        "type": "compute",
        "datatokenAddress": published.datatoken,
        "serviceEndpoint": "http://127.0.0.1",
        "timeout": timeout,
    }
    document = {
        "id": published.did,
        "chainId": chain_id,
        "nftAddress": published.nft,
        "metadata": {"type": "dataset"},
        "services": [service],
    }
    return parse_asset({**document, **changes})


@dataclass(frozen=True)
class Log:
    """A contract emits an event."""

    topics: Sequence[bytes]
    data: bytes

    def code(self) -> bytes:
        topics = b"".join(_push(topic.rjust(32, b"\0")) for topic in reversed(self.topics))
        return (
            _store(self.data)
            + topics
            + _push_number(len(self.data))
            + _push_number(0)
            + bytes([0xA0 + len(self.topics)])
        )


@dataclass(frozen=True)
class Call:
    """A contract calls another."""

    to: str
    data: bytes

    def code(self) -> bytes:
        numbers = b"".join(map(_push_number, (0, 0, len(self.data), 0, 0)))
        gas, call, pop = b"\x5a", b"\xf1", b"\x50"
        return _store(self.data) + numbers + _push(bytes(HexBytes(self.to))) + gas + call + pop


@dataclass(frozen=True)
class Return:
    """A contract answers."""

    data: bytes

    def code(self) -> bytes:
        return _store(self.data) + _push_number(len(self.data)) + _push_number(0) + b"\xf3"


@dataclass(frozen=True)
class Revert:
    """A contract undoes what it was called for, with a reason."""

    data: bytes

    def code(self) -> bytes:
        return _store(self.data) + _push_number(len(self.data)) + _push_number(0) + b"\xfd"


Step = Log | Call | Return | Revert


def code_of(*steps: Step) -> str:
    """Of a contract that does so whatever it is asked, in hex."""
    return "0x" + (b"".join(step.code() for step in steps) + b"\x00").hex()


def replace_code(chain: LocalChain, address: str, *steps: Step) -> None:
    """Put another contract in the place of one; what it has stored stays."""
    chain.ask("anvil_setCode", address, code_of(*steps))


def poke(chain: LocalChain, address: str) -> str:
    """Call the contract with nothing; the id of the transaction."""
    return _sent(chain, {"to": address})


def run_code(chain: LocalChain, *steps: Step) -> str:
    """Do so in one transaction, as a contract of the stranger's; its id."""
    return _sent(chain, {"data": code_of(*steps)})


def next_contract(chain: LocalChain) -> str:
    """Address of the contract that the next ``run_code`` acts as."""
    nonce = chain.web3.eth.get_transaction_count(chain.stranger.address)
    # RLP of (address, nonce), as every Ethereum chain derives it; for nonces below 128.
    assert 0 < nonce < 128
    packed = b"\xd6\x94" + bytes(HexBytes(chain.stranger.address)) + bytes([nonce])
    return Web3.to_checksum_address("0x" + bytes(Web3.keccak(packed))[12:].hex())


def provider_fee_log(
    sign: SignHash,
    *,
    address: str,
    token: str,
    amount: int,
    data: bytes,
    valid_until: int,
) -> Log:
    """A ``ProviderFee`` event, whoever emits it."""
    v, r, s = sign(fee_digest(data, address, token, amount, valid_until))
    topic = Web3.keccak(text="ProviderFee(address,address,uint256,bytes,uint8,bytes32,bytes32,uint256)")
    body = encode(["uint256", "bytes", "uint8", "bytes32", "bytes32", "uint256"], [amount, data, v, r, s, valid_until])
    return Log([bytes(topic), bytes(HexBytes(address)), bytes(HexBytes(token))], body)


def order_started_log(*, consumer: str, payer: str, amount: int, service_index: int, timestamp: int) -> Log:
    """An ``OrderStarted`` event, whoever emits it."""
    topic = Web3.keccak(text="OrderStarted(address,address,uint256,uint256,uint256,address,uint256)")
    body = encode(["address", "uint256", "uint256", "uint256", "uint256"], [payer, amount, service_index, timestamp, 1])
    return Log([bytes(topic), bytes(HexBytes(consumer)), bytes(20)], body)


def _sent(chain: LocalChain, transaction: dict[str, Any]) -> str:
    tx_id = chain.ask("eth_sendTransaction", {"from": chain.stranger.address, "gas": hex(12_000_000), **transaction})
    chain.receipt(tx_id)
    return str(tx_id)


def _push(data: bytes) -> bytes:
    return bytes([0x5F + len(data)]) + data


def _push_number(number: int) -> bytes:
    return _push(number.to_bytes(3, "big"))


def _store(data: bytes) -> bytes:
    """Write *data* into the contract's memory, from 0 on."""
    chunks = [data[start : start + 32].ljust(32, b"\0") for start in range(0, len(data), 32)]
    return b"".join(_push(chunk) + _push_number(32 * place) + b"\x52" for place, chunk in enumerate(chunks))
