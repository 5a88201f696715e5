"""Runs that nobody runs any more, over a real Prefect server: which are taken up, and which are left alone."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Late, Pending, Running, Scheduled

from blocks.environment import load_environments
from flows.prefect_jobs import DELETING, PrefectJobs
from flows.reconcile import (
    CLAIM_SECONDS,
    HANDED_BACK,
    LONGEST_PAUSE,
    MOST_RESUMES,
    PEER_SECONDS,
    Reconciler,
    claimed,
    give_up,
    pause,
    resumes,
    worker_of,
)
from flows.sealing import Seal, create_key_file
from flows.states import DIED, LOST, STOPPED_IN_QUEUE, taken_out_of_the_queue
from flows.status import Status
from flows.worker import WarmProcessWorker, own_name
from tasks.workspace import held
from tests.conftest import PrefectServer
from tests.test_jobs_contract import ENVIRONMENT, by_id, document, only, spread, stage_run

pytestmark = pytest.mark.anyio

POOL: Final = "unattended"
ME: Final = "reconciler of the tests"
OTHER: Final = "another worker"


def at(seconds: float, state: State[Any]) -> State[Any]:
    return state.model_copy(update={"timestamp": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)})


def test_only_losses_since_the_last_beginning_count() -> None:
    """What was handed back in order is nobody's fault, and a restart begins anew."""
    lost: State[Any] = AwaitingRetry(message=LOST)
    died: State[Any] = AwaitingRetry(message=f"{DIED}: code -9")
    back: State[Any] = AwaitingRetry(message=HANDED_BACK)
    states = [Scheduled(), Pending(), Running(), lost, Pending(), Running(), died, back, Pending()]
    assert 2 == resumes([at(n, state) for n, state in enumerate(states)])
    assert 2 == resumes([at(-n, state) for n, state in enumerate(reversed(states))])
    assert 0 == resumes([at(n, state) for n, state in enumerate([*states, Completed(), Scheduled()])])


def test_pauses_grow_and_are_bounded() -> None:
    assert [0, 1, 2, 4] == [pause(n) for n in range(4)]
    assert LONGEST_PAUSE == pause(MOST_RESUMES)


@dataclass
class World:
    """A Prefect server, and a reconciler whose worker runs what it is told to run."""

    client: PrefectClient
    jobs: PrefectJobs
    live: set[UUID] = field(default_factory=set)
    stopped: list[UUID] = field(default_factory=list)
    left: list[UUID] = field(default_factory=list)
    claimed: list[UUID] = field(default_factory=list)

    def reconciler(self, **other: Any) -> Reconciler:
        async def stop(run_id: UUID) -> None:
            self.stopped.append(run_id)

        async def leave(run_id: UUID) -> None:
            self.left.append(run_id)

        return Reconciler(
            client=self.client,
            jobs=lambda: self.jobs,
            work_pool=POOL,
            worker=ME,
            live=lambda: self.live,
            stop=stop,
            leave=leave,
            logger=logging.getLogger(__name__),
        )

    async def claim(self, *, by: str = ME, running: bool = True) -> UUID:
        """A job that a worker has claimed, and of which a process runs then."""
        job = await self.jobs.submit(document(environment=ENVIRONMENT))
        run_id = UUID(job.id)
        self.claimed.append(run_id)
        await self.client.set_flow_run_state(run_id, claimed(by))
        if running:
            await self.client.update_flow_run_labels(run_id, {"prefect.worker.name": by})
            await self.client.set_flow_run_state(run_id, Running())
        return run_id

    async def state(self, run_id: UUID) -> State[Any]:
        state = (await self.client.read_flow_run(run_id)).state
        assert state is not None
        return state


@pytest.fixture
async def world(prefect_server: PrefectServer) -> AsyncIterator[World]:
    create_key_file(prefect_server.key_file)
    with temporary_settings({PREFECT_API_URL: prefect_server.api}):
        async with get_client() as client:
            opened = World(client, PrefectJobs(client, Seal.from_file(prefect_server.key_file)))
            yield opened
            # They would stand before those of other tests.
            for run_id in opened.claimed:
                with suppress(ObjectNotFound):
                    await client.delete_flow_run(run_id)


@pytest.mark.server
@pytest.mark.parametrize("running", [False, True])
async def test_what_this_worker_ran_before_is_taken_up(world: World, running: bool) -> None:
    """Claimed or running, under its name, and not by it: back into the queue, at once, and only that."""
    lost, mine = await world.claim(running=running), await world.claim(running=running)
    world.live.add(mine)
    assert lost in await world.reconciler().runs()
    state = await world.state(lost)
    assert (StateType.SCHEDULED, "AwaitingRetry", LOST) == (state.type, state.name, state.message)
    assert (await world.state(mine)).type in (StateType.PENDING, StateType.RUNNING)


@pytest.mark.server
async def test_what_an_api_process_left_half_done_is_done(world: World) -> None:
    """A job taken out of the queue to be stopped is stopped, not taken up; a deletion that was begun is finished."""
    stopped, deleted = [await world.jobs.submit(document(environment=ENVIRONMENT)) for _ in range(2)]
    await world.client.set_flow_run_state(UUID(stopped.id), taken_out_of_the_queue(STOPPED_IN_QUEUE))
    await world.client.update_flow_run(UUID(deleted.id), tags=[DELETING, f"environment:{ENVIRONMENT}"])
    reconciler = world.reconciler()
    assert UUID(stopped.id) not in await reconciler.runs()
    await reconciler.upkeep()
    assert StateType.CANCELLED is (await world.state(UUID(stopped.id))).type
    with pytest.raises(ObjectNotFound):
        await world.client.read_flow_run(UUID(deleted.id))


@pytest.mark.server
async def test_a_run_that_was_being_stopped_is_stopped(world: World) -> None:
    """Nobody was there any more who could have ended it; it is not brought back to life."""
    run_id = await world.claim()
    await world.client.set_flow_run_state(run_id, Cancelling(message="stopped on request"))
    await world.reconciler().runs()
    state = await world.state(run_id)
    assert (StateType.CANCELLED, "stopped on request") == (state.type, state.message)


@pytest.mark.server
async def test_a_stop_that_was_not_heard_is_passed_on(world: World) -> None:
    """To the worker whose run it is: events are lost while the server is away."""
    run_id = await world.claim()
    world.live.add(run_id)
    await world.client.set_flow_run_state(run_id, Cancelling(message="stopped on request"))
    reconciler = world.reconciler()
    deadline = time.monotonic() + 30
    while not world.stopped and time.monotonic() < deadline:
        assert run_id not in await reconciler.runs()
        await asyncio.sleep(0.2)
    assert run_id in world.stopped
    assert StateType.CANCELLING is (await world.state(run_id)).type


@pytest.mark.server
async def test_stages_of_jobs_that_have_ended_are_stopped(world: World) -> None:
    """And those of jobs that are no more; one of a job that goes on is taken up again, like a job, when it was lost."""
    going, ended = [await world.jobs.submit(spread(ENVIRONMENT, "fading")) for _ in range(2)]
    await world.client.set_flow_run_state(UUID(ended.id), Cancelled(), force=True)
    of_none = replace(going, id=uuid4().hex)
    runs = [await stage_run(world.client, job, 0, ENVIRONMENT) for job in (going, ended, of_none)]
    world.claimed.extend((UUID(going.id), UUID(ended.id), *runs))
    for run_id in runs:
        await world.client.set_flow_run_state(run_id, claimed(ME))
        await world.client.update_flow_run_labels(run_id, {"prefect.worker.name": ME})
        await world.client.set_flow_run_state(run_id, Running())
    lost, *over = runs
    world.live.update(over)
    reconciler = world.reconciler()
    assert lost in await reconciler.runs()
    assert "AwaitingRetry" == (await world.state(lost)).name
    assert [StateType.CANCELLING] * 2 == [(await world.state(run_id)).type for run_id in over]
    world.live.clear()
    await reconciler.runs()
    assert [StateType.CANCELLED] * 2 == [(await world.state(run_id)).type for run_id in over]


@pytest.mark.server
async def test_another_workers_runs_are_left_alone_while_it_reports(world: World) -> None:
    """And for a while after that, since all are silent when the server was away; then they are taken up."""
    run_id = await world.claim(by=OTHER)
    of_the_dead = await world.claim(by=(dead := f"dead {uuid4()}"))
    reconciler = world.reconciler()
    await world.client.send_worker_heartbeat(POOL, OTHER)
    try:
        assert not {run_id, of_the_dead} & set(await reconciler.runs())
        assert [dead] == list(reconciler._silent_since)
        reconciler._silent_since[dead] -= PEER_SECONDS
        assert of_the_dead in await reconciler.runs()
    finally:
        # To other tests nobody serves this pool.
        path = {"work_pool_name": POOL, "name": OTHER}
        await world.client.request("DELETE", "/work_pools/{work_pool_name}/workers/{name}", path_params=path)
    assert "AwaitingRetry" == (await world.state(of_the_dead)).name
    assert StateType.RUNNING is (await world.state(run_id)).type


@pytest.mark.server
async def test_a_run_that_another_worker_took_up_is_ended_here(world: World) -> None:
    """Both would go on with it."""
    run_id = await world.claim(by=OTHER)
    world.live.add(run_id)
    await world.reconciler().runs()
    assert run_id in world.left
    assert StateType.RUNNING is (await world.state(run_id)).type


@pytest.mark.server
async def test_a_claim_that_does_not_say_whose_it_is(world: World) -> None:
    """A stock worker's, or an earlier version's. It has time to become a run."""
    job = await world.jobs.submit(document(environment=ENVIRONMENT))
    run_id = UUID(job.id)
    world.claimed.append(run_id)
    await world.client.set_flow_run_state(run_id, Pending())
    run = await world.client.read_flow_run(run_id)
    assert worker_of(run) is None
    reconciler = world.reconciler()
    assert run_id not in await reconciler.runs()
    assert reconciler._lost(_older(run, CLAIM_SECONDS), set())


def _older(run: FlowRun, seconds: float) -> FlowRun:
    assert run.state is not None
    earlier = run.state.model_copy(update={"timestamp": run.state.timestamp - timedelta(seconds=seconds + 1)})
    return run.model_copy(update={"state": earlier})


@pytest.mark.server
async def test_what_is_lost_again_and_again_is_ended(world: World) -> None:
    """Else it would go round for ever; how it ends is told by the step it was in."""
    run_id = await world.claim()
    for _ in range(MOST_RESUMES):
        state = await give_up(world.client, run_id, DIED, "code -9")
        assert state is not None and state.name == "AwaitingRetry"
        await world.client.set_flow_run_state(run_id, claimed(ME))
        await world.client.set_flow_run_state(run_id, Running(), force=True)
    back = await give_up(world.client, run_id, HANDED_BACK)
    assert back is not None and back.name == "AwaitingRetry"
    await world.client.set_flow_run_state(run_id, Running(), force=True)
    state = await give_up(world.client, run_id, DIED, "code -9")
    assert state is not None and StateType.CRASHED is state.type
    assert StateType.CRASHED is (await world.state(run_id)).type


@pytest.mark.server
async def test_a_run_that_has_ended_is_not_given_up(world: World) -> None:
    """Whoever says so was late."""
    run_id = await world.claim()
    await world.client.set_flow_run_state(run_id, Completed(name="Job completed"))
    assert await give_up(world.client, run_id, LOST) is None
    assert await give_up(world.client, uuid4(), LOST) is None
    assert "Job completed" == (await world.state(run_id)).name


@pytest.mark.server
async def test_a_run_that_has_changed_since_it_was_seen_is_not_given_up(world: World) -> None:
    """Another worker was quicker: what was true of the run then is not true of it now."""
    run_id = await world.claim()
    seen = (await world.state(run_id)).id
    assert await give_up(world.client, run_id, LOST, seen=seen) is not None
    await world.client.set_flow_run_state(run_id, claimed(OTHER))
    assert await give_up(world.client, run_id, LOST, seen=seen) is None
    assert await give_up(world.client, run_id, DIED, worker=ME) is None
    assert StateType.PENDING is (await world.state(run_id)).type


@pytest.mark.server
async def test_a_run_that_waited_for_long_goes_back_too(world: World) -> None:
    """To the server a claimed run cannot become late; and what was lost once does not count as lost twice."""
    worker = WarmProcessWorker(work_pool_name=POOL, name=f"{ME} {uuid4()}")
    worker._client = world.client
    late, lost = await world.claim(running=False), await world.claim(running=False)
    run = await world.client.read_flow_run(late)
    await worker._put_back(run.model_copy(update={"state": Late()}))
    assert (StateType.SCHEDULED, "Scheduled") == ((await world.state(late)).type, (await world.state(late)).name)
    assert await give_up(world.client, lost, LOST) is not None
    run = await world.client.read_flow_run(lost)
    await world.client.set_flow_run_state(lost, claimed(worker.name))
    await worker._put_back(run)
    assert "AwaitingRetry" == (await world.state(lost)).name
    assert 1 == resumes(await world.client.read_flow_run_states(lost))


@pytest.mark.server
async def test_folders_that_no_job_needs_any_more_are_removed(world: World) -> None:
    """Of jobs that are completed or unknown; not of those that may go on, and of none that somebody works in."""
    root = (await load_environments(world.client))[ENVIRONMENT].workspace_root()
    going, done = await world.claim(), await world.claim()
    await world.client.set_flow_run_state(done, Completed(name="Job completed"))
    unknown, busy = uuid4(), uuid4()
    for run_id in (going, done, unknown):
        with held(root, run_id.hex, 3600):
            pass
    with held(root, busy.hex, 3600):
        gone = await world.reconciler().folders()
        assert {done.hex, unknown.hex} <= set(gone)
        assert [True, True, False, False] == [(root / each.hex).is_dir() for each in (going, busy, done, unknown)]


@pytest.mark.server
async def test_the_process_that_a_lost_run_has_left_is_ended(world: World) -> None:
    """One that was started cold outlives its worker; it would work beside the next."""
    run_id = await world.claim()
    program = [sys.executable, "-c", "import time; time.sleep(600)"]
    left = await asyncio.create_subprocess_exec(*program, env={**os.environ, "PREFECT__FLOW_RUN_ID": str(run_id)})
    await asyncio.sleep(0.2)
    await world.reconciler().runs()
    await asyncio.wait_for(left.wait(), 30)


@pytest.mark.server
async def test_a_run_for_which_there_is_no_slot_goes_back(world: World) -> None:
    """The server can give out two runs for one slot. It waits on as it waited before, and its claim is no loss."""
    slots = (await load_environments(world.client))[ENVIRONMENT].offer.max_jobs
    others = [await world.claim() for _ in range(slots)]
    job = await world.jobs.submit(document(environment=ENVIRONMENT))
    world.claimed.append(UUID(job.id))
    waiting = await world.client.read_flow_run(UUID(job.id))
    assert waiting.state is not None
    worker = WarmProcessWorker(work_pool_name=POOL, name=f"{ME} {uuid4()}")
    worker._client = world.client
    assert not await worker._propose_pending_state(waiting)
    back = await world.client.read_flow_run(UUID(job.id))
    assert back.state is not None
    assert (StateType.SCHEDULED, waiting.state.name) == (back.state.type, back.state.name)
    assert waiting.next_scheduled_start_time == back.next_scheduled_start_time
    assert Status.WARMING_UP is (await only(world.jobs.find(by_id(job)))).status
    await world.client.set_flow_run_state(others[0], Completed())
    assert await worker._propose_pending_state(back)
    assert worker.name == worker_of(await world.client.read_flow_run(UUID(job.id)))


@pytest.mark.server
async def test_two_workers_of_one_name_are_refused(world: World) -> None:
    """They would take each other's runs for lost. Without a name each gets its own, the same at its next start."""
    with pytest.raises(RuntimeError, match="choose another name"), own_name(ME, POOL), own_name(ME, POOL):
        pass
    with own_name(None, POOL) as first, own_name(None, POOL) as second, own_name(ME, "another pool"):
        assert first != second
    with own_name(None, POOL) as again:
        assert first == again
