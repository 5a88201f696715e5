"""
The whole service on one machine: Prefect server on SQLite, a worker, the API. All on loopback, all in one folder.

For several machines each part is started by its own means instead; see docs/operate.md.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import psutil
import yaml
from eth_utils.address import to_checksum_address
from pydantic import ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from blocks.environment import ComputeEnvironment
from blocks.keys import create_keystore
from flows.environments import read_definitions
from flows.sealing import create_key_file
from tasks.workspace import sweep

ROOT: Final = Path(__file__).resolve().parent.parent
"""Where prefect.yaml is: the checkout this runs from."""

_PREFECT: Final = (sys.executable, "-m", "prefect")

START_DEADLINE: Final = 180.0
"""Seconds a part may take to answer. A first start makes Prefect's database, which takes most of it."""

STOP_DEADLINE: Final = 25.0
"""Seconds a part is given to end: a worker needs up to twenty to end what it runs and to hand that back."""

RESTARTS: Final = 3
RESTARTS_WITHIN: Final = 3600.0
"""Seconds. A part that ends by itself is started again; more often than RESTARTS in this time is no accident."""

MARK: Final = "C2D_SERVICE"
"""
Environment variable of every part, and so of whatever a part starts. By it a process is known whose part was killed:
it has no parent any more that would lead to it.
"""

KEYSTORE: Final = "provider.json"
KEYSTORE_PASSWORD: Final = "provider-password"  # noqa: S105 - the name of a file
"""Both in the folder of the service."""

_LOCAL_KINDS: Final = ("process", "warm-process")
"""Types of work pools whose workers are started here; those of others are the operator's."""

_SERVER: Final = "prefect-server"
_API: Final = "api"
_WORKER: Final = "worker"

_EXCERPT: Final = 15
"""Lines of a log that are shown when its part fails."""


class CannotStart(Exception):
    """The service cannot be started or kept up; the message says why and names the log that tells more."""


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Part:
    """One process of the service. It leads a session of its own: a Ctrl-C in the terminal must reach only us."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    since: int = 0
    """Where in its log this process begins; before it are those of earlier starts."""
    patience: float = STOP_DEADLINE
    """Seconds it is given to end when it is asked to."""

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def ending(self) -> str:
        """How it ended, for a sentence about it."""
        code = self.process.poll()
        return f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"

    def family(self) -> list[psutil.Process]:
        """Itself and all that it has started; empty if it is not alive."""
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def stop(self) -> None:
        """Ask it to end, then make it; what it started goes with it."""
        family = self.family()
        self.process.terminate()
        try:
            self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in psutil.wait_procs(family, timeout=1.0)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@dataclass
class Service:
    """
    Started on entering, stopped on leaving, jobs in flight handed back to the queue: they go on at the next start.

    Args:
        state: Folder of everything that is kept. One service at a time.
        variables: Further environment variables for every part, for example ``C2D_NETWORKS``.
        definitions: The prefect.yaml to deploy; each of its work pools for processes gets a worker.
        api_port, prefect_port: 0 for any free one.
        say: Told one line per step of the start.
    """

    state: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    definitions: Path = ROOT / "prefect.yaml"
    api_port: int = 0
    prefect_port: int = 0
    restarts: int = RESTARTS
    say: Callable[[str], None] = lambda line: None
    parts: list[Part] = field(default_factory=list)
    """The Prefect server first, then what relies on it."""
    _environments: list[ComputeEnvironment] = field(default_factory=list, repr=False)
    _mark: str = ""
    _restarts: list[float] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def keep_up(self) -> None:
        """
        Start again whatever part has ended by itself; to be called every now and then.

        Raises:
            CannotStart: It has come to that too often. The service is to be stopped then.
        """
        for part in [part for part in self.parts if not part.alive]:
            if part not in self.parts:
                continue  # replaced with the one before it
            now = time.monotonic()
            self._restarts = [at for at in self._restarts if now - at < RESTARTS_WITHIN] + [now]
            if len(self._restarts) > self.restarts:
                raise CannotStart(
                    f"{part.name} {part.ending}; parts have been started again {self.restarts} times within "
                    f"{RESTARTS_WITHIN / 3600:g} h already, so the service ends. {self._log_of(part)}"
                )
            self.say(f"{part.name} once more, since it {part.ending}")
            self._replace(part)

    def _replace(self, part: Part) -> None:
        """
        Start one part again and leave the others alone: each of them waits for a server that is away, and a worker
        takes up what the one before it has lost (``flows.reconcile``).
        """
        at = self.parts.index(part)
        self.parts.remove(part)
        if part.name == _SERVER:
            again = self._launch_server()
        elif part.name == _API:
            again = self._launch_api()
        else:
            self._end_strays()
            again = self._launch_worker(part.name.removeprefix(f"{_WORKER}-"))
        # In the order in which they were started, and so are stopped.
        self.parts.insert(at, self.parts.pop())
        if part.name == _SERVER:
            self._until_healthy(again, f"{self.prefect_url}/api/health")
        elif part.name == _API:
            self._until_healthy(again, f"{self.api_url}/health")

    def _start(self) -> None:
        self._environments = self._read_definitions()
        self.state = self.state.resolve()
        try:
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.state / "logs").mkdir(exist_ok=True)
            self._lock()
            create_key_file(self.state / "key")
            self._create_provider_key()
        except OSError as fault:
            raise CannotStart(f"the state folder {self.state} cannot be used: {fault.strerror or fault}") from None
        # Before the ports are looked at: what a service killed a moment ago has left may still hold them.
        self._end_strays()
        self.prefect_port = _usable_port(self.prefect_port, "the Prefect server")
        self.api_port = _usable_port(self.api_port, "the API")
        self._start_parts()

    def _start_parts(self) -> None:
        self.say("Prefect server, API")
        server = self._launch_server()
        # The API asks Prefect nothing before it is asked something itself, so the two can load side by side.
        api = self._launch_api()
        self._until_healthy(server, f"{self.prefect_url}/api/health")
        self.say("work pools, environments, deployments (prefect deploy --all)")
        deploy = self._launch(
            "deploy", [*_PREFECT, "--no-prompt", "deploy", "--all", "--prefect-file", str(self.definitions)]
        )
        self._sweep()
        self._until_done(deploy)
        # Not earlier: a job that waits must not be run by the rules that held before this deployment.
        self._launch_workers()
        self._until_healthy(api, f"{self.api_url}/health")

    def _launch_api(self) -> Part:
        return self._launch(_API, [sys.executable, "-m", "api.main"])

    def _launch_server(self) -> Part:
        return self._launch(
            _SERVER, [*_PREFECT, "server", "start", "--host", "127.0.0.1", "--port", f"{self.prefect_port}"]
        )

    def _launch_workers(self) -> None:
        for pool in sorted(pool for pool, kind in self._pools().items() if kind in _LOCAL_KINDS):
            self.say(f"worker of work pool {pool}")
            self._launch_worker(pool)

    def _launch_worker(self, pool: str) -> Part:
        kind = self._pools()[pool]
        # A name that stays, by which a worker knows what the one before it has left.
        start = ["worker", "start", "--pool", pool, "--type", kind, "--name", f"{pool}-embedded"]
        part = self._launch(f"{_WORKER}-{pool}", [*_PREFECT, *start])
        part.patience += float(self.environment().get("C2D_DRAIN_SECONDS") or 0)
        return part

    def _pools(self) -> dict[str, str]:
        """The type of each work pool."""
        return {block.work_pool: block.work_pool_type for block in self._environments}

    def _sweep(self) -> None:
        """Folders of jobs that ended long ago: the next job may never come. Nobody is to wait for it in vain."""
        for block in self._environments:
            root = Path(block.workspace).resolve() if block.workspace else self.state / "work"
            try:
                sweep(root, block.offer.storage_expiry)
            except (OSError, subprocess.CalledProcessError):
                self.say(f"folders of jobs that ended long ago could not be removed from {root}")

    def stop(self) -> None:
        """
        End every part, the Prefect server last: it has to hear of the jobs that are handed back. Safe to repeat.
        """
        while self.parts:
            self.parts.pop().stop()
        self._end_strays()
        # From here on the folder may be another service's, and the mark with it.
        self._mark = ""
        self._stack.close()

    def environment(self) -> dict[str, str]:
        """The environment variables of every part; also those a `prefect` command needs to speak to this service."""
        return {
            **os.environ,
            "PREFECT_HOME": str(self.state / "prefect"),
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_API_URL": f"{self.prefect_url}/api",
            "PREFECT_CLI_PROMPT": "false",
            # Stock workers ask every 15 s; on one machine asking often costs next to nothing.
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            # A job that waits for its slot is not late. To say so Prefect writes to all that wait at once, and again
            # every 5 s until that has worked; with SQLite nobody else can write meanwhile.
            "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
            # What a server answers whose database is away. It is repeated as when the server itself is.
            "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500,504",
            "DO_NOT_TRACK": "1",
            "C2D_STATE": str(self.state),
            "C2D_DEFINITIONS": str(self.definitions),
            "C2D_KEY_FILE": str(self.state / "key"),
            "C2D_NONCE_DATABASE": f"sqlite+aiosqlite:///{self.state / 'nonces.sqlite'}",
            "C2D_LOCAL_WORKERS": "true",
            "C2D_CATALOGUE": str(self.state / "catalogue"),
            **self._own_provider_key(),
            "C2D_HOST": "127.0.0.1",
            "C2D_PORT": str(self.api_port),
            **self.variables,
        }

    @property
    def provider_address(self) -> str | None:
        """This provider's own, of the key made for it here; None where the operator has set another."""
        if not self._own_provider_key():
            return None
        stored = json.loads((self.state / KEYSTORE).read_text(encoding="utf-8"))
        return to_checksum_address(f"0x{stored['address'].removeprefix('0x')}")

    def _own_provider_key(self) -> dict[str, str]:
        """Settings of the key that is made here for a provider whose operator has set none."""
        if any({**os.environ, **self.variables}.get(name) for name in ("C2D_KEYSTORE", "C2D_PROVIDER_KEY_BLOCK")):
            return {}
        return {
            "C2D_KEYSTORE": str(self.state / KEYSTORE),
            "C2D_KEYSTORE_PASSWORD_FILE": str(self.state / KEYSTORE_PASSWORD),
        }

    def _create_provider_key(self) -> None:
        (self.state / "catalogue").mkdir(exist_ok=True)
        if not self._own_provider_key():
            return
        # Beside the keystore, since nobody is there to type it in: both are as safe as this folder. An operator who
        # wants more keeps the key in a block or in a keystore whose password is elsewhere.
        create_key_file(self.state / KEYSTORE_PASSWORD)
        password = (self.state / KEYSTORE_PASSWORD).read_text(encoding="utf-8").removesuffix("\n")
        create_keystore(self.state / KEYSTORE, password, random_password=True)

    def _read_definitions(self) -> list[ComputeEnvironment]:
        """Read before anything is started, since it is where an operator's mistakes are."""
        try:
            return read_definitions(self.definitions)
        except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError) as fault:
            raise CannotStart(f"{self.definitions} cannot be used: {_without_values(fault)}") from None

    def _lock(self) -> None:
        file = self._stack.enter_context((self.state / "lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart(f"another service is running in {self.state}; stop it or name another folder") from None
        # Not the path: a container's service may have the same one, and root sees the processes of both.
        found = os.fstat(file.fileno())
        self._mark = f"{found.st_dev}:{found.st_ino}"

    def _end_strays(self) -> None:
        """
        End what was started by a part that is gone.

        A worker that is killed leaves the processes of its jobs behind. Their jobs are taken up again, and would
        wait for them.
        """
        mark = f"{MARK}={self._mark}".encode()
        alive = {part.process.pid for part in self.parts if part.alive}
        deadline = time.monotonic() + STOP_DEADLINE
        # Again until there is none: one that is about to be ended may start another.
        while self._mark and time.monotonic() < deadline:
            strays = []
            for process in psutil.process_iter():
                with suppress(OSError, psutil.Error):
                    if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                        line = {process.pid, *(above.pid for above in process.parents())}
                        if not line & alive and process.pid != os.getpid():
                            process.kill()
                            strays.append(process)
            if not strays:
                return
            psutil.wait_procs(strays, timeout=1.0)

    def _launch(self, name: str, command: list[str]) -> Part:
        log = self.state / "logs" / f"{name}.log"
        # If this process is killed outright, nothing may be left behind: the kernel ends each part for us. And a
        # shell that starts us in the background has SIGINT ignored, which a worker would inherit and never stop.
        guarded = ["env", "--default-signal=INT", "setpriv", "--pdeathsig", "TERM", "--", *command]
        with log.open("ab") as output:
            since = output.tell()
            process = subprocess.Popen(
                guarded,
                cwd=ROOT,
                env={**self.environment(), MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            part = Part(name, process, log, since)
        self.parts.append(part)
        return part

    def _until_healthy(self, part: Part, url: str) -> None:
        def check() -> None:
            if not part.alive:
                raise CannotStart(f"{part.name} {part.ending} while it started. {self._log_of(part)}")

        try:
            until_answered(url, check)
        except httpx.HTTPError:
            raise CannotStart(f"{part.name} did not answer within {START_DEADLINE:g} s. {self._log_of(part)}") from None

    def _until_done(self, part: Part) -> None:
        try:
            code = part.process.wait(START_DEADLINE)
        except subprocess.TimeoutExpired:
            raise CannotStart(f"{part.name} has not ended within {START_DEADLINE:g} s. {self._log_of(part)}") from None
        if code:
            raise CannotStart(f"{part.name} {part.ending}. {self._log_of(part)}")
        self.parts.remove(part)

    def _log_of(self, part: Part) -> str:
        """Where its log is, and how it ends, without what may be secret in it."""
        with part.log.open("rb") as file:
            file.seek(part.since)
            said = file.read().decode(errors="replace")
        lines = self._without_secrets(said).rstrip().splitlines()[-_EXCERPT:]
        return f"Its log is {part.log}" + ("".join(f"\n  {line}" for line in lines) if lines else ", and it is empty.")

    def _without_secrets(self, text: str) -> str:
        """
        *text* without credentials: those of the definitions and of the environment, logins in URLs, and what
        pydantic quotes of a value that it refuses.
        """
        options = [
            option
            for block in self._environments
            for option in (block.results_options, block.fetch_options, block.chains, block.signer)
            if option is not None
        ]
        secrets = {*_texts([option.get_secret_value() for option in options]), *_credentials(self.environment())}
        for secret in sorted(secrets, key=len, reverse=True):
            # Prefect breaks the lines that it prints, and draws frames around some: also in the middle of a word.
            text = re.sub(r"[\s│]*".join(map(re.escape, secret)), "***", text)
        text = re.sub(r"(?<=://)[^\s/@]+@", "***@", text)
        return re.sub(r"input_value=.*?(?=,[\s│]+input_type=|$)", "input_value=***", text, flags=re.DOTALL)


def until_answered(url: str, before_each: Callable[[], None] = lambda: None) -> None:
    """
    Wait until *url* answers well, calling *before_each* before every try; what that raises ends the waiting.

    Raises:
        httpx.HTTPError: The last failure, after START_DEADLINE seconds.
    """

    def ask() -> None:
        before_each()
        httpx.get(url, timeout=5.0).raise_for_status()

    Retrying(
        retry=retry_if_exception_type(httpx.HTTPError),
        stop=stop_after_delay(START_DEADLINE),
        wait=wait_fixed(0.2),
        reraise=True,
    )(ask)


def _usable_port(port: int, user: str) -> int:
    """*port*, or a free one for 0. Raises: CannotStart if it cannot be listened on."""
    if port == 0:
        return free_port()
    with socket.socket() as probe:
        # As servers do: connections that were closed a moment ago are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as fault:
            reason = (fault.strerror or str(fault)).lower()
            raise CannotStart(f"port {port} cannot be used for {user}: {reason}; choose another") from None
    return port


def _without_values(fault: Exception) -> str:
    """What is wrong with a file and where, without anything that stands in it: it may hold credentials."""
    if isinstance(fault, ValidationError):
        problems = fault.errors(include_input=False, include_url=False, include_context=False)
        return "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems)
    if isinstance(fault, yaml.MarkedYAMLError) and fault.problem_mark is not None:
        return f"line {fault.problem_mark.line + 1}: {fault.problem}"
    return fault.strerror or type(fault).__name__ if isinstance(fault, OSError) else type(fault).__name__


def _texts(value: Any) -> Iterator[str]:
    """Every text in *value* that is long enough to be a secret and not a word of any sentence."""
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
    elif isinstance(value, str) and len(value) >= 6:
        yield value


def _credentials(variables: Mapping[str, str]) -> Iterator[str]:
    for name, value in variables.items():
        if re.search("KEY|TOKEN|SECRET|PASSW|AUTH|CREDENTIAL|SIGNER|CHAINS", name) and not name.endswith("_FILE"):
            yield from _texts(value)


def interruptible() -> None:
    """
    SIGTERM ends this program as Ctrl-C does; so does SIGINT where a shell started it with SIGINT ignored, and the
    end of its terminal, unless it was started by nohup.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def wait_for_interrupt(service: Service) -> None:
    """Keep *service* up until Ctrl-C or SIGTERM. Raises: CannotStart if it cannot be kept up."""
    with suppress(KeyboardInterrupt):
        while True:
            service.keep_up()
            time.sleep(0.5)
