"""
What a consumer asks for, looked up, checked against the rules of its owners, and put together to a workflow document.

The same for every dialect in which consumers speak. Contract, sections 4, 6 and 7.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import aiohttp
from eth_utils.address import is_address, to_checksum_address
from pydantic import ValidationError

from blocks.assets import Asset, AssetMalformed, AssetService, AssetWithheld, Container, spellings
from blocks.catalogue import Catalogue, CatalogueUnavailable
from blocks.chain import Chain, ChainUnavailable, Order, OrderInvalid, did_of
from blocks.files import BadFile, BadParameters, File, parse_file
from blocks.guard import guarded_session
from blocks.keys import FilesUnavailable, Lack, ProviderKey, files_of
from blocks.limits import FetchLimits, Offer
from blocks.provider_fees import Initialized, ProviderRefuses, ProviderUnreachable, initialize
from blocks.remote import Access, Unreachable, check_file, remotes
from blocks.urls import ForbiddenUrl
from flows.errors import AssetRefused, InvalidParameter, NotReady, SourceFailed, UnknownEnvironment
from flows.jobs import Job, JobQuery, Jobs
from flows.plan import compile_plan
from flows.trust import ANY, algorithm_refusal, consumer_may, container_checksum, container_refusal, files_checksum
from flows.workflow import Workflow, parse_workflow

MAX_DATASETS: Final = 100
_NEEDED: Final = ("documentId", "serviceId")
SECONDS_TO_CHECK: Final = 60.0
"""Deadline of reading an algorithm for its checksum."""
MOST_READS: Final = 4
"""Calls for which files are read at a time, to check or describe them: strangers can have that done."""


async def _no_sources() -> Sequence[tuple[FetchLimits, Access]]:
    return ()


@dataclass(frozen=True)
class DatasetAsk:
    """A data set as a consumer names it. *userdata* goes to its source."""

    document_id: str = ""
    service_id: str = ""
    transfer_tx_id: str = ""
    userdata: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class AlgorithmAsk(DatasetAsk):
    """A published algorithm, or *meta*: the consumer's own, which takes precedence."""

    meta: Mapping[str, Any] | None = field(default=None, repr=False)
    custom_data: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Ask:
    """What a consumer wants to have run."""

    consumer: str
    datasets: tuple[DatasetAsk, ...]
    """The first is the main one."""
    algorithm: AlgorithmAsk
    environment: str = ""
    """Empty: the only one there is."""
    output: Mapping[str, Any] = field(default_factory=dict)
    image_pinned: bool = True
    """The algorithm's image has to have a checksum, as the Provider's consumers give it."""


@dataclass(frozen=True)
class Part:
    """A data set or algorithm that was found and that the consumer may use. *files* is None at another provider."""

    resource: str
    ask: DatasetAsk
    asset: Asset
    service: AssetService
    files: tuple[File, ...] | None = field(repr=False)
    ddo: Mapping[str, Any] = field(repr=False)
    order: Order | None = None


@dataclass(frozen=True)
class Approved:
    """A job that may be started: its document, without agreement, and the transaction that paid for it."""

    stage: Mapping[str, Any] = field(repr=False)
    consumer: str
    paid_by: str | None
    """In lower case. An order pays for one job, which has its agreement from it."""

    def agreement(self, earlier: Job | None, otherwise: str) -> str:
        """
        The agreement of the job; *otherwise* where nothing had to be ordered.

        Raises:
            AssetRefused: *earlier*, which is to be started again, was paid by another order: one order could pay for
                any number of such jobs, because it would give none of them its agreement.
        """
        if earlier is None:
            return self.paid_by or otherwise
        if self.paid_by is not None and self.paid_by != earlier.agreement_id:
            raise AssetRefused(
                "order",
                "order_invalid",
                "jobId: a job is started again under the order that has paid for it; for another, leave jobId out",
            )
        return earlier.agreement_id

    def workflow(self, agreement_id: str) -> Workflow:
        """Raises InvalidWorkflow, for example when raw code has a form that no document may have."""
        return parse_workflow({"agreementId": agreement_id, "owner": self.consumer, "stages": [self.stage]})


@dataclass(frozen=True)
class Broker:
    """
    Args:
        chains: By id. Without any, only free environments are on offer, and only assets of no chain can be used.
        limits, access: How this process itself may fetch, to look at files and to hand them on.
        sources: The same of the environments, for files that only these can reach.
        reads: Held while files are read for a call.
        deny_unlisted: A data set that names no trusted algorithms and publishers allows none, instead of any.
        metadata_url: Where remote assets can be looked up by a worker.
        default_environment: Where jobs run whose consumers name no environment, or cannot.
    """

    jobs: Jobs
    catalogue: Catalogue
    chains: Mapping[int, Chain] = field(default_factory=dict)
    key: ProviderKey | None = field(default=None, repr=False)
    limits: FetchLimits = field(default_factory=FetchLimits)
    access: Access = field(default_factory=Access)
    deny_unlisted: bool = False
    metadata_url: str = ""
    default_environment: str = ""
    now: Callable[[], float] = time.time
    sources: Callable[[], Awaitable[Sequence[tuple[FetchLimits, Access]]]] = _no_sources
    reads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_READS), repr=False)

    async def offers(self) -> dict[str, Offer]:
        """What consumers are offered, by id: without a chain nobody can pay, so then only what is free."""
        states = await self.jobs.environments()
        return {state.offer.id: state.offer for state in states if self.chains or not state.offer.price_min}

    async def offer(self, name: str) -> Offer:
        """
        The environment *name*; without one the default, or the only one there is.

        Raises:
            UnknownEnvironment, InvalidParameter: None is named and there are several.
        """
        offers = await self.offers()
        name = name or self.default_environment
        if not name:
            if not offers:
                raise NotReady("No compute environment is on offer at present.")
            if len(offers) != 1:
                raise InvalidParameter(f"environment: name one of {', '.join(sorted(offers))}")
            return next(iter(offers.values()))
        if name not in offers:
            raise UnknownEnvironment
        return offers[name]

    async def approve(self, ask: Ask) -> Approved:
        """
        Find and check everything *ask* names.

        Raises:
            AssetRefused: The first thing that is not as it has to be.
            NotReady: A source, the catalogue or a chain cannot be reached; nothing has happened.
        """
        if not ask.datasets or len(ask.datasets) > MAX_DATASETS:
            raise AssetRefused("additional_input", "invalid", f"give at most {MAX_DATASETS} data sets")
        offer = await self.offer(ask.environment)
        found = await self._found(ask, "dataset")
        # What is cheap to tell goes before what asks a node or reads files.
        for part in found.parts:
            self._check_named(part)
        pinned = await self._trusted(found)
        datasets = [await self._ordered(part, ask.consumer, offer.id) for part in found.datasets]
        algorithm = found.algorithm and await self._ordered(found.algorithm, ask.consumer, offer.id)
        found = replace(found, datasets=tuple(datasets), algorithm=algorithm)
        seconds, paid_by = await self._paid(found.parts, offer)
        stage = _stage(ask, found, offer, seconds=seconds, pinned=pinned, output=_output(ask.output, self.metadata_url))
        return Approved(stage=stage, consumer=ask.consumer, paid_by=paid_by)

    async def fees(self, ask: Ask, valid_until: int) -> dict[str, Any]:
        """
        What has to be paid and ordered before *ask* is approved, until *valid_until* (Unix time, seconds).

        Time beyond the environment's longest job costs nothing and is not granted.

        Returns:
            ``{"datasets": [...], "algorithm": ...}`` as the Provider answers it; an asset of no chain needs no order
            and has an empty entry. The whole price of the environment stands with one of those that are ordered here.
            ``validOrder`` without a fee is a transaction that is good as it is; with a fee, the order to reuse.

        Raises:
            As ``approve``, for what is known by then; InvalidWorkflow.
            SourceFailed: Another provider, which has some of the files, does not answer.
        """
        now = self.now()
        if valid_until <= now:
            raise InvalidParameter("compute.validUntil: must be a Unix time in the future, in seconds")
        if not ask.datasets or len(ask.datasets) > MAX_DATASETS:
            raise AssetRefused("datasets", "invalid", f"give at least one data set, at most {MAX_DATASETS}")
        offer = await self.offer(ask.environment)
        found = await self._found(ask, "datasets[0]")
        await self._check_document(ask, found, offer)
        here = [part for part in found.parts if part.asset.chain_id is not None and part.files is not None]
        for part in here:
            self._chain(part)
        if offer.price_min and not here:
            raise AssetRefused("order", "fees_not_paid", _NOTHING_TO_CHARGE)
        await self._trusted(found)
        known = {part.resource: await self._known_order(part, ask.consumer, offer.id) for part in here}
        good = {
            resource: order
            for resource, order in known.items()
            if order is not None and (not order.fee_valid_until or order.fee_valid_until >= valid_until)
        }
        charged = await self._charged([replace(part, order=good.get(part.resource)) for part in here], offer)
        entries: dict[str, dict[str, Any]] = {}
        for part in here:
            order = known[part.resource]
            if order is not None and part.resource in good and part.resource != charged:
                entries[part.resource] = {"validOrder": order.tx_id}
                continue
            price = offer.price_min if part.resource == charged else 0.0
            entries[part.resource] = await self._fee(
                part, environment=offer.id, price=price, offer=offer, valid_until=valid_until, now=now
            )
            if order is not None:
                # What reuses an order has to name the one it began with; the chain itself would take anything.
                entries[part.resource]["validOrder"] = order.start_tx_id
        entries |= await self._fees_elsewhere(found.parts, ask.consumer)
        answer: dict[str, Any] = {"datasets": [entries.get(part.resource, {}) for part in found.datasets]}
        if found.algorithm is not None:
            answer["algorithm"] = entries.get(found.algorithm.resource, {})
        return answer

    async def access_fee(self, ask: DatasetAsk, consumer: str) -> tuple[Part, dict[str, Any]]:
        """
        What has to be paid for a download: nothing to this provider, but its signature on that is part of an order.

        Raises:
            As ``approve``; AssetRefused for a service that is not for downloads.
        """
        part = await self.download(ask, consumer)
        if part.asset.chain_id is None:
            return part, {}
        return part, await self._fee(part, environment=None, price=0.0, offer=None, valid_until=0, now=self.now())

    async def download(self, ask: DatasetAsk, consumer: str, *, ordered: bool = False) -> Part:
        """
        A service for downloads that *consumer* may use; with *ordered*, one that it has ordered.

        Raises:
            As ``approve``.
        """
        part = await self._part("dataset", ask, consumer, main=False)
        if part.service.type != "access":
            raise AssetRefused(
                "dataset.serviceId",
                "invalid",
                "this service is for computing, not for downloads; see initializeCompute",
            )
        if part.files is None:
            raise AssetRefused("dataset", "file_unavailable", "the files are at another provider")
        if not ordered:
            return part
        self._check_named(part)
        return await self._ordered(part, consumer, None)

    async def agreed(self, agreement_id: str, consumer: str, algorithm: str | None) -> tuple[DatasetAsk, str]:
        """
        The data set an agreement is about: one that its owner has granted in the catalogue, or an order on a chain,
        by its transaction; and the agreement's id as it stands there. *algorithm* is the published one that is to run.

        Raises:
            AssetRefused: There is no such agreement, or it is another consumer's or about another algorithm.
            NotReady
        """
        agreement = None
        try:
            for spelling in spellings(agreement_id):
                agreement = agreement or await self.catalogue.agreement(spelling)
        except CatalogueUnavailable:
            raise NotReady(_NO_CATALOGUE) from None
        if agreement is not None:
            if agreement.consumer and agreement.consumer != consumer.lower():
                raise AssetRefused("order", "order_invalid", "this agreement is another consumer's")
            if agreement.algorithm and agreement.algorithm != algorithm:
                raise AssetRefused("algorithm", "not_trusted_algo", "this agreement is about another algorithm")
            if agreement.service_id:
                return DatasetAsk(agreement.did, agreement.service_id), agreement.id
            return await self.only_service(agreement.did, "compute"), agreement.id
        tx_id = next(filter(_TRANSACTION.fullmatch, spellings(agreement_id)), "")
        unavailable = False
        for chain_id, chain in self.chains.items() if tx_id else ():
            try:
                ordered = await chain.ordered(tx_id)
            except OrderInvalid:
                continue
            except ChainUnavailable:
                # It may be on another, which answers.
                unavailable = True
                continue
            did = did_of(ordered.nft, chain_id)
            asset = await self._asset("dataset", did)
            if ordered.service_index < len(asset.services):
                return DatasetAsk(did, asset.services[ordered.service_index].id, tx_id), tx_id
        if unavailable:
            raise NotReady(_NO_NODE)
        raise AssetRefused("order", "order_invalid", "serviceAgreementId: no such agreement is known here")

    async def only_service(self, did: str, *kinds: str) -> DatasetAsk:
        """
        The first service of an asset, of one of *kinds* where they are given, for dialects that name no service.

        Raises:
            AssetRefused, NotReady
        """
        asset = await self._asset("algorithm" if not kinds else "dataset", did)
        services = [service.id for service in asset.services if not kinds or service.type in kinds]
        return DatasetAsk(did, services[0] if services else "")

    async def _found(self, ask: Ask, main: str) -> _Found:
        """Everything *ask* names, as the catalogue has it; *main* names the first data set in refusals."""
        algorithm = await self._algorithm(ask.algorithm, ask.consumer)
        container = _container(ask.algorithm, algorithm)
        if ask.image_pinned and (code := container_refusal(container)):
            raise AssetRefused("algorithm.container", code, _CONTAINER[code])
        datasets = [
            await self._part(f"datasets[{n}]" if n else main, dataset, ask.consumer, main=n == 0)
            for n, dataset in enumerate(ask.datasets)
        ]
        return _Found(tuple(datasets), algorithm, container)

    async def _check_document(self, ask: Ask, found: _Found, offer: Offer) -> None:
        """Raises InvalidWorkflow for what the job would be refused for, before anybody pays for it."""
        stage = _stage(
            ask,
            found,
            offer,
            seconds=offer.limits.seconds,
            pinned={},
            output=_output(ask.output, self.metadata_url),
        )
        approved = Approved(stage=stage, consumer=ask.consumer, paid_by=None)
        await asyncio.to_thread(lambda: compile_plan(approved.workflow("unknown"), {offer.id: offer}))

    async def _part(self, resource: str, ask: DatasetAsk, consumer: str, *, main: bool) -> Part:
        for name, value in zip(_NEEDED, (ask.document_id, ask.service_id), strict=True):
            if not value:
                raise AssetRefused(f"{resource}.{name}", "missing", f"give {resource}.{name}")
        asset = await self._asset(resource, ask.document_id)
        service = asset.service(ask.service_id)
        if service is None:
            raise AssetRefused(f"{resource}.serviceId", "not_found", "the asset has no service of this id")
        if not consumer_may(asset.credentials, consumer):
            denied = "algorithm.credentials" if resource == "algorithm" else resource
            raise AssetRefused(denied, "invalid", "the owner of this asset does not let consumerAddress use it")
        if service.type not in ("access", "compute"):
            raise AssetRefused(
                f"{resource}.serviceId", "service_not_access_compute", "the service must be of type access or compute"
            )
        if main and service.type != "compute":
            raise AssetRefused(
                f"{resource}.serviceId", "main_service_compute", "the main data set's service must be of type compute"
            )
        return Part(
            resource=resource,
            ask=replace(ask, transfer_tx_id=_transaction(ask.transfer_tx_id)),
            asset=asset,
            service=service,
            files=self._files(resource, asset, service, ask),
            ddo=await self._ddo(asset.id),
        )

    async def _asset(self, resource: str, did: str) -> Asset:
        try:
            asset = await self.catalogue.asset(did)
        except CatalogueUnavailable:
            raise NotReady(_NO_CATALOGUE) from None
        except AssetMalformed:
            raise AssetRefused(resource, "file_unavailable", "the document of this asset (DDO) is malformed") from None
        except AssetWithheld as fault:
            raise AssetRefused(resource, "invalid", f"the asset cannot be used: {fault}") from None
        if asset is None:
            raise AssetRefused(f"{resource}.documentId", "did_not_found", "no asset of this id is known")
        return asset

    async def _ddo(self, did: str) -> Mapping[str, Any]:
        try:
            return await self.catalogue.ddo(did) or {}
        except (CatalogueUnavailable, AssetMalformed):
            # The latter since a moment ago, when the asset itself was found.
            raise NotReady(_NO_CATALOGUE) from None

    def _files(self, resource: str, asset: Asset, service: AssetService, ask: DatasetAsk) -> tuple[File, ...] | None:
        try:
            files = files_of(asset, service, self.key)
        except FilesUnavailable as fault:
            elsewhere = fault.lack in (Lack.NOT_FOR_US, Lack.NO_KEY)
            if elsewhere and service.type == "access":
                return None
            if elsewhere:
                raise AssetRefused(
                    f"{resource}.serviceId",
                    "compute_services_not_in_same_provider",
                    f"a service for computing has to be this provider's: {fault}",
                ) from None
            raise AssetRefused(resource, "file_unavailable", f"the files cannot be had: {fault}") from None
        try:
            return given_to(files, service, ask.userdata)
        except BadParameters as fault:
            raise AssetRefused(resource, "invalid", f"userdata: {fault}") from None

    async def _algorithm(self, ask: AlgorithmAsk, consumer: str) -> Part | None:
        """The published algorithm; None when the consumer brings its own."""
        if ask.meta is not None:
            if not any(ask.meta.get(name) for name in ("url", "rawcode", "remote")):
                raise AssetRefused(
                    "algorithm", "meta_oneof_url_rawcode_remote", "algorithm.meta: give one of url, rawcode, remote"
                )
            return None
        if not ask.document_id:
            raise AssetRefused(
                "algorithm", "missing_meta_documentId", "algorithm: give documentId or meta, one of the two"
            )
        part = await self._part("algorithm", ask, consumer, main=False)
        if part.asset.metadata.type != "algorithm":
            raise AssetRefused("algorithm", "not_algo", "the asset is a data set, not an algorithm")
        return part

    async def _trusted(self, found: _Found) -> dict[str, str]:
        """
        Raises AssetRefused unless every data set's owner lets this algorithm compute on it.

        Returns:
            The checksum the algorithm must still have when it is fetched, where an owner's trust hangs on it.
        """
        algorithm = found.algorithm
        rules = [(part, part.service.compute) for part in found.datasets if part.service.type == "compute"]
        publisher = None
        if algorithm is not None and any(
            rule.trusted_publishers and ANY not in rule.trusted_publishers for _, rule in rules
        ):
            publisher = await self._publisher(algorithm)
        pinned: dict[str, str] = {}
        checksum = None
        if algorithm is not None and any(
            trusted.files_checksum for _, rule in rules for trusted in rule.trusted_algorithms
        ):
            sums = await self._checksums(algorithm)
            checksum = files_checksum(sums)
            pinned = {"sha256": sums[0]}
        for part, rule in rules:
            code = algorithm_refusal(
                rule,
                did=algorithm.asset.id if algorithm else None,
                publisher=publisher,
                files_checksum=checksum,
                container_checksum=container_checksum(found.container.entrypoint, found.container.checksum),
                deny_unlisted=self.deny_unlisted,
            )
            if code is not None:
                raise AssetRefused(part.resource, code, _TRUST[code])
        return pinned

    async def _publisher(self, part: Part) -> str | None:
        """
        Who has published an asset: the owner of its NFT, as the chain says it now. A document of no chain has only
        its own word, and is as good as the catalogue it comes from; of a chain that nobody can ask, nobody knows.
        """
        if part.asset.chain_id is None:
            return part.asset.publisher
        chain = self.chains.get(part.asset.chain_id)
        if chain is None:
            return None
        try:
            return await chain.owner(part.asset.nft_address)
        except ChainUnavailable:
            raise NotReady(_NO_NODE) from None

    async def _checksums(self, algorithm: Part) -> list[str]:
        if algorithm.files is None:
            raise AssetRefused(
                "algorithm", "file_unavailable", "its files are at another provider, so nobody can check them"
            )
        try:
            async with asyncio.timeout(SECONDS_TO_CHECK), self.reads:
                return [await self._checksum(file) for file in algorithm.files]
        except (Unreachable, TimeoutError):
            raise AssetRefused("algorithm", "file_unavailable", "the algorithm cannot be read to check it") from None

    async def _checksum(self, file: File) -> str:
        limits, access = await self.reach(file)
        async with remotes(limits, access) as opened:
            return await _sha256(opened, file, limits.algorithm_bytes)

    async def reach(self, file: File) -> tuple[FetchLimits, Access]:
        """How *file* is read from here: as this process may, else as the first environment that may."""
        for limits, access in ((self.limits, self.access), *(await self.sources())):
            try:
                check_file(file, limits, access)
            except ForbiddenUrl:
                continue
            return limits, access
        return self.limits, self.access

    def _check_named(self, part: Part) -> None:
        if part.asset.chain_id is None:
            return
        if part.files is not None:
            self._chain(part)
        if not part.ask.transfer_tx_id:
            raise AssetRefused(f"{part.resource}.transferTxId", "missing", f"give {part.resource}.transferTxId")

    async def _ordered(self, part: Part, consumer: str, environment: str | None) -> Part:
        """The part with its order, which is checked on its chain. What is at another provider is checked there."""
        if part.asset.chain_id is None or part.files is None:
            return part
        chain = self._chain(part)
        try:
            order = await chain.order(
                tx_id=part.ask.transfer_tx_id,
                asset=part.asset,
                service=part.service,
                consumer=consumer,
                environment=environment,
            )
        except OrderInvalid as fault:
            if part.resource == "algorithm":
                raise AssetRefused("algorithm", "in_use_or_not_on_chain", f"transferTxId: {fault.reason}") from None
            raise AssetRefused(f"{part.resource}.serviceId", "order_invalid", f"transferTxId: {fault.reason}") from None
        except ChainUnavailable:
            raise NotReady(_NO_NODE) from None
        return replace(part, order=order)

    async def _known_order(self, part: Part, consumer: str, environment: str) -> Order | None:
        """An order that is still good, though its fees may have run out. One that is not mined yet is none."""
        if not part.ask.transfer_tx_id:
            return None
        try:
            return await self._chain(part).order(
                tx_id=part.ask.transfer_tx_id,
                asset=part.asset,
                service=part.service,
                consumer=consumer,
                environment=environment,
                allow_expired_fees=True,
                patient=False,
            )
        except OrderInvalid:
            return None
        except ChainUnavailable:
            raise NotReady(_NO_NODE) from None

    def _chain(self, part: Part) -> Chain:
        chain = self.chains.get(part.asset.chain_id or 0)
        if chain is None:
            raise AssetRefused(
                part.resource, "order_invalid", "the asset is on a chain that this provider does not serve"
            )
        return chain

    async def _fee(
        self,
        part: Part,
        *,
        environment: str | None,
        price: float,
        offer: Offer | None,
        valid_until: int,
        now: float,
    ) -> dict[str, Any]:
        """A fee of this provider's for *part*, of *price* a minute. Without an *environment* it is for a download."""
        if self.key is None:
            raise NotReady("This provider has no key to sign fees with; its operator has to configure one.")
        chain = self._chain(part)
        amount = 0
        if price and offer is not None:
            # What is left then, counted in the same whole seconds as when the order is shown: else a fee that was
            # right when it was signed would be too little a moment later.
            seconds = _seconds(max(0, math.floor(valid_until - now)), offer)
            try:
                amount = await chain.required_fee(seconds, price)
            except ChainUnavailable:
                raise NotReady(_NO_NODE) from None
        fee = chain.provider_fee(
            self.key.sign_hash,
            datatoken=part.service.datatoken,
            service_id=part.service.id,
            environment=environment,
            amount=amount,
            valid_until=valid_until,
            now=now,
        )
        return {"datatoken": _checksummed(part.service.datatoken), "providerFee": fee}

    async def _fees_elsewhere(self, parts: Collection[Part], consumer: str) -> dict[str, dict[str, Any]]:
        """
        What other providers ask for their files, by resource.

        Raises:
            AssetRefused: One of them refuses.
            SourceFailed: One of them does not answer as it should.
        """
        elsewhere = [part for part in parts if part.asset.chain_id is not None and part.files is None]
        if not elsewhere:
            return {}
        async with guarded_session(self.limits) as session:
            asked = [self._fee_elsewhere(session, part, consumer) for part in elsewhere]
            # Of several that fail it is the first in the request, not the first to answer.
            answers = await asyncio.gather(*asked, return_exceptions=True)
        entries = {}
        for part, answer in zip(elsewhere, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            entries[part.resource] = answer.model_dump(exclude_none=True)
        return entries

    async def _fee_elsewhere(self, session: aiohttp.ClientSession, part: Part, consumer: str) -> Initialized:
        try:
            return await initialize(
                session,
                part.service.endpoint,
                limits=self.limits,
                datatoken=part.service.datatoken,
                document_id=part.asset.id,
                service_id=part.service.id,
                consumer=consumer,
                tx_id=part.ask.transfer_tx_id,
                userdata=part.ask.userdata,
            )
        except ProviderRefuses:
            raise AssetRefused(
                part.resource, "file_unavailable", "the provider that has its files refuses them to consumerAddress"
            ) from None
        except ProviderUnreachable as fault:
            raise SourceFailed(f"{part.resource}: another provider has its files, and {fault.reason}") from None

    async def _paid(self, parts: Sequence[Part], offer: Offer) -> tuple[float, str | None]:
        """
        Seconds the job may take, and the transaction that paid for them; None when nothing had to be ordered.

        Raises AssetRefused when no order has paid for the time it was made for.
        """
        paying = await self._paying(parts, offer)
        if paying is not None and paying.order is not None:
            seconds = _seconds(paying.order.fee_seconds, offer) if offer.price_min else offer.limits.seconds
            return seconds, paying.order.tx_id
        if not offer.price_min:
            return offer.limits.seconds, None
        ordered = any(part.order is not None for part in parts)
        raise AssetRefused(
            "order",
            "fees_not_paid",
            "no order has paid for this environment; see initializeCompute" if ordered else _NOTHING_TO_CHARGE,
        )

    async def _paying(self, parts: Sequence[Part], offer: Offer) -> Part | None:
        """
        The part whose order the job runs under. Of several that have paid in full the latest: others may have paid
        for jobs before. Where nothing costs, the first that is ordered here at all.
        """
        if not offer.price_min:
            return next((part for part in parts if part.asset.chain_id is not None and part.files is not None), None)
        paid = [
            (part.order.timestamp, part)
            for part in parts
            if part.order is not None and await self._has_paid(part, part.order, offer)
        ]
        return max(paid, key=lambda each: each[0])[1] if paid else None

    async def _has_paid(self, part: Part, order: Order, offer: Offer) -> bool:
        chain = self._chain(part)
        try:
            required = await chain.required_fee(_seconds(order.fee_seconds, offer), offer.price_min)
        except ChainUnavailable:
            raise NotReady(_NO_NODE) from None
        return order.has_paid(required, chain.config.fee_token)

    async def _charged(self, parts: Sequence[Part], offer: Offer) -> str | None:
        """
        The resource that has to be ordered, or its order reused, for the price of the environment; None where that
        is paid. An order that a job was started with has paid for that one, though its fees may still be good.
        """
        paying = await self._paying(parts, offer)
        if paying is None:
            return parts[0].resource if parts else None
        if paying.order is None or await self.jobs.find(JobQuery(agreement_id=paying.order.tx_id)):
            return paying.resource
        return None


@dataclass(frozen=True)
class _Found:
    """All that a consumer named."""

    datasets: tuple[Part, ...]
    algorithm: Part | None
    container: Container

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.datasets, *([self.algorithm] if self.algorithm else []))


_TRANSACTION: Final = re.compile(r"0x[0-9a-f]{64}")
_HEX_WORD: Final = re.compile(r"[0-9a-fA-F]{64}")
_PLAIN_NAME: Final = re.compile(r"[\w.-]{1,64}", re.ASCII)

_NO_CATALOGUE: Final = "The catalogue of assets cannot be reached; try again in a moment."
_NO_NODE: Final = "The chain's node cannot be reached, so orders cannot be checked; try again in a moment."

_NOTHING_TO_CHARGE: Final = (
    "this environment has a price, and none of these assets is ordered from this provider on a chain; use a free one"
)

_CONTAINER: Final = {
    "missing_entrypoint_image_checksum": "algorithm container: give entrypoint, image and checksum",
    "checksum_prefix": "algorithm container: checksum must be sha256: and 64 hex digits",
}

_TRUST: Final = {
    "no_raw_algo_allowed": "the owner of this data set allows published algorithms only",
    "not_trusted_algo": "the owner of this data set does not trust this algorithm",
    "not_trusted_algo_publisher": "the owner of this data set does not trust the publisher of this algorithm",
    "no_publisherTrustedAlgorithms": "the list of trusted algorithms of this data set has an entry without a did",
    "algorithm_file_checksum_mismatch": "the algorithm's files are not those the owner of this data set trusts",
    "algorithm_container_checksum_mismatch": "the algorithm's container is not the one this data set's owner trusts",
}


def given_to(files: Iterable[File], service: AssetService, userdata: Mapping[str, Any]) -> tuple[File, ...]:
    """
    *files* of *service* with a consumer's *userdata*: all that its owner requires, and nothing that its owner has not
    declared (``consumerParameters``). With another parameter a trusted algorithm could become another one, and a
    source could be asked, with its owner's credentials, what the owner never meant to answer.

    Raises:
        BadParameters
    """
    missing = [each.name for each in service.parameters if each.required and each.name not in userdata]
    if missing:
        # The names are a stranger's text.
        named = ", ".join(name for name in missing if _PLAIN_NAME.fullmatch(name)) or "what the asset requires"
        raise BadParameters(f"{named} must be given")
    declared = {each.name for each in service.parameters}
    if not declared.issuperset(userdata):
        named = ", ".join(sorted(name for name in declared if _PLAIN_NAME.fullmatch(name)))
        raise BadParameters(f"its owner has declared no others than {named}" if named else "it takes none")
    return tuple(file.given(userdata) for file in files)


async def _sha256(opened: Any, file: File, ceiling: int) -> str:
    digest = hashlib.sha256()
    size = 0
    stream = await opened.open(file)
    try:
        while block := await stream.read():
            size += len(block)
            if size > ceiling:
                raise Unreachable(f"more than {ceiling} bytes")
            digest.update(block)
    finally:
        await stream.close()
    return digest.hexdigest()


def _transaction(tx_id: str) -> str:
    """With the 0x that some clients' libraries leave out of it; what is no transaction id stays as it is."""
    return f"0x{tx_id}" if _HEX_WORD.fullmatch(tx_id) else tx_id


def _checksummed(address: str) -> str:
    """As web3.py, for one, wants addresses; what is none stays as it is."""
    return str(to_checksum_address(address)) if is_address(address) else address


def _seconds(bought: int | None, offer: Offer) -> float:
    """What a job that has paid for *bought* seconds may take; None is as long as any."""
    return offer.limits.seconds if bought is None else min(float(max(1, bought)), offer.limits.seconds)


def _stage(
    ask: Ask,
    found: _Found,
    offer: Offer,
    *,
    seconds: float,
    pinned: Mapping[str, str],
    output: Mapping[str, Any],
) -> dict[str, Any]:
    """Of a workflow document."""
    return {
        "index": 0,
        "input": [_input(n, part) for n, part in enumerate(found.datasets)],
        "compute": {
            "Instances": 1,
            "namespace": offer.id,
            "maxtime": seconds,
            "network": all(part.service.compute.allow_network_access for part in found.datasets),
        },
        "algorithm": {
            **_code(ask.algorithm, found.algorithm),
            **pinned,
            "container": _written(found.container),
        },
        "output": output,
    }


def _container(ask: AlgorithmAsk, algorithm: Part | None) -> Container:
    """Of the algorithm that will run."""
    if algorithm is not None:
        metadata = algorithm.asset.metadata.algorithm
        if metadata is None:
            raise AssetRefused("algorithm", "not_algo", "the asset does not describe an algorithm")
        custom = ask.custom_data if isinstance(ask.custom_data, Mapping) else {}
        missing = [each.name for each in metadata.parameters if each.required and each.name not in custom]
        if missing:
            named = ", ".join(filter(_PLAIN_NAME.fullmatch, missing)) or "what the algorithm requires"
            raise AssetRefused("algorithm", "invalid", f"algocustomdata: {named} must be given")
        return metadata.container
    code = "missing_entrypoint_image_checksum"
    given = (ask.meta or {}).get("container")
    if isinstance(given, Mapping):
        try:
            return Container.model_validate({name: value for name, value in given.items() if value is not None})
        except ValidationError:
            raise AssetRefused("algorithm.container", "invalid", "its parts must be texts") from None
    raise AssetRefused("algorithm.container", code, _CONTAINER[code])


def _written(container: Container) -> dict[str, str]:
    """In the form of a workflow document, where an empty part is left out and a checksum is in lower case."""
    written = container.model_copy(update={"checksum": container.checksum.lower()})
    return {name: value for name, value in written.model_dump().items() if value}


def _code(ask: AlgorithmAsk, algorithm: Part | None) -> dict[str, Any]:
    common = {"algocustomdata": ask.custom_data, "algouserdata": dict(ask.userdata) or None}
    if algorithm is None:
        meta = ask.meta or {}
        given = {name: meta[name] for name in ("id", "rawcode", "remote", "envs") if meta.get(name)}
        if meta.get("url"):
            try:
                given["file"] = parse_file(meta["url"] if isinstance(meta["url"], Mapping) else {"url": meta["url"]})
            except BadFile as fault:
                raise AssetRefused("algorithm", "invalid", f"algorithm.meta.url: {fault}") from None
        return {**common, **given}
    if algorithm.files is None:
        return {**common, "id": algorithm.asset.id, "remote": _remote(algorithm)}
    return {**common, "id": algorithm.asset.id, "file": algorithm.files[0]}


def _input(index: int, part: Part) -> dict[str, Any]:
    source = {"remote": _remote(part)} if part.files is None else {"files": list(part.files)}
    return {"id": part.asset.id, "index": index, "ddo": dict(part.ddo), **source}


def _remote(part: Part) -> dict[str, Any]:
    return {
        "txId": part.ask.transfer_tx_id,
        "serviceId": part.service.id,
        "userdata": dict(part.ask.userdata) or None,
    }


def _output(given: Mapping[str, Any], metadata_url: str) -> dict[str, Any]:
    return {**given, **({"metadataUri": metadata_url} if metadata_url else {})}
