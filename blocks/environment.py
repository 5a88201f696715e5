"""A compute environment: what is on offer, the work pool that runs it, and where its files go."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient, SyncPrefectClient
from prefect.client.schemas.objects import BlockDocument
from prefect.exceptions import PrefectHTTPStatusError
from prefect.types import SecretDict
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from blocks.limits import CENTURY, Offer
from blocks.process import ProcessRunner
from blocks.remote import Access
from blocks.runner import Runner
from blocks.store import ResultStore

if TYPE_CHECKING:
    from blocks.keys import ProviderKey

_SLUG: Final = "compute-environment"

STATE_FOLDER: Final = "C2D_STATE"
"""Environment variable naming the folder of everything this service keeps on a machine."""


def state_folder() -> Path:
    """The service's own folder: ``$C2D_STATE``, else ``.c2d`` where the service was started."""
    return Path(os.environ.get(STATE_FOLDER, ".c2d")).resolve()


_NAME: Final = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
"""Of most things in a Kubernetes cluster."""
Name = Annotated[str, Field(pattern=_NAME)]


class KubernetesPlace(BaseModel):
    """Where the Jobs of an environment are run. What is left out is as ``deploy/kubernetes`` makes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    cluster: str = ""
    """Name of a saved block of type KubernetesClusterConfig. Empty: the cluster this runs in, else a kubeconfig."""
    context: str = ""
    """In that kubeconfig, which KUBECONFIG names. Empty: its current one."""
    namespace: Name = "c2d-jobs"
    claim: Name = "c2d-work"
    mount: str = ""
    """Where the claim is mounted for the flows. Empty: at the workspace itself."""
    account: Name = "c2d-algorithm"
    pull_secrets: tuple[Name, ...] = ()
    """Names of the secrets with credentials for registries."""
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] = ()
    runtime_class: str = ""
    runtime_class_offline: str = ""
    """For runs that may have no network. Empty: as for the others."""
    gpu_resource: str = "nvidia.com/gpu"
    wait_seconds: Annotated[int, Field(ge=0, le=CENTURY)] = 0
    """For a place on a node. 0: as long as a job may wait for its turn."""


class ComputeEnvironment(Block):
    """
    One compute environment, saved as the block ``compute-environment/<id>``.

    Paths and URLs left empty stand for folders below ``$C2D_STATE`` on the machine that uses them, so that one
    block serves machines whose folders differ.
    """

    # Else a field that is wrong is quoted together with the credentials beside it.
    model_config = ConfigDict(hide_input_in_errors=True)

    _block_type_name = "Compute environment"
    _block_type_slug = _SLUG
    _description = "Hardware, limits and price on offer to consumers, and the work pool that serves it."

    offer: Offer = Field(description="What consumers see, and the limits every job is held to.")
    work_pool: str = Field(description="The Prefect work pool whose workers run its jobs.")
    work_pool_type: str = Field(default="warm-process", description="Used when the pool has to be made.")
    work_pool_template: str = Field(
        default="",
        description="The same: JSON file of its base job template, relative to the file that defines the environment; "
        "empty: that of the worker type.",
    )
    runner: Literal["process", "docker", "kubernetes"] = Field(
        default="process",
        description=(
            "How an algorithm is shut in: as a sandboxed process, as a container of a Docker engine, "
            "or as a Job of a Kubernetes cluster."
        ),
    )
    allow_unsandboxed: bool = Field(
        default=False,
        description="Run algorithms with no sandbox at all where none can be had. For trusted algorithms only.",
    )
    system: tuple[Path, ...] = Field(
        default=(),
        description="Further folders of the machine an algorithm may read, such as an interpreter's.",
    )
    path: tuple[Path, ...] = Field(default=(), description="Folders of programs, first on the algorithm's PATH.")
    docker_host: str = Field(
        default="",
        description="The Docker engine of the worker's machine, such as unix:///run/docker.sock; empty: the usual one.",
    )
    docker_runtime: str = Field(
        default="", description="One of the engine's runtimes, such as runsc; empty: its default."
    )
    docker_network: str = Field(default="bridge", description="The engine's network for algorithms that may have one.")
    gpu_devices: tuple[str, ...] = Field(
        default=(),
        description="The engine's GPUs for its jobs, by number or UUID, in no other environment; empty: the first.",
    )
    kubernetes: KubernetesPlace = Field(
        default=KubernetesPlace(),
        description="The cluster, and where and how its Jobs are run.",
    )
    pull: Literal["always", "missing", "never"] = Field(
        default="missing",
        description="When a job asks for its image at the registry.",
    )
    registries: SecretDict = Field(
        default=SecretDict({}),
        description="username and password for pulling images, by host of the registry; docker.io for Docker's own.",
    )
    scratch_bytes: int = Field(
        default=0,
        ge=0,
        description="Size of a container's /tmp; 0: what a run may have of memory, or of disk if that is less.",
    )
    workspace: str = Field(default="", description="Folder for jobs in progress, on the worker's machine.")
    results: str = Field(default="", description="Where results are kept: any URL fsspec opens.")
    results_options: SecretDict = Field(
        default=SecretDict({}),
        description="Options and credentials of the result store, as fsspec takes them.",
    )
    link_seconds: int = Field(
        default=0,
        ge=0,
        le=604_800,
        description="Send who downloads a result on to the store, by a link that holds for so long; 0: not. S3 only.",
    )
    fetch_options: SecretDict = Field(
        default=SecretDict({}),
        description="Options and credentials for fetching inputs, by URL scheme, as fsspec takes them.",
    )

    ipfs_gateway: str = Field(
        default="",
        description="URL of the trustless IPFS gateway that files are fetched through; empty: there is none.",
    )
    arweave_gateway: str = Field(
        default="",
        description="URL of the Arweave gateway that files are fetched through; empty: there is none.",
    )
    chains: SecretDict = Field(
        default=SecretDict({}),
        description="URL of a JSON-RPC node by the id of its chain, for files that are values of contracts.",
    )

    signer: SecretStr = Field(
        default=SecretStr(""),
        description="Private key that signs for what is fetched from other providers, in hex; empty: there is none.",
    )
    metadata_stores: tuple[str, ...] = Field(
        default=(),
        description="URLs of the metadata stores in which assets of other providers may be looked up; none: any.",
    )

    @field_validator("ipfs_gateway", "arweave_gateway")
    @classmethod
    def _gateway(cls, url: str) -> str:
        return _http_url(url) if url else url

    @field_validator("metadata_stores")
    @classmethod
    def _stores(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_http_url, urls))

    @field_validator("chains")
    @classmethod
    def _nodes(cls, chains: SecretDict) -> SecretDict:
        for name, url in chains.get_secret_value().items():
            if not (name.isascii() and name.isdigit()):
                raise ValueError("has a name that is no id of a chain")
            _http_url(url)
        return chains

    @model_validator(mode="after")
    def _offers_what_its_runner_has(self) -> Self:
        if self.runner == "process" and self.offer.all_gpus:
            raise ValueError("the runner process has no GPU; offer none")
        if self.link_seconds and not self.results.startswith(("s3://", "s3a://")):
            raise ValueError("link_seconds is for results in S3 only")
        if self.gpu_devices and len(self.gpu_devices) != self.offer.all_gpus:
            raise ValueError(f"gpu_devices names {len(self.gpu_devices)} GPUs; the offer has {self.offer.all_gpus}")
        if self.gpu_devices and self.runner != "docker":
            raise ValueError("gpu_devices is for the runner docker only")
        if self.runner != "kubernetes" and self.kubernetes != KubernetesPlace():
            raise ValueError("kubernetes is for the runner kubernetes only")
        if self.runner == "kubernetes" and self.registries.get_secret_value():
            raise ValueError("registries is for the runner docker only; name the cluster's secrets in pull_secrets")
        if self.runner != "process" and (self.allow_unsandboxed or self.system or self.path):
            raise ValueError("allow_unsandboxed, system and path are for the runner process only")
        return self

    @field_validator("registries")
    @classmethod
    def _credentials(cls, registries: SecretDict) -> SecretDict:
        for host, credentials in registries.get_secret_value().items():
            if "/" in host:
                raise ValueError("has a name that is no host of a registry")
            texts = isinstance(credentials, dict) and all(isinstance(value, str) for value in credentials.values())
            if not texts or credentials.keys() != {"username", "password"}:
                raise ValueError("has an entry that is not a username and a password")
        return registries

    @model_validator(mode="after")
    def _is_known_by_its_key(self) -> Self:
        if (signer := self._signer()) is None:
            return self
        if not self.offer.consumer_address:
            self.offer = self.offer.model_copy(update={"consumer_address": signer.address})
        elif self.offer.consumer_address.lower() != signer.address.lower():
            raise ValueError(
                "offer.consumer_address is not that of signer, so nobody could fetch what is ordered to it"
            )
        return self

    def _signer(self) -> ProviderKey | None:
        if not (secret := self.signer.get_secret_value()):
            return None
        from blocks.keys import KeyUnusable, ProviderKey  # noqa: PLC0415 - a second to import, and few have a key

        try:
            return ProviderKey.from_secret(secret)
        except KeyUnusable as fault:
            raise ValueError(f"signer: {fault}") from None

    def make_runner(self) -> Runner:
        """The runner that shuts this environment's algorithms in."""
        if self.runner == "docker":
            from blocks.containers import DockerRunner  # noqa: PLC0415 - a third of a second that few need

            return DockerRunner(
                host=self.docker_host,
                pull=self.pull,
                registries=self.registries.get_secret_value(),
                runtime=self.docker_runtime,
                network=self.docker_network,
                scratch_bytes=self.scratch_bytes,
                pull_seconds=self.offer.fetch.seconds_total,
                # On one machine two services have two folders, and two workers of one service the same.
                service=str(self.workspace_root()),
                gpus=self.gpu_devices or tuple(map(str, range(self.offer.all_gpus))),
                gpu_turn=self.workspace_root() / f"{self.offer.id}.gpus",
                gpu_seconds=self.offer.max_wait or CENTURY,
            )
        if self.runner == "kubernetes":
            from blocks.pods import KubernetesRunner  # noqa: PLC0415 - a second that few need

            place = self.kubernetes
            return KubernetesRunner(
                namespace=place.namespace,
                claim=place.claim,
                mount=place.mount or str(self.workspace_root()),
                block=place.cluster,
                context=place.context,
                account=place.account,
                pull=self.pull,
                pull_secrets=place.pull_secrets,
                node_selector=place.node_selector,
                tolerations=place.tolerations,
                runtime_class=place.runtime_class,
                runtime_class_offline=place.runtime_class_offline,
                gpu_resource=place.gpu_resource,
                scratch_bytes=self.scratch_bytes,
                wait_seconds=place.wait_seconds or self.offer.max_wait or CENTURY,
                pull_seconds=self.offer.fetch.seconds_total,
                # Two services of one namespace have two folders on the claim, and two workers of one service the same.
                service=str(self.workspace_root()),
            )
        return ProcessRunner(system=self.system, path=self.path, allow_unsandboxed=self.allow_unsandboxed)

    def workspace_root(self) -> Path:
        return Path(self.workspace).resolve() if self.workspace else state_folder() / "work"

    def store(self) -> ResultStore:
        """Where results go."""
        return self._store("results")

    def documents(self) -> ResultStore:
        """Where sealed documents too large for a run's parameters go, beside the results."""
        return self._store("documents")

    def handover(self) -> ResultStore:
        """Where stages put what a stage in another flow run reads, beside the results. No consumer gets at it."""
        return self._store("handover")

    def _store(self, part: str) -> ResultStore:
        root = self.results.rstrip("/") or (state_folder() / "store").as_uri()
        return ResultStore(url=f"{root}/{part}", storage_options=self.results_options.get_secret_value())

    def access(self) -> Access:
        """How files are reached from here."""
        return Access(
            storage_options=self.fetch_options.get_secret_value(),
            ipfs_gateway=self.ipfs_gateway,
            arweave_gateway=self.arweave_gateway,
            chains={int(chain): url for chain, url in self.chains.get_secret_value().items()},
            signer=self._signer(),
            metadata_stores=self.metadata_stores,
        )


def _http_url(url: Any) -> str:
    if not (isinstance(url, str) and url.startswith(("http://", "https://"))):
        raise ValueError("is not a URL of http or https")
    return url


def environments_of(documents: Iterable[BlockDocument]) -> dict[str, ComputeEnvironment]:
    """The environments saved in *documents*, by the id they offer."""
    blocks = [ComputeEnvironment._from_block_document(document) for document in documents]
    return {block.offer.id: block for block in blocks}


async def load_environments(client: PrefectClient) -> dict[str, ComputeEnvironment]:
    """Every saved environment, by id; empty on a server where none was ever registered."""
    try:
        return environments_of(await client.read_block_documents_by_type(_SLUG))
    except PrefectHTTPStatusError as answer:
        if answer.response.status_code != 404:
            raise
        return {}


def load_environments_sync(client: SyncPrefectClient) -> dict[str, ComputeEnvironment]:
    """``load_environments`` for a flow, which has no event loop."""
    return environments_of(client.read_block_documents_by_type(_SLUG))
