"""The service under test with what stands beside it, all of it real, and how each part is killed."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx
import psutil

from chaos.plan import Part
from cli.service import MARK, CannotStart, Service, free_port
from cli.service import Part as Process
from tests.file_server import FileServer
from tests.s3_server import s3_server

DEFINITIONS: Final = Path(__file__).with_name("prefect.yaml")
OPERATOR: Final = "/api/v1/operator"
START: Final = 60.0
"""Seconds a database may take to answer."""
LOOK: Final = 0.1
"""Seconds between two looks of whoever keeps the service up."""


class NoDatabase(Exception):
    """There is no PostgreSQL on this machine; the message says what to do."""


def kill(processes: Iterable[psutil.Process]) -> int:
    """SIGKILL to each; how many there were."""
    killed = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            killed += 1
    return killed


def processes_with(word: bytes, *, named: str = "cmdline") -> list[psutil.Process]:
    """
    Every process but this one with *word* in its command line or, with *named* ``environ``, its environment.

    None that has ended and is still to be waited for: such a one has neither.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if process.pid != os.getpid() and word in Path(f"/proc/{process.pid}/{named}").read_bytes():
                found.append(process)
    return found


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, as far as they have not ended."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [process for process in (top, *top.children(recursive=True)) if not has_ended(process)]
    return []


def has_ended(process: psutil.Process) -> bool:
    """Also if nobody has asked for its exit code yet. Not by waiting: that takes the code from whoever started it."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def is_held(lock: Path) -> bool:
    """Whether some process holds *lock*. Not asked by taking it: whoever came meanwhile would have to wait for us."""
    try:
        found = lock.stat()
    except FileNotFoundError:
        return False
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    # Those with an arrow only wait for it.
    return any(name in line and "->" not in line for line in lines)


# ------------------------------------------------------------------------------------------------------- beside it


class Postgres:
    """A PostgreSQL of its own, in a new folder: started, killed outright, started again on what was left."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to be root, and no other user reaches into the folder of the test.
        self._user = "postgres" if os.geteuid() == 0 else None

    @staticmethod
    def obstacle() -> str | None:
        """Why there is none on this machine."""
        try:
            for program in ("initdb", "postgres", "pg_isready"):
                _program(program)
            if os.geteuid() == 0:
                pwd.getpwnam("postgres")
        except NoDatabase as problem:
            return str(problem)
        except KeyError:
            return "there is no user postgres to run PostgreSQL as"
        return None

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(_folder_of(self._user)))
        self._run("initdb", "-D", f"{self._folder}/data", "-U", "postgres", "--auth=trust", "--encoding=utf8")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._stack.close()

    def start(self) -> None:
        """Start it and wait until it answers: after a kill that is after its recovery."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    _program("postgres"),
                    *("-D", f"{self._folder}/data", "-k", str(self._folder), "-h", "127.0.0.1", "-p", f"{self._port}"),
                ],
                user=self._user,
                cwd="/",
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START
        while not self._answers():
            if time.monotonic() > deadline:
                raise NoDatabase(f"PostgreSQL has not started within {START:g} s; its log is {self._log}")
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        return family(self._process.pid) if self._process is not None else []

    def kill(self) -> None:
        kill(self.processes())
        if self._process is not None:
            self._process.wait()

    def _answers(self) -> bool:
        return self._run("pg_isready", "-q", "-h", "127.0.0.1", "-p", f"{self._port}", check=False) == 0

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        done = subprocess.run(
            [_program(program), *arguments], user=self._user, cwd="/", capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise NoDatabase(f"{program} failed: {done.stderr.strip()}")
        return done.returncode


@contextmanager
def _folder_of(user: str | None) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="c2d-chaos-pg-") as folder:
        if user is not None:
            try:
                found = pwd.getpwnam(user)
            except KeyError:
                raise NoDatabase(f"there is no user {user} to run PostgreSQL as") from None
            os.chown(folder, found.pw_uid, found.pw_gid)
        yield folder


def _program(name: str) -> str:
    """On Debian the programs of the server are not on the PATH."""
    places = [str(place) for place in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if found is None:
        raise NoDatabase(f"{name} is not installed; install postgresql, or use --database sqlite")
    return found


class SlowLine:
    """A TCP proxy on loopback that holds back what is sent to the server by *delay* seconds."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.delay = 0.0
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _start(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass_on(reader, forth, lambda: self.delay), self._pass_on(back, writer, lambda: 0.0))

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: Callable[[], float]
    ) -> None:
        with suppress(OSError):
            while piece := await reader.read(2**20):
                await asyncio.sleep(delay())
                writer.write(piece)
                await writer.drain()
        with suppress(OSError):
            writer.close()


# ---------------------------------------------------------------------------------------------------------- itself


@dataclass
class Stand:
    """
    The service, its database, a server of inputs and a slow result store; entered, all of it is up.

    Args:
        folder: Of everything; its logs are in ``state/logs``.
        postgres: Whether Prefect keeps its records there, as a part that can be killed; else in SQLite.
    """

    folder: Path
    postgres: bool = True
    gave_up: list[str] = field(default_factory=list)
    """Why the service ended itself, each time that it did."""
    _stack: ExitStack = field(default_factory=ExitStack)
    _still: threading.Lock = field(default_factory=threading.Lock)
    """Held by us while we kill, so that what is dead is not started again in the middle of it."""
    _up: threading.Event = field(default_factory=threading.Event)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            (self.folder / "state" / "logs").mkdir(parents=True)
            self.files = stack.enter_context(FileServer())
            options = stack.enter_context(s3_server(self.folder / "s3"))
            self.line = stack.enter_context(SlowLine(int(options["endpoint_url"].rpartition(":")[2])))
            self.store_url = options["endpoint_url"]
            self.store_options = {**options, "endpoint_url": f"http://127.0.0.1:{self.line.port}"}
            variables = {
                "C2D_NETWORKS": "127.0.0.0/8",
                "C2D_CHAOS_KEY": options["key"],
                "C2D_CHAOS_SECRET": options["secret"],
                "C2D_CHAOS_ENDPOINT": self.store_options["endpoint_url"],
            }
            self.database: Postgres | None = None
            if self.postgres:
                self.database = stack.enter_context(Postgres(self.logs / "postgres.log"))
                variables |= {
                    "PREFECT_API_DATABASE_CONNECTION_URL": self.database.url,
                    "C2D_NONCE_DATABASE": self.database.url,
                }
            self.service = self._service(variables)
            # A thread for all of the service's life: what a thread starts is ended with it, see Service._launch.
            keeper = threading.Thread(target=self._keep_up, name="keeper")
            stack.callback(keeper.join)
            stack.callback(self._over.set)
            keeper.start()
            while not self._up.wait(LOOK):
                if self.gave_up:
                    raise CannotStart(self.gave_up[-1])
            self.http = stack.enter_context(httpx.Client(base_url=self.service.api_url, timeout=30.0))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def logs(self) -> Path:
        return self.folder / "state" / "logs"

    @property
    def workspace(self) -> Path:
        return self.folder / "state" / "work"

    def _service(self, variables: Mapping[str, str]) -> Service:
        return Service(
            state=self.folder / "state",
            definitions=DEFINITIONS,
            variables=variables,
            restarts=10**6,
            say=self._note,
            # The same after a start that failed.
            api_port=free_port(),
            prefect_port=free_port(),
        )

    def _note(self, line: str) -> None:
        with (self.logs / "service.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.time():.3f} {line}\n")

    def _keep_up(self) -> None:
        """What ``c2d up`` does, and once more should that give up, so that the next kill finds a service."""
        while not self._over.is_set():
            try:
                with self.service:
                    self._up.set()
                    while not self._over.wait(LOOK):
                        with self._still:
                            self.service.keep_up()
            except CannotStart as problem:
                self.gave_up.append(str(problem))
                self._note(f"gave up: {problem}")
                if not self._up.is_set():
                    return

    # ---- parts

    def part(self, name: str) -> Process | None:
        """A part of the service that is alive, by how its name begins."""
        return next((part for part in list(self.service.parts) if part.name.startswith(name) and part.alive), None)

    def mark(self) -> bytes:
        found = (self.folder / "state" / "lock").stat()
        return f"{MARK}={found.st_dev}:{found.st_ino}\0".encode()

    def processes(self) -> list[psutil.Process]:
        """Every process of the service, also those that have lost their parents or hide their environment."""
        found = processes_with(self.mark(), named="environ")
        return list({process.pid: process for top in found for process in [top, *family(top.pid)]}.values())

    def strays(self) -> list[psutil.Process]:
        """Those of them that belong to no part that is alive."""
        known = {process.pid for part in list(self.service.parts) for process in part.family()}
        return [process for process in self.processes() if process.pid not in known]

    def kill(self, part: Part, *, flow: int | None, algorithm: Iterable[psutil.Process]) -> float | None:
        """
        Kill *part*, at once and outright; of a job its process *flow* or those of its *algorithm*.

        Returns:
            When; None if there was nothing to be killed.
        """
        with self._still:
            at = time.time()
            match part:
                case Part.ALGORITHM:
                    return at if kill(algorithm) else None
                case Part.FLOW:
                    return at if flow is not None and kill(family(flow)[:1]) else None
                case Part.DATABASE:
                    assert self.database is not None
                    self.database.kill()
                    return at
                case Part.ALL:
                    # Again until there is none: one that is about to be killed may start another.
                    while dying := [*(self.database.processes() if self.database else ()), *self.processes()]:
                        kill(dying)
                        time.sleep(0.01)
                    # As on a machine that comes up again, where the database is not ours to start.
                    if self.database is not None:
                        self.database.kill()
                        self.database.start()
                    return at
                case _:
                    name = {Part.SERVER: "prefect-server", Part.API: "api", Part.WORKER: "worker"}[part]
                    found = self.part(name)
                    return at if found is not None and kill(family(found.process.pid)[:1]) else None

    def heal(self, part: Part) -> None:
        """What is not the service's own to do."""
        if part is Part.DATABASE and self.database is not None:
            self.database.start()

    def is_up(self) -> bool:
        """Server, API and worker are alive, and the API answers what it has to ask the server and the database for."""
        if not all(self.part(name) for name in ("prefect-server", "api", "worker")):
            return False
        with suppress(httpx.HTTPError):
            asked = (f"{self.service.prefect_url}/api/health", f"{self.service.api_url}{OPERATOR}/environments")
            return all(httpx.get(url, timeout=5.0).is_success for url in asked)
        return False


def ended(processes: Iterable[psutil.Process], seconds: float) -> list[str]:
    """What of *processes* is still there after *seconds*, in words."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if not has_ended(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    words = []
    for process in left:
        with suppress(psutil.Error):
            words.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
    return words
