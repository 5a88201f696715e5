"""
A chain of our own on this machine: a real Ethereum node (anvil) on loopback, Ocean's contracts on it, and what
publishers and consumers do there. For the demo on a chain and for tests: its keys are known to everybody.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import requests
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_typing import ChecksumAddress, HexStr
from hexbytes import HexBytes
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_delay, wait_fixed
from web3 import HTTPProvider, Web3
from web3.contract import Contract
from web3.contract.contract import ContractConstructor, ContractFunction
from web3.exceptions import Web3Exception
from web3.logs import DISCARD
from web3.types import RPCEndpoint, TxReceipt

from blocks.chain import ONE_TOKEN, ZERO_ADDRESS, artifact, did_of
from cli.service import ROOT, CannotStart, Part, free_port

CHAIN_ID: Final = 8996
"""That of a development chain, as Ocean's own tools expect it."""

MNEMONIC: Final = "test test test test test test test test test test test junk"
"""Of every account here, the one all Ethereum tools test with. Never send anything of value to them."""

FOLDER: Final = ROOT / "chain"
"""Where the node's version and hash are written down, and where it is installed."""

START_SECONDS: Final = 30.0
INSTALL_SECONDS: Final = 300.0

_PROGRAM: Final = FOLDER / "node_modules" / "@foundry-rs" / "anvil-linux-amd64" / "bin" / "anvil"
_GAS: Final = 12_000_000
"""For every transaction. Given, so that nothing is estimated: one that will fail is to be mined all the same."""

Fee = Mapping[str, str | int]
"""A provider's fee as ``Chain.provider_fee`` gives it."""


class TransactionFailed(Exception):
    """A transaction was mined and has failed."""


@dataclass(frozen=True)
class Published:
    """An asset on the chain: its NFT, and the datatoken of its one service."""

    nft: ChecksumAddress
    datatoken: ChecksumAddress
    did: str


def anvil() -> Path:
    """
    The node's program: the locked one, installed by npm on first use; else one on the PATH.

    Raises:
        CannotStart: There is neither.
    """
    obstacle = _install()
    if obstacle is None:
        return _PROGRAM
    if found := shutil.which("anvil"):
        return Path(found)
    raise CannotStart(f"there is no Ethereum node: {obstacle}. Install Foundry, so that anvil is on the PATH")


def _install() -> str | None:
    """Install the locked node if it is not yet; None, or what stands in the way."""
    locked = FOLDER / "package-lock.json"
    stamp = FOLDER / "node_modules" / ".installed"
    if not locked.exists():
        return f"{locked} is missing"
    # The lock file is locked, in every sense: test sessions side by side would take the node from each other.
    with locked.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        version = hashlib.sha256(file.read()).hexdigest()
        if _PROGRAM.exists() and stamp.exists() and stamp.read_text() == version:
            return None
        obstacle = _npm_ci()
        if obstacle is None:
            stamp.write_text(version)
        return obstacle


def _npm_ci() -> str | None:
    beside_python = Path(sys.executable).with_name("npm")
    npm = str(beside_python) if beside_python.exists() else shutil.which("npm")
    if npm is None:
        return "npm, which would install it, is not here"
    # No scripts: the package needs none, and a package's scripts may do anything.
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, timeout=INSTALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as fault:
        return f"npm could not install it ({type(fault).__name__})"
    if done.returncode:
        return f"npm could not install it (exit code {done.returncode})"
    # npm skips in silence what is optional and cannot be had, or is made for other machines.
    return None if _PROGRAM.exists() else "npm has found none for this machine"


class Node:
    """
    A chain without any contract. Started on entering, stopped on leaving; nothing of it is kept.

    Args:
        folder: Of its log.
        port: 0 for any free one.
    """

    def __init__(self, folder: Path, *, chain_id: int = CHAIN_ID, port: int = 0) -> None:
        self.folder = folder
        self.chain_id = chain_id
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._part.process

    @property
    def now(self) -> int:
        """The chain's time: that of its last block."""
        return int(self.web3.eth.get_block("latest")["timestamp"])

    def __enter__(self) -> Self:
        program = anvil()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        log = self.folder / "anvil.log"
        # If this process is killed outright, the node ends too.
        command = ["setpriv", "--pdeathsig", "TERM", "--", str(program), "--host", "127.0.0.1", "--quiet"]
        command += ["--port", f"{self.port}", "--chain-id", f"{self.chain_id}", "--mnemonic", MNEMONIC]
        command += ["--cache-path", str(self.folder / "anvil")]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._part = Part("anvil", process, log)
        self.web3 = Web3(HTTPProvider(self.url, request_kwargs={"timeout": 30}, exception_retry_configuration=None))
        try:
            self._until_answered(self._part)
            self._prepare()
        except BaseException:
            self._part.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._part.stop()

    def ask(self, method: str, *params: Any) -> Any:
        """A method of the node beyond Ethereum's: ``evm_…``, ``anvil_…``."""
        answer = self.web3.provider.make_request(RPCEndpoint(method), list(params))
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def move_time(self, seconds: int) -> None:
        """Let *seconds* pass on the chain; nothing else notices."""
        self.ask("evm_increaseTime", seconds)
        self.ask("evm_mine")

    @contextmanager
    def rolled_back(self) -> Iterator[None]:
        """Whatever happens on the chain in the meantime has not happened, time included."""
        snapshot = self.ask("evm_snapshot")
        try:
            yield
        finally:
            self.ask("evm_setAutomine", True)
            self.ask("evm_revert", snapshot)

    def _prepare(self) -> None:
        """What has to be on the chain before anybody uses it."""

    def _until_answered(self, part: Part) -> None:
        def ask() -> None:
            if not part.alive:
                raise CannotStart(f"anvil {part.ending} while it started. Its log is {part.log}")
            self.ask("eth_chainId")

        try:
            Retrying(
                retry=retry_if_exception_type((requests.RequestException, Web3Exception)),
                stop=stop_after_delay(START_SECONDS),
                wait=wait_fixed(0.05),
            )(ask)
        except RetryError:
            raise CannotStart(f"anvil did not answer within {START_SECONDS:g} s. Its log is {part.log}") from None


class LocalChain(Node):
    """
    A chain with Ocean's contracts, and accounts that have Ether.

    ``order`` and all that sends a transaction wait until it is mined, and raise TransactionFailed.
    """

    def __init__(self, folder: Path, *, chain_id: int = CHAIN_ID, port: int = 0) -> None:
        super().__init__(folder, chain_id=chain_id, port=port)
        Account.enable_unaudited_hdwallet_features()
        self.owner, self.publisher, self.consumer, self.provider, self.stranger = map(_account, range(5))
        self._nft = artifact("ERC721Template")
        self._datatoken = artifact("ERC20Template")
        self._erc20 = artifact("MockERC20Decimals")

    def _prepare(self) -> None:
        """The router, the factory and one template of each kind: the least that publishing and ordering take."""
        owner = self.owner.address
        ocean = self._deploy("MockERC20", owner, "Ocean", "OCEAN")
        collector = self._deploy("OPFCommunityFeeCollector", owner, owner)
        # It wants a template for pools, which are long gone; any address but zero does.
        pools = Web3.to_checksum_address("0x" + "00" * 19 + "01")
        router = self._deploy("FactoryRouter", owner, ocean.address, pools, collector.address, [])
        nfts = self._deploy("ERC721Template")
        datatokens = self._deploy("ERC20Template")
        self.factory = self._deploy("ERC721Factory", nfts.address, datatokens.address, router.address)
        self.send(router.functions.addFactory(self.factory.address), self.owner)

    def publish(self, name: str = "asset") -> Published:
        """An NFT of the publisher's, and a datatoken that the publisher may mint."""
        publisher = self.publisher.address
        nft = (name, "NFT", 1, "https://example.org/nft", True, publisher)
        # Template; name and symbol; minter, payment collector, market and its token; cap and the market's fee.
        no_bytes: list[bytes] = []
        addresses = [publisher, publisher, ZERO_ADDRESS, ZERO_ADDRESS]
        datatoken = (1, [name, "DT"], addresses, [1000 * ONE_TOKEN, 0], no_bytes)
        receipt = self.receipt(self.send(self.factory.functions.createNftWithErc20(nft, datatoken), self.publisher))
        created = self.factory.events.NFTCreated().process_receipt(receipt, errors=DISCARD)[0]["args"]
        token = self.factory.events.TokenCreated().process_receipt(receipt, errors=DISCARD)[0]["args"]
        address = created["newTokenAddress"]
        return Published(address, token["newTokenAddress"], did_of(address, self.chain_id))

    def set_state(self, nft: str, state: int) -> None:
        """Set the NFT's ``metaDataState``; 0 is active. Its metadata stays empty."""
        contract = self.nft(nft)
        if not contract.functions.hasMetaData().call():
            digest = hashlib.sha256(b"{}").digest()
            self.send(contract.functions.setMetaData(0, "", "", b"", b"{}", digest, []), self.publisher)
        self.send(contract.functions.setMetaDataState(state), self.publisher)

    def mint(self, datatoken: str, to: str, amount: int = ONE_TOKEN) -> None:
        """*amount* in smallest units."""
        self.send(self.datatoken(datatoken).functions.mint(Web3.to_checksum_address(to), amount), self.publisher)

    def new_token(self, decimals: int = 18) -> ChecksumAddress:
        """An ERC20 for fees, all of it the owner's; ``give`` hands it out."""
        return self._deploy("MockERC20Decimals", "Fee token", "FEE", decimals).address

    def give(self, token: str, to: str, amount: int) -> None:
        """Transfer *amount* smallest units of a ``new_token``."""
        self.send(self.erc20(token).functions.transfer(Web3.to_checksum_address(to), amount), self.owner)

    def balance(self, token: str, of: str) -> int:
        return int(self.erc20(token).functions.balanceOf(Web3.to_checksum_address(of)).call())

    def order(
        self,
        datatoken: str,
        fee: Fee,
        *,
        payer: LocalAccount | None = None,
        consumer: str | None = None,
        service_index: int = 0,
    ) -> str:
        """
        Order a service for one datatoken, and pay the provider's fee; the id of the transaction.

        Args:
            payer: Has the datatoken and the fee; the consumer's account unless given.
            consumer: The payer unless given.
        """
        payer = payer or self.consumer
        self.allow_fee(datatoken, fee, payer)
        call = self.start_order(datatoken, fee, consumer=consumer or payer.address, service_index=service_index)
        return self.send(call, payer)

    def reuse(self, datatoken: str, tx_id: str, fee: Fee, *, payer: LocalAccount | None = None) -> str:
        """Use the order of *tx_id* once more, for the provider's fee alone; the id of the new transaction."""
        payer = payer or self.consumer
        self.allow_fee(datatoken, fee, payer)
        return self.send(self.datatoken(datatoken).functions.reuseOrder(HexBytes(tx_id), _fee(fee)), payer)

    def start_order(self, datatoken: str, fee: Fee, *, consumer: str, service_index: int = 0) -> ContractFunction:
        """The call by which a service is ordered, not sent."""
        market = (ZERO_ADDRESS, ZERO_ADDRESS, 0)
        return self.datatoken(datatoken).functions.startOrder(
            Web3.to_checksum_address(consumer), service_index, _fee(fee), market
        )

    def allow_fee(self, datatoken: str, fee: Fee, payer: LocalAccount) -> None:
        """Let the datatoken take the fee from *payer*."""
        if int(fee["providerFeeAmount"]) and fee["providerFeeToken"] != ZERO_ADDRESS:
            token = self.erc20(str(fee["providerFeeToken"]))
            amount = int(fee["providerFeeAmount"])
            self.send(token.functions.approve(Web3.to_checksum_address(datatoken), amount), payer)

    def send(
        self, call: ContractFunction | ContractConstructor, sender: LocalAccount, *, gas: int = _GAS, mined: bool = True
    ) -> str:
        """
        Send a transaction; its id. Unless *mined*, nobody waits for it or looks how it ends.

        Raises:
            TransactionFailed
        """
        tx_id = call.transact({"from": sender.address, "gas": gas}).to_0x_hex()
        if mined and self.receipt(tx_id)["status"] != 1:
            raise TransactionFailed
        return str(tx_id)

    def receipt(self, tx_id: str) -> TxReceipt:
        """Of a transaction, once it is mined."""
        return self.web3.eth.wait_for_transaction_receipt(HexStr(tx_id), timeout=30, poll_latency=0.02)

    def nft(self, address: str) -> Contract:
        return self._at(address, self._nft)

    def datatoken(self, address: str) -> Contract:
        return self._at(address, self._datatoken)

    def erc20(self, address: str) -> Contract:
        return self._at(address, self._erc20)

    def _at(self, address: str, compiled: Mapping[str, Any]) -> Contract:
        return self.web3.eth.contract(address=Web3.to_checksum_address(address), abi=compiled["abi"])

    def _deploy(self, name: str, *arguments: Any) -> Contract:
        compiled = artifact(name)
        contract = self.web3.eth.contract(abi=compiled["abi"], bytecode=compiled["bytecode"])
        receipt = self.receipt(self.send(contract.constructor(*arguments), self.owner))
        return self._at(str(receipt["contractAddress"]), compiled)


def _account(place: int) -> LocalAccount:
    # Deriving one takes a tenth of a second, and the mnemonic never changes.
    return cast(LocalAccount, Account.from_mnemonic(MNEMONIC, account_path=f"m/44'/60'/0'/0/{place}"))


def _fee(fee: Fee) -> tuple[Any, ...]:
    """As the contract's tuple."""
    return (
        Web3.to_checksum_address(str(fee["providerFeeAddress"])),
        Web3.to_checksum_address(str(fee["providerFeeToken"])),
        int(fee["providerFeeAmount"]),
        int(fee["v"]),
        HexBytes(str(fee["r"])),
        HexBytes(str(fee["s"])),
        int(fee["validUntil"]),
        HexBytes(str(fee["providerData"])),
    )
