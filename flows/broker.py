"""
What a consumer asks for, looked up, checked against the rules of its owners, and put together to a workflow document.

The same for every dialect in which consumers speak. Contract, sections 4, 6 and 7.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError

from blocks.assets import Asset, AssetMalformed, AssetService, AssetWithheld, Container
from blocks.catalogue import Catalogue, CatalogueUnavailable
from blocks.chain import Chain, ChainUnavailable, Order, OrderInvalid, did_of
from blocks.files import BadFile, BadParameters, File, parse_file
from blocks.keys import FilesUnavailable, Lack, ProviderKey, files_of
from blocks.limits import FetchLimits, Offer
from blocks.remote import Access, Unreachable, remotes
from flows.errors import AssetRefused, InvalidParameter, NotReady, UnknownEnvironment
from flows.jobs import Jobs
from flows.trust import algorithm_refusal, consumer_may, container_checksum, container_refusal, files_checksum
from flows.workflow import Workflow, parse_workflow

MAX_DATASETS: Final = 100
_NEEDED: Final = ("documentId", "serviceId")
SECONDS_TO_CHECK: Final = 60.0
"""Deadline of reading an algorithm for its checksum."""


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

    def workflow(self, agreement_id: str) -> Workflow:
        """Raises InvalidWorkflow, for example when raw code has a form that no document may have."""
        return parse_workflow({"agreementId": agreement_id, "owner": self.consumer, "stages": [self.stage]})


@dataclass(frozen=True)
class Broker:
    """
    Args:
        chains: By id. Without any, only free environments are on offer, and only assets of no chain can be used.
        limits, access: How this process itself may fetch, to look at files and to hand them on.
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
        algorithm = await self._algorithm(ask.algorithm, ask.consumer)
        container = _container(ask.algorithm, algorithm)
        if ask.image_pinned and (code := container_refusal(container)):
            raise AssetRefused("algorithm.container", code, _CONTAINER[code])
        datasets = []
        for n, dataset in enumerate(ask.datasets):
            part = await self._part(f"datasets[{n}]" if n else "dataset", dataset, ask.consumer, main=n == 0)
            datasets.append(await self._ordered(part, ask.consumer, offer.id))
        pinned = await self._trusted(datasets, algorithm, container)
        if algorithm is not None:
            algorithm = await self._ordered(algorithm, ask.consumer, offer.id)
        parts = [*datasets, *([algorithm] if algorithm else [])]
        seconds, paid_by = await self._paid(parts, offer)
        output = _output(ask.output, self.metadata_url)
        stage = {
            "index": 0,
            "input": [_input(n, part) for n, part in enumerate(datasets)],
            "compute": {
                "Instances": 1,
                "namespace": offer.id,
                "maxtime": seconds,
                "network": all(part.service.compute.allow_network_access for part in datasets),
            },
            "algorithm": {**_code(ask.algorithm, algorithm), **pinned, "container": _written(container)},
            "output": output,
        }
        return Approved(stage=stage, consumer=ask.consumer, paid_by=paid_by)

    async def fees(self, ask: Ask, valid_until: int) -> dict[str, Any]:
        """
        What has to be paid and ordered before *ask* is approved, until *valid_until* (Unix time, seconds).

        Returns:
            ``{"datasets": [...], "algorithm": ...}`` as the Provider answers it; an asset of no chain needs no order
            and has an empty entry. The whole price of the environment stands with the first that can be charged.

        Raises:
            As ``approve``.
        """
        offer = await self.offer(ask.environment)
        left = valid_until - self.now()
        if left <= 0:
            raise InvalidParameter("compute.validUntil: must be a Unix time in the future, in seconds")
        if left > offer.limits.seconds + _GRACE:
            raise InvalidParameter(
                f"compute.validUntil: at most {offer.limits.seconds:g} s from now, the environment's longest job"
            )
        algorithm = await self._algorithm(ask.algorithm, ask.consumer)
        datasets = [
            await self._part(f"datasets[{n}]", dataset, ask.consumer, main=n == 0)
            for n, dataset in enumerate(ask.datasets)
        ]
        container = _container(ask.algorithm, algorithm)
        await self._trusted(datasets, algorithm, container)
        parts = [*datasets, *([algorithm] if algorithm else [])]
        known = [await self._known_order(part, ask.consumer, offer.id) for part in parts]
        charged = next(
            (n for n, order in enumerate(known) if order is not None and order.fee_valid_until >= valid_until),
            next((n for n, part in enumerate(parts) if part.files is not None and part.asset.chain_id is not None), -1),
        )
        entries = [
            await self._fee(part, order, offer, valid_until, charge=n == charged)
            for n, (part, order) in enumerate(zip(parts, known, strict=True))
        ]
        answer: dict[str, Any] = {"datasets": entries[: len(datasets)]}
        if algorithm is not None:
            answer["algorithm"] = entries[-1]
        return answer

    async def access_fee(self, ask: DatasetAsk, consumer: str) -> tuple[Part, dict[str, Any]]:
        """
        What has to be paid for a download: nothing to this provider, but its signature on that is part of an order.

        Raises:
            As ``approve``; AssetRefused for a service that is not for downloads.
        """
        part = await self.download(ask, consumer)
        offer = Offer(id="download")
        return part, await self._fee(part, None, offer, 0, charge=False, environment=None)

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
        return await self._ordered(part, consumer, None) if ordered else part

    async def agreed(self, agreement_id: str, consumer: str, algorithm: str | None) -> DatasetAsk:
        """
        The data set an agreement is about: one that its owner has granted in the catalogue, or an order on a chain,
        by its transaction. *algorithm* is the published one that is to run.

        Raises:
            AssetRefused: There is no such agreement, or it is another consumer's or about another algorithm.
            NotReady
        """
        try:
            agreement = await self.catalogue.agreement(agreement_id)
        except CatalogueUnavailable:
            raise NotReady(_NO_CATALOGUE) from None
        if agreement is not None:
            if agreement.consumer and agreement.consumer != consumer.lower():
                raise AssetRefused("order", "order_invalid", "this agreement is another consumer's")
            if agreement.algorithm and agreement.algorithm != algorithm:
                raise AssetRefused("algorithm", "not_trusted_algo", "this agreement is about another algorithm")
            if agreement.service_id:
                return DatasetAsk(agreement.did, agreement.service_id)
            return await self.only_service(agreement.did, "compute")
        for chain_id, chain in self.chains.items():
            try:
                ordered = await chain.ordered(agreement_id)
            except OrderInvalid:
                continue
            except ChainUnavailable:
                raise NotReady(_NO_NODE) from None
            did = did_of(ordered.nft, chain_id)
            asset = await self._asset("dataset", did)
            if ordered.service_index < len(asset.services):
                return DatasetAsk(did, asset.services[ordered.service_index].id, agreement_id)
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
            ask=ask,
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
        missing = [each.name for each in service.parameters if each.required and each.name not in ask.userdata]
        if missing:
            raise AssetRefused(resource, "invalid", f"userdata: {', '.join(missing)} must be given")
        try:
            return tuple(file.given(ask.userdata) for file in files)
        except BadParameters as fault:
            raise AssetRefused(resource, "invalid", f"userdata: {fault}") from None

    async def _algorithm(self, ask: AlgorithmAsk, consumer: str) -> Part | None:
        """The published algorithm; None when the consumer brings its own."""
        if ask.meta is not None:
            if not any(ask.meta.get(name) for name in ("url", "rawcode", "remote", "file")):
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

    async def _trusted(self, datasets: Sequence[Part], algorithm: Part | None, container: Container) -> dict[str, str]:
        """
        Raises AssetRefused unless every data set's owner lets this algorithm compute on it.

        Returns:
            The checksum the algorithm must still have when it is fetched, where an owner's trust hangs on it.
        """
        rules = [(part, part.service.compute) for part in datasets if part.service.type == "compute"]
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
                publisher=algorithm.asset.publisher if algorithm else None,
                files_checksum=checksum,
                container_checksum=container_checksum(container.entrypoint, container.checksum),
                deny_unlisted=self.deny_unlisted,
            )
            if code is not None:
                raise AssetRefused(part.resource, code, _TRUST[code])
        return pinned

    async def _checksums(self, algorithm: Part) -> list[str]:
        if algorithm.files is None:
            raise AssetRefused(
                "algorithm", "file_unavailable", "its files are at another provider, so nobody can check them"
            )
        try:
            async with asyncio.timeout(SECONDS_TO_CHECK), remotes(self.limits, self.access) as opened:
                return [await _sha256(opened, file, self.limits.algorithm_bytes) for file in algorithm.files]
        except (Unreachable, TimeoutError):
            raise AssetRefused("algorithm", "file_unavailable", "the algorithm cannot be read to check it") from None

    async def _ordered(self, part: Part, consumer: str, environment: str | None) -> Part:
        """The part with its order, which is checked on its chain. What is at another provider is checked there."""
        if part.asset.chain_id is None:
            return part
        if not part.ask.transfer_tx_id:
            raise AssetRefused(f"{part.resource}.transferTxId", "missing", f"give {part.resource}.transferTxId")
        if part.files is None:
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
        return Part(
            resource=part.resource,
            ask=part.ask,
            asset=part.asset,
            service=part.service,
            files=part.files,
            ddo=part.ddo,
            order=order,
        )

    async def _known_order(self, part: Part, consumer: str, environment: str) -> Order | None:
        """An order that is still good, though its fees may have run out."""
        if part.asset.chain_id is None or part.files is None or not part.ask.transfer_tx_id:
            return None
        try:
            return await self._chain(part).order(
                tx_id=part.ask.transfer_tx_id,
                asset=part.asset,
                service=part.service,
                consumer=consumer,
                environment=environment,
                allow_expired_fees=True,
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
        order: Order | None,
        offer: Offer,
        valid_until: int,
        *,
        charge: bool,
        environment: str | None = "",
    ) -> dict[str, Any]:
        if part.asset.chain_id is None or part.files is None:
            return {}
        reusable = {"validOrder": order.start_tx_id} if order is not None else {}
        if order is not None and order.fee_valid_until >= valid_until:
            return reusable
        if self.key is None:
            raise NotReady("This provider has no key to sign fees with; its operator has to configure one.")
        chain = self._chain(part)
        amount = 0
        try:
            if charge:
                amount = await chain.required_fee(valid_until - self.now(), offer.price_min)
        except ChainUnavailable:
            raise NotReady(_NO_NODE) from None
        fee = chain.provider_fee(
            self.key.sign_hash,
            datatoken=part.service.datatoken,
            service_id=part.service.id,
            environment=offer.id if environment == "" else environment,
            amount=amount,
            valid_until=valid_until,
            now=self.now(),
        )
        return {**reusable, "datatoken": part.service.datatoken, "providerFee": fee}

    async def _paid(self, parts: Iterable[Part], offer: Offer) -> tuple[float, str | None]:
        """
        Seconds the job may take, and the transaction that paid for them; None when nothing is to be paid.

        Raises AssetRefused when no order has paid for the time that is left until its fees run out.
        """
        orders = [(part, part.order) for part in parts if part.order is not None]
        first = orders[0][1].tx_id if orders else None
        if not offer.price_min:
            return offer.limits.seconds, first
        ends = [order.fee_valid_until for _, order in orders]
        left = max((end - self.now() for end in ends if end), default=offer.limits.seconds)
        seconds = max(1.0, min(left, offer.limits.seconds))
        for part, order in orders:
            chain = self._chain(part)
            try:
                required = await chain.required_fee(seconds, offer.price_min)
            except ChainUnavailable:
                raise NotReady(_NO_NODE) from None
            if order.has_paid(required, chain.config.fee_token):
                return seconds, order.tx_id
        raise AssetRefused(
            "order",
            "fees_not_paid",
            f"no order has paid for {seconds:.0f} s in this environment; see initializeCompute",
        )


_GRACE: Final = 300
"""Seconds a client's clock and its way to us may add to the longest job."""

_NO_CATALOGUE: Final = "The catalogue of assets cannot be reached; try again in a moment."
_NO_NODE: Final = "The chain's node cannot be reached, so orders cannot be checked; try again in a moment."

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


def _container(ask: AlgorithmAsk, algorithm: Part | None) -> Container:
    """Of the algorithm that will run."""
    if algorithm is not None:
        metadata = algorithm.asset.metadata.algorithm
        if metadata is None:
            raise AssetRefused("algorithm", "not_algo", "the asset does not describe an algorithm")
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
    """In the form of a workflow document, where an empty part is left out."""
    return {name: value for name, value in container.model_dump().items() if value}


def _code(ask: AlgorithmAsk, algorithm: Part | None) -> dict[str, Any]:
    common = {"algocustomdata": ask.custom_data, "algouserdata": dict(ask.userdata) or None}
    if algorithm is None:
        meta = ask.meta or {}
        given = {name: meta[name] for name in ("rawcode", "remote", "envs") if meta.get(name)}
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
