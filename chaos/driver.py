"""One kill after another against one service, with a look at every job after each."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from chaos.jobs import GRACE, LINE_DELAY, NARROW, Broken, Job, Judge, Records
from chaos.parts import OPERATOR, Stand, ended
from chaos.plan import STATUSES, Kill, Part, Shape, applies
from chaos.table import Failure, Tally
from flows.status import Status

REACH: Final = 30.0
"""Seconds until the target has to be in its status."""
UP: Final = 120.0
"""Seconds until everything has to be up again after a kill."""
HEALED: Final = 60.0
"""Seconds since everything is up again until every job has to have ended."""
SETTLING: Final = 0.25
"""Seconds that the filter has at least, of which nobody can say how long it takes."""
FEW: Final = 0.05
"""The same of the time between two steps."""

_ASKS: Final = (Part.API, Part.SERVER, Part.DATABASE, Part.ALL)
"""Parts without which a submission fails: of these kills, one job is submitted while they are dead."""


class NotUp(Exception):
    """The service did not come up again; nothing more can be tried on it."""


@dataclass
class Driver:
    """
    Does kills on *stand* and counts in *tally*.

    Everything that happens is also a line of JSON in ``kills.jsonl`` of its folder.
    """

    stand: Stand
    tally: Tally = field(default_factory=Tally)
    say: Callable[[str], None] = lambda line: None
    _jobs: dict[str, Job] = field(default_factory=dict)
    _published: dict[str, str] = field(default_factory=dict)

    def run(self, kills: Iterable[Kill], done: Callable[[Kill], None] = lambda kill: None) -> None:
        """
        Do *kills*, telling *done* after each.

        Raises:
            NotUp: After one of them, which is among the failures then.
        """
        settings = {PREFECT_API_URL: f"{self.stand.service.prefect_url}/api"}
        with temporary_settings(settings), get_client(sync_client=True) as client:
            self._judge = Judge(self.stand, Records(client))
            for kill in kills:
                self._one(kill)
                done(kill)
            self._compare()

    # ---- one kill

    def _one(self, kill: Kill) -> None:
        began = time.monotonic()
        gave_up = len(self.stand.gave_up)
        self.stand.line.delay = 0.0
        jobs = [Job.of(shape, self.stand) for shape in kill.others]
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._submit, jobs))
        if kill.status is Status.WARMING_UP:
            # Whoever has the only slot while the target waits.
            ahead = Job.of(Shape(Status.RUNNING, 2.0 + kill.target.seconds, 1, kill.target.number), self.stand, NARROW)
            self._submit(ahead)
            self._until(lambda: bool(ahead.algorithm()))
            jobs.append(ahead)
        target = Job.of(kill.target, self.stand, NARROW if kill.status is Status.WARMING_UP else None)
        self._submit(target)
        jobs.append(target)
        self.stand.line.delay = LINE_DELAY
        submitted = time.monotonic()
        pid = self._pid(target) if kill.part is Part.FLOW else None
        witnessed = self._reach(kill, target)
        reached = time.monotonic()
        late = Job.of(kill.others[0], self.stand)
        submitting = threading.Thread(target=self._submit, args=(late,))
        if kill.part in _ASKS:
            submitting.start()
            jobs.append(late)
        algorithm = target.algorithm() if kill.part is Part.ALGORITHM else []
        at = self.stand.kill(kill.part, flow=pid, algorithm=algorithm)
        target.killed = at is not None and kill.part is Part.ALGORITHM
        self.stand.heal(kill.part)
        up = self._until_up(kill)
        self.stand.line.delay = 0.0
        if kill.part in _ASKS:
            submitting.join()
        overdue = {job.token: list(self._until_ended(job, up)) for job in jobs}
        over = time.monotonic()
        records = {job: self._judge.records.of(job) for job in jobs if job.id}
        broken: list[tuple[Job | None, Broken]] = []
        for job in jobs:
            broken += [(job, problem) for problem in overdue[job.token] or self._outcome(job)]
            if job.given_up:
                self._give_up(job)
        broken += [(None, problem) for problem in self._left()]
        broken += [(None, Broken("the service keeps itself up", problem)) for problem in self.stand.gave_up[gave_up:]]
        self.tally.jobs += len(jobs)
        failures = [Failure(str(kill), str(job or ""), one.expected, one.seen) for job, one in broken]
        # What was about to be recorded when it was killed is lost at times, but was seen.
        then = records[target].status_at(at) if at is not None and target in records else Status.WARMING_UP
        status = max(witnessed, then)
        if at is not None and status in STATUSES and applies(status, kill.part):
            self.tally.count(status, kill.part, failures)
        else:
            self.tally.miss(failures)
        times = (began, submitted, reached, up, over, time.monotonic())
        self.say(f"{kill}: hit in {int(status)}, {len(failures)} failures, {times[-1] - began:.0f} s")
        for failure in failures:
            self.say(f"  {failure.job}: expected {failure.expected}, seen {failure.seen}")
        self._log(
            kill=str(kill),
            at=at,
            status=int(status),
            # To submit, to reach the status, to be up again, to end, to be looked at.
            seconds=[round(to - since, 1) for since, to in pairwise(times)],
            jobs={str(job): record.way for job, record in records.items()},
            broken=[f"{job}: {one}" for job, one in broken],
        )

    def _submit(self, job: Job) -> None:
        with suppress(httpx.HTTPError):
            job.submit(self.stand.service.api_url)
            self._jobs[job.id] = job

    def _reach(self, kill: Kill, target: Job) -> Status:
        """
        Wait until *target* is as far into its status as *kill* wants it.

        Not by asking: the records of steps come behind. The file server, the processes and the folder tell at once.

        Returns:
            The status it is known to have reached.
        """
        folder = self._judge.folder(target)

        def runs() -> bool:
            return bool(target.algorithm())

        def begun() -> bool:
            state = self._judge.records.run(target).state
            return state is not None and state.is_running()

        def fetched() -> bool:
            return self.stand.files.requests[target.url] > 0

        def filtered() -> bool:
            return (folder / "0" / "filtering.log").exists()

        def provisioned() -> bool:
            # What a step returned is kept there; the next begins by writing that log.
            kept = len(list((folder / "steps").glob("*"))) if (folder / "steps").is_dir() else 0
            return kept >= 2 or (folder / "0" / "configuration.log").exists()

        seconds = kill.target.seconds
        match kill.status:
            case Status.WARMING_UP:
                pass
            case Status.STARTED:
                self._until(begun)
                seconds = 4 * LINE_DELAY
            case Status.CONFIGURING:
                self._until(fetched)
            case Status.PROVISIONED:
                self._until(provisioned)
                seconds = FEW
            case Status.RUNNING:
                self._until(runs)
            case Status.FILTERING:
                self._until(runs)
                self._until(lambda: not runs())
                seconds = SETTLING
            case _:
                self._until(filtered)
        time.sleep(kill.into * seconds * 0.9)
        return kill.status if kill.status not in (Status.PROVISIONED, Status.FILTERING) else Status.WARMING_UP

    def _pid(self, job: Job) -> int | None:
        """The process of its flow; the worker tells its number a moment after it has started it."""
        deadline = time.monotonic() + REACH
        while time.monotonic() < deadline:
            run = self._judge.records.run(job)
            number = (run.infrastructure_pid or "").rpartition(":")[2]
            if run.state is not None and run.state.is_running() and number.isdecimal():
                return int(number)
            time.sleep(0.02)
        return None

    def _until_up(self, kill: Kill) -> float:
        """When everything was up again."""
        deadline = time.monotonic() + UP
        while not self.stand.is_up():
            if time.monotonic() > deadline:
                failure = Failure(str(kill), "", f"all parts are up within {UP:g} s", f"{self._parts()}")
                self.tally.count(kill.status, kill.part, [failure])
                raise NotUp(failure.seen)
            time.sleep(0.2)
        return time.monotonic()

    def _parts(self) -> dict[str, bool]:
        return {part.name: part.alive for part in list(self.stand.service.parts)}

    def _until_ended(self, job: Job, up: float) -> Iterator[Broken]:
        if not job.id:
            yield Broken("a job is taken in once everything is up", "it was not")
            return
        while not self._ended(job):
            if time.monotonic() > up + HEALED:
                yield self._judge.of_live(job)
                job.given_up = True
                return
            time.sleep(0.2)

    def _outcome(self, job: Job) -> Iterator[Broken]:
        """What was promised to *job*, which has ended, and not kept."""
        yield from self._judge.of_ended(job)
        self._published[job.id] = self._judge.published(job)

    def _ended(self, job: Job) -> bool:
        state = self._judge.records.run(job).state
        return state is not None and state.is_final()

    def _give_up(self, job: Job) -> None:
        """Delete it."""
        with suppress(httpx.HTTPError):
            url = f"{self.stand.service.api_url}{OPERATOR}/compute"
            httpx.delete(url, params={"jobId": job.id}, timeout=60.0)

    def _left(self) -> Iterator[Broken]:
        """Processes that are nobody's, and those of jobs while there are none."""
        if left := ended(self.stand.strays(), GRACE):
            yield Broken("no process without its part", "; ".join(left))
        if (worker := self.stand.part("worker")) is not None:
            servers = [process.pid for process in worker.family()[:1]]
            runs = [
                process
                for process in worker.family()[1:]
                if not (_parent(process) in servers and _is_fork_server(process))
            ]
            if left := ended(runs, GRACE):
                yield Broken("no process of a job while there is no job", "; ".join(left))

    # ---- at the end

    def _compare(self) -> None:
        """Nothing that was once published has changed since; no folder is there of a job that completed, or of none."""
        broken = []
        for id, published in self._published.items():
            if (now := self._judge.published(self._jobs[id])) != published:
                broken.append(Failure("at the end", id, f"the results it had: {published}", now))
        kept = {path.name for path in self.stand.workspace.iterdir()} if self.stand.workspace.is_dir() else set()
        done = {id for id, job in self._jobs.items() if not job.given_up and self._judge.completed(job)}
        if orphans := kept & done | kept - self._jobs.keys():
            broken.append(Failure("at the end", "", "folders of jobs that failed, and no others", f"{sorted(orphans)}"))
        self.tally.failures.extend(broken)

    def _until(self, holds: Callable[[], bool]) -> None:
        """Until it holds, or so long that the kill comes whenever it comes."""
        deadline = time.monotonic() + REACH
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _log(self, **facts: Any) -> None:
        with Path(self.stand.folder / "kills.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(facts) + "\n")


def _parent(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.ppid())
    return 0


def _is_fork_server(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any("flows.worker" in word for word in process.cmdline())
    return True
