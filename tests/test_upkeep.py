"""Looking after pools of Prefect's own workers, over a real server: what is lost, what crashed, what neither."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State, StateType
from prefect.events.clients import get_events_client
from prefect.events.schemas.events import Event, Resource
from prefect.states import AwaitingRetry, Cancelling, Completed, Crashed, Pending, Running, Scheduled

from blocks.environment import load_environments
from flows.jobs import JobQuery
from flows.prefect_jobs import DELETING
from flows.reconcile import MOST_RESUMES, resumes
from flows.states import CRASH_SECONDS, DIED, LOST, STOPPED_IN_QUEUE, goes_on, told_as_crashed
from flows.status import Status
from flows.upkeep import Upkeep, upkeep_of
from tasks.workspace import held, in_use
from tests.conftest import PrefectServer
from tests.test_jobs_contract import ENVIRONMENT
from tests.test_reconcile import POOL, World, at, world

pytestmark = pytest.mark.anyio

__all__ = ["world"]

WORKER: Final = "a worker of Prefect's"
EXIT: Final = "Flow run infrastructure exited with non-zero status code 137."


def looking_after(world: World, **more: Any) -> Upkeep:
    return upkeep_of(world.client, POOL, logging.getLogger(__name__), **{"idle_seconds": 0.3, **more})


async def workspace(world: World) -> Path:
    return (await load_environments(world.client))[ENVIRONMENT].workspace_root()


async def rounds(looking: Upkeep, run_id: UUID, times: int = 8) -> bool:
    """Whether the run was taken up in one of some rounds."""
    for _ in range(times):
        if run_id in await looking.runs():
            return True
        await asyncio.sleep(0.1)
    return False


async def crash(world: World, *, message: str = EXIT, running: bool = True) -> UUID:
    """A job that one of Prefect's workers has begun, and told to have crashed."""
    run_id = await world.claim(by=WORKER, running=running)
    await world.client.set_flow_run_state(run_id, Crashed(message=message))
    return run_id


def test_crashes_that_were_told_count_as_losses() -> None:
    """Between two of them lies Prefect's own state, which is no end; a restart after it begins anew."""
    again: State[Any] = AwaitingRetry(message=f"{DIED}: {EXIT}")
    states = [Scheduled(), *[Pending(), Running(), Crashed(message=EXIT), again] * 2]
    assert 2 == resumes([at(n, state) for n, state in enumerate(states)])
    assert 0 == resumes([at(n, state) for n, state in enumerate([*states, Running(), Completed()])])
    restarted = [*states, Running(), Crashed(message=EXIT), Scheduled()]
    assert 0 == resumes([at(n, state) for n, state in enumerate(restarted)])


def test_whose_crash_it_is() -> None:
    """What this project ends a job with is an end; what Prefect tells is not."""
    assert told_as_crashed(Crashed(message=EXIT))
    ends: list[State[Any] | None] = [Crashed(message=f"{DIED}: {EXIT}"), Crashed(message=LOST), Completed(), None]
    for ours in ends:
        assert not told_as_crashed(ours)


def test_who_works_on_a_job(tmp_path: Path) -> None:
    """Somebody while the folder is held, nobody afterwards, and without a folder it cannot be known."""
    job_id = uuid4().hex
    assert in_use(tmp_path, job_id) is None
    with held(tmp_path, job_id, 60.0):
        assert in_use(tmp_path, job_id) is True
    assert in_use(tmp_path, job_id) is False


@pytest.mark.server
async def test_a_run_is_lost_when_nobody_works_on_it(world: World) -> None:
    """While its folder is held it is left alone for as long as that is; then it goes back into the queue."""
    root = await workspace(world)
    run_id = await world.claim(by=WORKER)
    looking = looking_after(world)
    with held(root, run_id.hex, 60.0):
        assert not await rounds(looking, run_id)
    assert await rounds(looking, run_id)
    state = await world.state(run_id)
    assert (StateType.SCHEDULED, "AwaitingRetry", LOST) == (state.type, state.name, state.message)


@pytest.mark.server
async def test_a_moment_without_a_hold_is_no_loss(world: World) -> None:
    """Silence counts from its beginning: whoever takes hold again in time was never lost."""
    root = await workspace(world)
    run_id = await world.claim(by=WORKER)
    looking = looking_after(world, idle_seconds=3.0)
    for _ in range(4):
        with held(root, run_id.hex, 60.0):
            assert run_id not in await looking.runs()
        assert run_id not in await looking.runs()
        await asyncio.sleep(0.8)
        assert run_id not in await looking.runs()


@pytest.mark.server
async def test_a_stop_whose_process_is_gone_is_finished(world: World) -> None:
    """A run that is being stopped and that nobody works on has stopped."""
    run_id = await world.claim(by=WORKER)
    with held(await workspace(world), run_id.hex, 60.0):
        await world.client.set_flow_run_state(run_id, Cancelling(message="stopped on request"))
    looking = looking_after(world)
    assert await rounds(looking, run_id)
    assert (await world.state(run_id)).is_cancelled()


@pytest.mark.server
async def test_a_run_without_a_folder_here_is_judged_by_its_heartbeats(world: World) -> None:
    """One that never reported is left alone; one that fell silent is lost, once the server was there long."""
    never, silent, well = [await world.claim(by=WORKER) for _ in range(3)]
    async with get_events_client() as events:
        for run_id, ago in ((silent, 20.0), (well, -60.0)):
            await events.emit(
                Event(
                    occurred=datetime.now(UTC) - timedelta(seconds=ago),
                    event="prefect.flow-run.heartbeat",
                    resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run_id}"}),
                )
            )
    looking = looking_after(world, silent_seconds=1.0)
    # Not in the first round: what was silent while the server was away may be about to report.
    assert [] == [run_id for run_id in await looking.runs() if run_id in (never, silent, well)]
    taken: set[UUID] = set()
    for _ in range(60):
        await asyncio.sleep(0.25)
        taken.update(await looking.runs())
        if silent in taken:
            break
    assert (True, False, False) == (silent in taken, never in taken, well in taken)


@pytest.mark.server
@pytest.mark.parametrize("running", [True, False], ids=["running", "claimed"])
async def test_a_job_that_crashed_goes_on(world: World, running: bool) -> None:
    """It does not seem to have ended at any moment, nor afterwards to have ended before."""
    run_id = await crash(world, running=running)
    (job,) = await world.jobs.find(JobQuery(job_id=run_id.hex))
    assert (Status.WARMING_UP, None) == (job.status, job.finished)
    assert run_id in await looking_after(world).crashed()
    state = await world.state(run_id)
    assert ("AwaitingRetry", f"{DIED}: {EXIT}") == (state.name, state.message)
    (job,) = await world.jobs.find(JobQuery(job_id=run_id.hex))
    assert (Status.WARMING_UP, None) == (job.status, job.finished)
    assert not [passed for passed in job.history if passed.status is Status.RUN_FAILED]
    # Once is enough.
    assert run_id not in await looking_after(world).crashed()


@pytest.mark.server
async def test_a_job_that_crashes_again_and_again_ends(world: World) -> None:
    """After the last time it has failed for everybody, and is not looked at any more."""
    run_id = await world.claim(by=WORKER)
    for _ in range(MOST_RESUMES):
        await world.client.set_flow_run_state(run_id, AwaitingRetry(message=f"{DIED}: {EXIT}"), force=True)
        await world.client.set_flow_run_state(run_id, Running(), force=True)
    await world.client.set_flow_run_state(run_id, Crashed(message=EXIT), force=True)
    looking = looking_after(world)
    assert run_id not in await looking.crashed()
    ended = await world.state(run_id)
    assert (StateType.CRASHED, f"{DIED}: {EXIT}") == (ended.type, ended.message)
    (job,) = await world.jobs.find(JobQuery(job_id=run_id.hex))
    assert job.ended and job.status is Status.RUN_FAILED
    await looking.crashed()
    assert ended.id == (await world.state(run_id)).id


@pytest.mark.server
async def test_a_crash_that_nobody_takes_up_is_an_end(world: World) -> None:
    """A minute after it the job has ended; on a pool of our own type, and where nothing is known of it, at once."""
    run = await world.client.read_flow_run(await crash(world))
    blocks = await load_environments(world.client)
    assert run.state is not None and goes_on(run, blocks)
    earlier = run.state.timestamp - timedelta(seconds=CRASH_SECONDS)
    assert not goes_on(run.model_copy(update={"state": run.state.model_copy(update={"timestamp": earlier})}), blocks)
    ours = blocks[ENVIRONMENT].model_copy(update={"work_pool_type": "warm-process"})
    assert not goes_on(run, {ENVIRONMENT: ours})
    assert not goes_on(run, {})


@pytest.mark.server
async def test_a_job_that_crashed_can_be_stopped(world: World) -> None:
    """Before it has been taken up: it has stopped, and does not come back to life."""
    run_id = await crash(world)
    (job,) = await world.jobs.stop(JobQuery(job_id=run_id.hex))
    assert Status.STOPPED is job.status
    assert run_id not in await looking_after(world).crashed()
    assert STOPPED_IN_QUEUE == (await world.state(run_id)).message


@pytest.mark.server
async def test_a_job_that_is_being_deleted_does_not_go_on(world: World) -> None:
    """What crashed and is marked for deletion stays as it is."""
    run_id = await crash(world)
    run = await world.client.read_flow_run(run_id)
    await world.client.update_flow_run(run_id, tags=[*run.tags, DELETING])
    assert run_id not in await looking_after(world).crashed()
    assert (await world.state(run_id)).is_crashed()


# The command.


@pytest.fixture
def settings(prefect_server: PrefectServer) -> Iterator[dict[str, str]]:
    yield {
        **os.environ,
        "PREFECT_API_URL": prefect_server.api,
        "C2D_KEY_FILE": str(prefect_server.key_file),
        "COLUMNS": "300",
    }


@pytest.mark.server
@pytest.mark.parametrize(
    ("pool", "url", "words"),
    [
        ("tests", None, "whose workers look after it themselves"),
        (POOL, "", "PREFECT_API_URL does not say"),
    ],
    ids=["our own pool", "no server"],
)
def test_what_cannot_be_looked_after(settings: dict[str, str], pool: str, url: str | None, words: str) -> None:
    """Exit code 1 and a sentence."""
    more = {} if url is None else {"PREFECT_API_URL": url}
    command = [str(Path(sys.executable).with_name("c2d")), "upkeep", "--pool", pool]
    done = subprocess.run(command, env={**settings, **more}, capture_output=True, text=True, check=False, timeout=120)
    assert 1 == done.returncode, done.stdout + done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.server
@pytest.mark.slow
async def test_it_hears_of_a_crash_and_ends_when_it_is_told(world: World, settings: dict[str, str]) -> None:
    """The program puts a job back that crashes while it runs; SIGTERM ends it with exit code 0 and no trace."""
    with subprocess.Popen(  # noqa: ASYNC220 - it takes a moment
        [Path(sys.executable).with_name("c2d"), "upkeep", "--pool", POOL],
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            run_id = await crash(world)
            for _ in range(300):
                if (await world.state(run_id)).name == "AwaitingRetry":
                    break
                await asyncio.sleep(0.1)
            assert "AwaitingRetry" == (await world.state(run_id)).name
            process.send_signal(signal.SIGTERM)
            said, _ = await asyncio.to_thread(process.communicate, timeout=30)
            assert 0 == process.returncode, said
            assert "Traceback" not in said and "looking after the work pool" in said
        finally:
            process.kill()
