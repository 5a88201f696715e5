"""From ``definitions.environments`` of prefect.yaml to saved blocks and work pools."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import yaml
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.plugins import load_prefect_collections
from prefect.utilities.templating import apply_values
from prefect.workers.base import BaseWorker

from blocks.environment import ComputeEnvironment

COORDINATORS: Final = "_stages"
"""
Queue of each pool for the runs of jobs that are in several environments; see ``flows.stages``. No id of an environment
begins so.
"""

MOST_COORDINATORS: Final = 20
"""
Slots of that queue when it is made: so many processes do nothing but wait for others. No run that one of them waits for
waits for such a slot, so any number will do but none.
"""


def read_definitions(path: Path) -> list[ComputeEnvironment]:
    """
    The environments a prefect.yaml defines. ``{{ $NAME }}`` stands for an environment variable, as elsewhere in
    that file; a variable that is not set leaves its key out, so that the default holds.
    """
    document = yaml.safe_load(path.read_text())
    defined: list[dict[str, Any]] = document.get("definitions", {}).get("environments", [])
    return [ComputeEnvironment.model_validate(_filled(apply_values(one, dict(os.environ)))) for one in defined]


def _filled(value: Any) -> Any:
    """Without the keys whose value is an empty text: what Prefect's templates make of a variable that is not set."""
    if isinstance(value, dict):
        return {key: _filled(part) for key, part in value.items() if part != ""}
    return value


def register_from(path: Path) -> list[str]:
    """
    Register every environment that *path* defines, its work pool, and its queue in that. Safe to repeat.

    Returns their ids.

    Raises:
        ValueError: Two environments want one pool of two kinds, or a template cannot be used.
    """
    environments = read_definitions(path)
    pools: dict[str, tuple[str, str]] = {}
    for environment in environments:
        wanted = (environment.work_pool_type, environment.work_pool_template)
        if pools.setdefault(environment.work_pool, wanted) != wanted:
            raise ValueError(f"environments of the work pool {environment.work_pool} differ in its type or template")
    with get_client(sync_client=True) as client:
        for name, (kind, template) in pools.items():
            _ensure_pool(client, name, kind, path.parent / template if template else None)
        for name in pools:
            _ensure_queue(client, name, COORDINATORS, MOST_COORDINATORS, keep=True)
        for environment in environments:
            _ensure_queue(client, environment.work_pool, environment.offer.id, environment.offer.max_jobs)
    for environment in environments:
        environment.save(environment.offer.id, overwrite=True)
    return [environment.offer.id for environment in environments]


def _ensure_pool(client: SyncPrefectClient, name: str, kind: str, template: Path | None) -> None:
    """
    Make the pool; in one that is there, what an operator changed stays: a limit of the whole pool, its template.
    """
    given = _template_in(template) if template is not None else None
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=given or _template(kind)))


def _ensure_queue(client: SyncPrefectClient, pool: str, name: str, slots: int, *, keep: bool = False) -> None:
    """
    Make the queue of an environment in its pool, or bring the limit of the one there is up to date unless it is to
    *keep* the one it has.

    ``max_jobs`` is the queue's concurrency limit: Prefect's own, so that a waiting job costs nothing. A queue and not
    the pool, so that an environment whose slots are taken does not hold up another one: Prefect looks at the limit of
    each queue before it gives out what waits.
    """
    try:
        queue = client.read_work_queue_by_name(name, work_pool_name=pool)
    except ObjectNotFound:
        client.create_work_queue(name, work_pool_name=pool, concurrency_limit=slots)
    else:
        if not keep or queue.concurrency_limit is None:
            client.update_work_queue(queue.id, concurrency_limit=slots)


def _template_in(file: Path) -> dict[str, Any]:
    """
    The job template in *file*.

    Raises:
        ValueError: It is not there or is no template.
    """
    try:
        template = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise ValueError(f"the base job template {file} cannot be read as JSON: {fault}") from None
    if not isinstance(template, dict) or not {"job_configuration", "variables"} <= template.keys():
        raise ValueError(f"{file} is no base job template: it has no job_configuration and variables")
    return template


def _template(kind: str) -> dict[str, Any]:
    """The job template of a worker type that is installed here; no look-up on the internet."""
    load_prefect_collections()
    worker = BaseWorker.get_worker_class_from_type(kind)
    if worker is None:
        raise ValueError(
            f"no worker of type {kind!r} is installed; there is {BaseWorker.get_all_available_worker_types()}"
        )
    return worker.get_default_base_job_template()
