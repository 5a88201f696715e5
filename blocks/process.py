"""
Algorithms as sandboxed processes, through bubblewrap: the embedded default, without a daemon.

What stands between an algorithm and the machine, from the outside in:

- a cgroup of its own where one can be made (v1 or v2), else a watcher that sums the processes of the run;
- namespaces made by ``bwrap``: pid, mount, ipc, uts, cgroup, and net unless the execution has a network;
- an unprivileged user without capabilities, and no way to gain any (no_new_privs);
- resource limits of that user, and a seccomp filter.

Before the algorithm a small ``sh`` stands inside, the porter, under the same user and filter. It announces itself,
waits for its orders on a pipe and starts the algorithm. Two things follow from it: an error of the set-up is told
apart from an error of the algorithm, and an algorithm never starts under a caller that has died meanwhile, because
every link of the chain caller, ``bwrap``, pid 1 of the namespace is bound to the one before it by then. When pid 1
ends, the kernel ends everything in its namespace before it reports that end.

Which process is pid 1 differs. As root it is bwrap's own: a parent death signal counts as sent by the parent, and a
``bwrap`` without capabilities may not kill what runs as another user. Otherwise it is the porter: bwrap's own would
run as the algorithm's user without a filter, and could be taken over through /proc/1/mem.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from threading import Event
from typing import IO, Any, Final

import psutil

from blocks.limits import GIB, MIB, Limits
from blocks.run_folder import (
    LOG_NAME,
    DiskWatch,
    give_back,
    hand_over,
    private_uid,
    scratch_bytes,
    unlinked,
)
from blocks.runner import (
    GRACE,
    TICK,
    Ending,
    Execution,
    ExitReport,
    Folders,
    Image,
    Runner,
    Waiting,
    told_of_code,
    told_of_limit,
    unheard,
    without_paths,
)

SETUP: Final = 30.0
"""Seconds a sandbox may take to stand; it takes some hundredths."""

_BIN: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PYTHON_LINKS: Final = "/run/python"


@dataclass(frozen=True)
class ProcessRunner(Runner):
    """
    One sandboxed process per run; *image* of an execution is ignored, gpus are not offered.

    As root the algorithm gets a user id of its own, so ``outputs`` and ``logs`` change their owner for the time of
    the run, and what is not readable for others in ``inputs``, ``ddos``, ``transformations`` and the log becomes
    so, except files with a second hard link: their other name may be elsewhere. The parent of these folders must
    keep other users out. As any other user the algorithm is the same user in a user namespace of its own.

    The end of a run is bound to the *thread* that called ``run``, not only to its process: Linux keeps the parent
    death signal per thread. A thread that is inside ``run`` cannot end before it, so only whoever takes a
    thread's life by force will notice.

    With a network the algorithm shares the machine's: it reaches everything the machine reaches, loopback
    included. Give it one only where a firewall stands around the machine.
    """

    bwrap: str = "bwrap"
    """The bubblewrap program, by name or path."""
    system: tuple[Path, ...] = ()
    """More paths the algorithm may read, at the same place as on the machine."""
    path: tuple[Path, ...] = ()
    """Folders of programs that come before the system's in PATH; each has to be visible by *system*."""
    cgroups: bool = True
    """False leaves memory to the watcher, which sees a run only every now and then: for machines where cgroups
    are writable but belong to somebody else."""
    allow_unsandboxed: bool = False
    """Run even where there is an obstacle: as a plain process of the service's user, who reads what the service
    reads and writes what it writes. For algorithms one would run by hand. Limits, log and endings hold as far as
    they can; a process that leaves session, environment and parent behind escapes them."""

    def obstacle(self) -> str | None:
        # A success is remembered, a failure is not: the remedy takes effect without a restart.
        try:
            _probe(self, os.geteuid())
        except _Obstacle as obstacle:
            return str(obstacle)
        return None

    def run(self, execution: Execution, *, stop: Event | None = None, on_waiting: Waiting = unheard) -> ExitReport:
        obstacle = self.obstacle()
        if obstacle is None:
            return _carry_out(self, execution, sandboxed=True, stop=stop or Event())
        if self.allow_unsandboxed:
            return _carry_out(self, execution, sandboxed=False, stop=stop or Event())
        return ExitReport(Ending.REFUSED, None, 0.0, obstacle)


class _Obstacle(Exception):
    """Why there is no sandbox on this machine, with the remedy."""


class _NotStarted(OSError):
    """The set-up failed before the algorithm began; the text is of the tool that failed."""


@cache
def _probe(runner: ProcessRunner, euid: int) -> None:
    """Shut ``true`` in. Raises _Obstacle, which ``cache`` does not keep. *euid*: a success holds for one user."""
    if shutil.which(runner.bwrap) is None:
        raise _Obstacle(f"{runner.bwrap} is not installed; install bubblewrap: apt-get install bubblewrap")
    for tool in ("setpriv", "prlimit"):
        if shutil.which(tool) is None:
            raise _Obstacle(f"{tool} is not installed; install util-linux: apt-get install util-linux")
    try:
        _seccomp_filter()
    except (ImportError, RuntimeError, OSError):
        raise _Obstacle("libseccomp cannot be loaded; install it: apt-get install libseccomp2") from None
    with tempfile.TemporaryDirectory(prefix="c2d-probe-") as folder:
        tree = {name: Path(folder) / name for name in ("inputs", "ddos", "transformations", "outputs", "logs")}
        for made in tree.values():
            made.mkdir()
        log = Path(folder) / "log"
        log.touch()
        trivial = Execution(
            name=f"probe-{os.getpid()}-{threading.get_ident()}",
            entrypoint="true",
            folders=Folders(**tree, log=log),
            limits=Limits(seconds=SETUP, memory_bytes=256 * MIB, disk_bytes=64 * MIB),
            image=Image("none"),
        )
        try:
            report = _carry_out(runner, trivial, sandboxed=True, stop=Event())
        except OSError as error:
            raise _Obstacle(_with_remedy(str(error))) from None
        if not report.ok:
            raise _Obstacle(f"a trivial program {report.detail} in the sandbox; look at the load of this machine")


def _with_remedy(message: str) -> str:
    if "namespace" in message and os.geteuid() == 0:
        remedy = "give the service CAP_SYS_ADMIN, or run it as another user than root"
    elif "namespace" in message or "uid map" in message:
        remedy = "allow unprivileged user namespaces on this machine, or run the service as root"
    elif "proc" in message:
        remedy = "give the container of the service an unmasked /proc"
    else:
        remedy = "make this work by hand first"
    return f"{message}; {remedy}"


def _carry_out(runner: ProcessRunner, execution: Execution, *, sandboxed: bool, stop: Event) -> ExitReport:
    folders, limits = execution.folders, execution.limits
    written = 0
    try:
        with ExitStack() as undo:
            log = undo.enter_context(folders.log.open("ab"))
            groups = undo.enter_context(_cgroups(execution)) if runner.cgroups else _Cgroups()
            if sandboxed:
                uid = private_uid(execution.name)
                hand_over(folders, uid)
                descriptors = _sandbox_arguments(runner, execution, uid, undo)
                command = [
                    *(runner.bwrap, "--args", str(descriptors[-1]), "--"),
                    *_become(uid),
                    *_limited(limits, groups, processes=limits.processes + 1),  # the porter counts as one
                    *("sh", "-c", _PORTER.format(start="")),
                ]
                orders = _orders(execution, _variables_inside(runner, execution))
                cwd = Path("/")
            else:
                descriptors = []
                command = [
                    *_stay(),
                    *_limited(limits, groups, processes=_threads_of_this_user() + limits.processes),
                    *("sh", "-c", _PORTER.format(start="exec ")),
                ]
                orders = _orders(execution, _variables_outside(runner, execution))
                cwd = folders.inputs.parent
            try:
                child = undo.enter_context(
                    _started(
                        [*groups.join, *command],
                        log=log.fileno(),
                        descriptors=descriptors,
                        cwd=cwd,
                        mark=None if sandboxed else f"OUTPUTS={folders.outputs}",
                    )
                )
            except _NotStarted:
                if groups.oom_kills():
                    return ExitReport(Ending.OUT_OF_MEMORY, None, 0.0, told_of_limit(Ending.OUT_OF_MEMORY, limits))
                raise
            began = time.monotonic()
            child.order(orders)
            ending = _watch(child, folders, limits, groups, deadline=began + limits.seconds, stop=stop)
            code = child.kill()
            seconds = time.monotonic() - began
            if ending is Ending.EXITED and groups.oom_kills():
                # Whatever the code: a parent may not have noticed that a child was killed.
                ending = Ending.OUT_OF_MEMORY
    finally:
        written = give_back(folders, shown=sandboxed)
    if ending is Ending.EXITED and (code == 128 + signal.SIGXFSZ or written >= limits.disk_bytes):
        ending = Ending.DISK_FULL
    if ending is Ending.EXITED:
        return ExitReport(ending, code, seconds, told_of_code(code))
    return ExitReport(ending, None, seconds, told_of_limit(ending, limits))


# --- What is started ------------------------------------------------------------------------------------------

# dash knows descriptors of one digit only, so all three channels are standard ones: orders on 0, the log on 1,
# the state of the set-up on 2. `exit` at the end keeps sh from replacing itself by the algorithm, which as pid 1
# would be deaf to signals; without a sandbox just that is wanted.
_PORTER: Final = (
    'echo ready >&2; exec 2>/dev/null; run=$(cat); exec </dev/null; [ "$run" ] || exit 125; eval "{start}$run"; exit $?'
)


def _orders(execution: Execution, variables: Mapping[str, str]) -> str:
    """
    The line that starts the algorithm.

    Variables travel here and not by the command line or ``bwrap --setenv``: a command line is readable by
    everybody on the machine, and LD_PRELOAD must not reach a program that still has privileges.
    """
    assignments = [f"{name}={value}" for name, value in variables.items()]
    return shlex.join(["env", "-i", *assignments, "/bin/sh", "-c", execution.entrypoint]) + " 2>&1"


def _variables_inside(runner: ProcessRunner, execution: Execution) -> dict[str, str]:
    return {
        "PATH": ":".join((_PYTHON_LINKS, *_programs(runner))),
        "HOME": "/tmp",  # noqa: S108 - the run's own
        "LANG": "C.UTF-8",
        **execution.variables,
        "VOLUME": "/data",
        "INPUTS": "/data/inputs",
        "OUTPUTS": "/data/outputs",
        "LOGS": "/data/logs",
        "ALGO": "/data/transformations/algorithm",
    }


def _variables_outside(runner: ProcessRunner, execution: Execution) -> dict[str, str]:
    folders = execution.folders
    return {
        "PATH": ":".join(_programs(runner)),
        "HOME": "/tmp",  # noqa: S108
        "LANG": "C.UTF-8",
        **execution.variables,
        "VOLUME": str(folders.inputs.parent),
        "INPUTS": str(folders.inputs),
        "OUTPUTS": str(folders.outputs),
        "LOGS": str(folders.logs),
        "ALGO": str(folders.transformations / "algorithm"),
    }


def _programs(runner: ProcessRunner) -> list[str]:
    """Folders of PATH: the service's Python, unless it is the system's and stands there with the system."""
    python = Path(sys.base_prefix)
    own = [] if python.is_relative_to("/usr") else [f"{python}/bin"]
    return [*own, *map(str, runner.path), _BIN]


def _become(uid: int) -> list[str]:
    """
    From the privileges of the set-up to none.

    The death signal is set again, last: the kernel clears it when the user changes.
    """
    change = ("--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--bounding-set=-all")
    return [
        "setpriv",
        *(change if os.geteuid() == 0 else ()),
        *("--inh-caps=-all", "--no-new-privs", "--pdeathsig", "KILL"),
    ]


def _stay() -> list[str]:
    """The service's user, without a way up; root loses its capabilities at the next exec."""
    lose = ("--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    return ["setpriv", *lose, "--no-new-privs", "--pdeathsig", "KILL"]


def _limited(limits: Limits, groups: _Cgroups, *, processes: int) -> list[str]:
    """
    Resource limits, set by the user they count for.

    Since Linux 5.14 a user namespace counts its processes apart; before that, *processes* of an unprivileged
    service includes the service's own.
    """
    wanted = {
        "nproc": (resource.RLIMIT_NPROC, processes),
        "fsize": (resource.RLIMIT_FSIZE, limits.disk_bytes),
        "core": (resource.RLIMIT_CORE, 0),
        "nofile": (resource.RLIMIT_NOFILE, 16_384),
    }
    if groups.memory is None:
        # Address space is no measure of memory: runtimes reserve many GiB they never touch. It only stops what
        # is faster than the watcher.
        wanted["as"] = (resource.RLIMIT_AS, limits.memory_bytes + 16 * GIB)
    options = []
    for name, (kind, value) in wanted.items():
        hard = resource.getrlimit(kind)[1]
        options.append(f"--{name}={value if hard == resource.RLIM_INFINITY else min(value, hard)}")
    return ["prlimit", *options]


def _threads_of_this_user() -> int:
    mine = (p for p in psutil.process_iter(["uids", "num_threads"]) if p.info["uids"])
    return sum(p.info["num_threads"] or 0 for p in mine if p.info["uids"].real == os.getuid())


# --- The sandbox ----------------------------------------------------------------------------------------------


def _sandbox_arguments(runner: ProcessRunner, execution: Execution, uid: int, undo: ExitStack) -> list[int]:
    """Descriptors for bwrap, open until *undo*: last the file of its arguments, before it the files these name."""
    folders, limits = execution.folders, execution.limits
    descriptors: list[int] = []

    def holding(content: bytes | str) -> str:
        descriptor = os.memfd_create("c2d")
        undo.callback(os.close, descriptor)
        descriptors.append(descriptor)
        os.write(descriptor, content if isinstance(content, bytes) else content.encode())
        os.lseek(descriptor, 0, os.SEEK_SET)
        return str(descriptor)

    arguments: list[str | Path] = [
        *("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *(() if execution.network else ("--unshare-net",)),
        *("--hostname", "c2d", "--die-with-parent", "--new-session"),
        *("--clearenv", "--setenv", "PATH", _BIN),
        *("--cap-drop", "ALL"),
    ]
    if os.geteuid() == 0:
        # No user namespace: its root would still be the machine's root to the kernel. These three are what
        # setpriv needs to become the run's user, and are gone after it.
        arguments += [a for c in ("SETUID", "SETGID", "SETPCAP") for a in ("--cap-add", f"CAP_{c}")]
    else:
        arguments += ["--unshare-user", "--uid", str(uid), "--gid", str(uid), "--as-pid-1"]
    arguments += ["--seccomp", holding(_seccomp_filter())]
    # What stands on a tmpfs is memory, whoever counts it. Before the rest, which may lie below /tmp.
    scratch = ("--perms", "1777", "--size", str(min(limits.disk_bytes, limits.memory_bytes)), "--tmpfs")
    arguments += ["--proc", "/proc", "--dev", "/dev", *scratch, "/dev/shm", *scratch, "/tmp"]  # noqa: S108
    arguments += _system(runner)
    arguments += _etc(execution.network)
    arguments += [
        *("--perms", "0444", "--file", holding(f"algorithm:x:{uid}:{uid}::/tmp:/bin/sh\n"), "/etc/passwd"),
        *("--perms", "0444", "--file", holding(f"algorithm:x:{uid}:\n"), "/etc/group"),
    ]
    if not execution.network:
        arguments += ["--perms", "0444", "--file", holding("127.0.0.1 localhost\n"), "/etc/hosts"]
    arguments += [
        *("--perms", "0755", "--dir", "/data"),
        *("--ro-bind", folders.inputs, "/data/inputs"),
        *("--ro-bind", folders.ddos, "/data/ddos"),
        *("--ro-bind", folders.transformations, "/data/transformations"),
        *("--bind", folders.outputs, "/data/outputs"),
        *("--bind", folders.logs, "/data/logs"),
        *("--ro-bind", folders.log, f"/data/logs/{LOG_NAME}"),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/data"),
    ]
    holding(b"".join(os.fsencode(argument) + b"\0" for argument in arguments))
    return descriptors


def _system(runner: ProcessRunner) -> list[str | Path]:
    """Programs and libraries as they are on the machine, and Python. Never the service's own environment."""
    arguments: list[str | Path] = ["--ro-bind", "/usr", "/usr"]
    for path in (Path("/bin"), Path("/sbin"), *sorted(Path("/").glob("lib*"))):
        if path.is_symlink():
            arguments += ["--symlink", path.readlink(), path]
        elif path.is_dir():
            arguments += ["--ro-bind", path, path]
    python = Path(sys.base_prefix)
    bound = [Path("/usr"), *runner.system]
    if not python.is_relative_to("/usr"):
        bound.append(python)
    for path in bound[1:]:
        arguments += [*_parents(path), "--ro-bind", path, path]
    program = python / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    arguments += _parents(Path(_PYTHON_LINKS, "python"))
    if program.exists():
        for name in ("python", "python3"):
            arguments += ["--symlink", program, f"{_PYTHON_LINKS}/{name}"]
    venv = Path(sys.prefix)
    if venv != python and any(venv.is_relative_to(path) for path in bound):
        arguments += ["--tmpfs", venv, "--remount-ro", venv]
    return arguments


def _parents(path: Path) -> list[str | Path]:
    """Those bwrap would make by itself are closed to everybody but the user it runs as."""
    return [a for above in reversed(path.parents[:-1]) for a in ("--perms", "0755", "--dir", above)]


def _etc(network: bool) -> list[str | Path]:
    """What programs need to start, and with a network what they need to find and to trust a host."""
    names = ["ld.so.cache", "alternatives"]
    if network:
        names += ["resolv.conf", "hosts", "nsswitch.conf", "ssl/certs", "ssl/openssl.cnf"]
        names += ["pki/tls/certs", "pki/ca-trust/extracted"]
    paths = [Path("/etc", name) for name in names]
    return [argument for path in paths for argument in (*_parents(path), "--ro-bind-try", path, path)]


_DENIED: Final = """
    acct add_key bpf chroot clock_adjtime clock_adjtime64 clock_settime clock_settime64
    create_module delete_module fanotify_init finit_module fsconfig fsmount fsopen fspick
    get_kernel_syms init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp
    kexec_file_load kexec_load keyctl lookup_dcookie mount mount_setattr move_mount move_pages
    name_to_handle_at nfsservctl open_by_handle_at open_tree perf_event_open pidfd_getfd pivot_root
    process_madvise process_vm_readv process_vm_writev ptrace query_module quotactl quotactl_fd
    reboot request_key sethostname setdomainname setns settimeofday stime swapoff swapon _sysctl
    sysfs syslog umount umount2 unshare uselib userfaultfd ustat vhangup vm86 vm86old
""".split()  # noqa: SIM905 - one call a line would be two screens
"""What Docker's default profile denies to a container without capabilities, and ptrace."""

_CLONE_NEW: Final = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_TIOCSTI: Final = 0x5412
_TIOCLINUX: Final = 0x541C
_FAMILIES: Final = (1, 2, 10, 16)
"""unix, inet, inet6, netlink: those a network namespace holds. vsock reaches the hypervisor from any namespace."""


@cache
def _seccomp_filter() -> bytes:
    """
    The filter as a BPF program: everything but the denied. Calls of another architecture end the process.

    Raises: RuntimeError, ImportError or OSError without libseccomp; hence the import here.
    """
    import pyseccomp  # noqa: PLC0415

    eperm, enosys = pyseccomp.ERRNO(errno.EPERM), pyseccomp.ERRNO(errno.ENOSYS)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)

    def deny(call: str, *where: Any, action: int = eperm) -> None:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call)
        if number != -1:  # -1: a call this libseccomp has not heard of
            rules.add_rule(action, number, *where)

    for call in _DENIED:
        deny(call)
    for flag in _CLONE_NEW:
        deny("clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    # The flags of clone3 are in memory, where no filter sees them; ENOSYS makes libraries fall back to clone.
    deny("clone3", action=enosys)
    for command in (_TIOCSTI, _TIOCLINUX):
        deny("ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, 0xFFFFFFFF, command))
    # Compared as 64 bits while the kernel reads 32: a number with high bits set is "greater" and denied too.
    deny("socket", pyseccomp.Arg(0, pyseccomp.GT, max(_FAMILIES)))
    for family in set(range(max(_FAMILIES))) - set(_FAMILIES):
        deny("socket", pyseccomp.Arg(0, pyseccomp.EQ, family))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


# --- One run, seen from outside -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Child:
    """A run that stands ready."""

    process: subprocess.Popen[bytes]
    """What was started: bwrap, or the algorithm itself."""
    top: psutil.Process
    """Pid 1 of the sandbox, whose end is the end of all; without one, the algorithm itself."""
    handle: int
    """pidfd of *top*: a signal by it never hits a process that got the same number later."""
    porter: psutil.Process
    """May be *top*."""
    orders: IO[bytes]
    mark: str | None
    """A line of the environment by which a plain run's strays are known; None in a sandbox, which has none."""

    @property
    def scratch_seen_by(self) -> int | None:
        return self.top.pid if self.mark is None else None

    def order(self, text: str) -> None:
        # A broken pipe: the run is over already, its exit code will tell.
        with suppress(BrokenPipeError), self.orders:
            self.orders.write(text.encode())

    def wait(self, seconds: float) -> bool:
        """Whether the first process has ended within *seconds*."""
        poll = select.poll()
        poll.register(self.handle, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def members(self) -> list[psutil.Process]:
        """Every process of the algorithm that is alive."""
        found: set[psutil.Process] = set()
        with suppress(psutil.Error):
            found.update(self.top.children(recursive=True))
        if self.mark is not None:
            found.update(self._strays(self.mark))
            found.add(self.top)
        else:
            found.discard(self.porter)
        return [p for p in found if _alive(p)]

    def _strays(self, mark: str) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                environment = Path(f"/proc/{process.pid}/environ")
                if os.getsid(process.pid) == self.top.pid or os.fsencode(mark) in environment.read_bytes().split(b"\0"):
                    yield process

    def ask_to_end(self, until: float) -> None:
        """SIGTERM to every process of the algorithm; wait until they are gone, but not past *until*."""
        if self.mark is None:
            # Otherwise the first of them to end, say the shell of the entrypoint, takes the porter and with it
            # the rest along, in the middle of their cleaning up.
            with suppress(psutil.Error):
                self.porter.suspend()
        members = self.members()
        for process in members:
            with suppress(psutil.Error):
                process.terminate()
        while members and time.monotonic() < until:
            time.sleep(TICK / 5)
            members = [process for process in members if _alive(process)]

    def kill(self) -> int:
        """End everything; return the exit code. Safe to repeat."""
        patience = time.monotonic() + SETUP
        while True:
            members = [] if self.mark is None else self.members()
            if not members and self.wait(0):
                break
            if time.monotonic() > patience:
                raise OSError(errno.EBUSY, "a killed process does not end")
            for process in members:
                with suppress(psutil.Error):
                    process.kill()
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            if self.wait(TICK) and members:
                time.sleep(TICK / 10)
        code = self.process.wait()
        if self.top.pid != self.process.pid:
            # Where the service is pid 1 of a container, it inherits what bwrap leaves.
            with suppress(ChildProcessError):
                os.waitpid(self.top.pid, os.WNOHANG)
        return code if code >= 0 else 128 - code


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def _started(
    command: Sequence[str], *, log: int, descriptors: Sequence[int], cwd: Path, mark: str | None
) -> Iterator[_Child]:
    """A run that waits for its orders; nothing of it lives after the block. Raises: _NotStarted."""
    with ExitStack() as undo:

        def pipe() -> tuple[IO[bytes], IO[bytes]]:
            reader, writer = os.pipe()
            return undo.enter_context(os.fdopen(reader, "rb")), undo.enter_context(os.fdopen(writer, "wb"))

        orders_end, orders = pipe()
        state, state_end = pipe()
        process = subprocess.Popen(
            command,
            stdin=orders_end,
            stdout=log,
            stderr=state_end,
            pass_fds=descriptors,
            cwd=cwd,
            # Not the service's environment, though it is cleared again inside: it would stand in /proc beside
            # the algorithm for as long as any program of the set-up does.
            env={"PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,
        )
        undo.callback(process.wait)
        undo.callback(process.kill)
        orders_end.close()
        state_end.close()
        _await_readiness(state.fileno())
        try:
            top = porter = psutil.Process(process.pid)
            if mark is None:
                top = porter = top.children()[0]
                if os.geteuid() == 0:
                    porter = top.children()[0]
                    # Asleep means that it waits for its child, which it does once it is bound to its parent.
                    while top.status() != psutil.STATUS_SLEEPING:
                        if not _alive(top):
                            raise psutil.NoSuchProcess(top.pid)
                        time.sleep(TICK / 50)
            handle = os.pidfd_open(top.pid)
        except (IndexError, psutil.Error, ProcessLookupError):
            raise _NotStarted("the sandbox ended before it was used") from None
        undo.callback(os.close, handle)
        child = _Child(process, top, handle, porter, orders, mark)
        undo.callback(child.kill)
        yield child


def _await_readiness(state: int) -> None:
    poll = select.poll()
    poll.register(state, select.POLLIN)
    patience = time.monotonic() + SETUP
    said = b""
    while not said.endswith(b"ready\n"):
        if not poll.poll(max(0.0, patience - time.monotonic()) * 1000):
            raise _NotStarted(f"no sandbox within {SETUP:g} s")
        more = os.read(state, 4096)
        if not more:
            raise _NotStarted(without_paths(said.decode(errors="replace")) or "the sandbox ended before it stood")
        said += more


# --- Limits that are watched ----------------------------------------------------------------------------------


def _watch(
    child: _Child, folders: Folders, limits: Limits, groups: _Cgroups, *, deadline: float, stop: Event
) -> Ending:
    """Wait for the end or for a limit. Only at the deadline and on a stop has the algorithm been asked to end."""
    memory = _MemoryWatch(child, limits.memory_bytes)
    with closing(DiskWatch(folders, limits.disk_bytes, members=child.members, top=child.scratch_seen_by)) as disk:
        while not child.wait(min(TICK, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                child.ask_to_end(deadline + GRACE)
                return Ending.TIMED_OUT
            if stop.is_set():
                child.ask_to_end(time.monotonic() + GRACE)
                return Ending.STOPPED
            if groups.oom_kills() if groups.memory else memory.exceeded():
                return Ending.OUT_OF_MEMORY
            if disk.full():
                return Ending.DISK_FULL
    return Ending.EXITED


class _MemoryWatch:
    """An estimate, for machines without cgroups: what the processes hold, and what stands on the run's tmpfs."""

    def __init__(self, child: _Child, limit: int) -> None:
        self._child = child
        self._limit = limit
        self._due = 0.0

    def exceeded(self) -> bool:
        began = time.monotonic()
        if began < self._due:
            return False
        members = self._child.members()
        elsewhere = sum(scratch_bytes(self._child.scratch_seen_by))
        elsewhere += sum(f.st_blocks * 512 for f, memory in unlinked(members) if memory)
        exceeded = elsewhere + sum(map(_resident, members)) > self._limit
        if exceeded:
            # Resident sizes count a page once per process that shares it; before a run dies for it, it is
            # counted once.
            exceeded = elsewhere + sum(map(_proportional, members)) > self._limit
        now = time.monotonic()
        self._due = now + 4 * (now - began)
        return exceeded


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _proportional(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return _resident(process)


# --- Cgroups --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cgroups:
    """The cgroups of one run; none where none could be made."""

    folders: tuple[Path, ...] = ()
    memory: Path | None = None
    """The file with the count of processes killed for memory."""

    @property
    def join(self) -> list[str]:
        """
        What to put before a command so that it starts inside.

        Not by preexec_fn: the service runs in threads, where Python between fork and exec can block for ever.
        """
        if not self.folders:
            return []
        script = 'until [ "$1" = -- ]; do echo $$ > "$1" || exit 126; shift; done; shift; exec "$@"'
        return ["sh", "-c", script, "sh", *(str(f / "cgroup.procs") for f in self.folders), "--"]

    def oom_kills(self) -> int:
        if self.memory is None:
            return 0
        fields = dict(line.split(maxsplit=1) for line in self.memory.read_text().splitlines())
        return int(fields.get("oom_kill", 0))


@contextmanager
def _cgroups(execution: Execution) -> Iterator[_Cgroups]:
    """Below the service's own cgroups, so that what limits the service limits its runs too."""
    own = _own_cgroups()
    name = f"c2d-{execution.name}"
    made: dict[str, Path] = {}
    try:
        settings = _settings(execution.limits, unified=False)
        for controller in settings.keys() & own.keys():
            if _make_cgroup(own[controller] / name, settings[controller]):
                made[controller] = own[controller] / name
        counter = "memory.oom_control"
        if "memory" not in made and "" in own:
            counter = "memory.events"
            made |= _make_unified(own[""], name, _settings(execution.limits, unified=True))
        memory = made.get("memory")
        yield _Cgroups(tuple(sorted(set(made.values()))), memory and memory / counter)
    finally:
        for folder in set(made.values()):
            _remove_cgroup(folder)


def _settings(limits: Limits, *, unified: bool) -> dict[str, dict[str, str]]:
    """File and value by controller. A name that begins with "?" may fail: not every kernel has the file."""
    processes = str(limits.processes + 3)  # bwrap outside and inside, and the porter
    quota = int(limits.cpus * 100_000)
    if unified:
        return {
            "memory": {
                "memory.max": str(limits.memory_bytes),
                "?memory.swap.max": "0",
                "?memory.oom.group": "1",
            },
            "pids": {"pids.max": processes},
            "cpu": {"cpu.max": f"{max(quota, 1000)} 100000"},
        }
    return {
        "memory": {
            "memory.limit_in_bytes": str(limits.memory_bytes),
            "?memory.memsw.limit_in_bytes": str(limits.memory_bytes),
        },
        "pids": {"pids.max": processes},
        "cpu": {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": str(max(quota, 1000))},
    }


def _own_cgroups() -> dict[str, Path]:
    """The folders of the cgroups this process is in, by controller of v1; that of v2 under ''."""
    memberships: dict[str, PurePosixPath] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        memberships |= dict.fromkeys(controllers.split(","), PurePosixPath(path))
    own = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        root, folder = mount.split()[3:5]
        if kind.startswith("cgroup2 "):
            controllers = ""
        elif kind.startswith("cgroup "):
            controllers = kind.split()[-1]
        else:
            continue
        for controller in controllers.split(","):
            path_inside = memberships.get(controller)
            if path_inside is not None and path_inside.is_relative_to(root):
                own[controller] = Path(folder) / path_inside.relative_to(root)
    return own


def _make_cgroup(folder: Path, settings: Mapping[str, str]) -> bool:
    """A cgroup with these settings; what a crashed run of the same name left is removed first."""
    try:
        _remove_cgroup(folder)
        folder.mkdir()
    except OSError:
        return False
    for file, value in settings.items():
        try:
            (folder / file.removeprefix("?")).write_text(value)
        except OSError:
            if not file.startswith("?"):
                _remove_cgroup(folder)
                return False
    return True


def _make_unified(own: Path, name: str, settings: Mapping[str, Mapping[str, str]]) -> dict[str, Path]:
    """
    One folder for all controllers there are.

    v2 lets a cgroup share out controllers only when no process is in it. A service whose own cgroup cannot
    therefore looks one up, if that was delegated to it: systemd does so and marks it with Delegate=yes, and puts
    the service itself one down with DelegateSubgroup=service.
    """
    above = [own.parent] if _delegated(own.parent) else []
    for parent in (own, *above):
        try:
            there = set((parent / "cgroup.controllers").read_text().split()) & settings.keys()
            control = parent / "cgroup.subtree_control"
            missing = there - set(control.read_text().split())
            if missing:
                control.write_text(" ".join(f"+{controller}" for controller in sorted(missing)))
        except OSError:
            continue
        wanted = {file: value for controller in there for file, value in settings[controller].items()}
        if there and _make_cgroup(parent / name, wanted):
            return dict.fromkeys(there, parent / name)
    return {}


def _delegated(folder: Path) -> bool:
    for mark in ("user.delegate", "trusted.delegate"):
        with suppress(OSError):
            if os.getxattr(folder, mark) == b"1":
                return True
    return False


def _remove_cgroup(folder: Path) -> None:
    """Empty and remove a cgroup; none there is fine. Raises: OSError if its processes do not end."""
    patience = time.monotonic() + SETUP
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > patience or not folder.is_dir():
                raise
        for line in (folder / "cgroup.procs").read_text().split():
            # 0 stands for a process of another pid namespace, and to kill it means to kill oneself.
            if int(line) > 0:
                with suppress(ProcessLookupError):
                    os.kill(int(line), signal.SIGKILL)
        time.sleep(TICK / 10)
