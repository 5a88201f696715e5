"""What every runner keeps, whatever the algorithm does. The algorithms are real programs in sh and python3."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from textwrap import dedent

import pytest

from blocks.limits import MIB
from blocks.process import ProcessRunner
from blocks.runner import Ending, ExitReport, Runner
from tests.runner_bench import Bench, a_long_time, bench, eventually, sleepers
from tests.runner_support import Dropped, caller

NO_SANDBOX = "no-bubblewrap-under-this-name"
SANDBOXES = {
    "sandbox": ProcessRunner(),
    "watched": ProcessRunner(cgroups=False),
    "unprivileged": Dropped(ProcessRunner()) if os.geteuid() == 0 else ProcessRunner(cgroups=False),
}
PLAIN = ProcessRunner(bwrap=NO_SANDBOX, allow_unsandboxed=True)

DOCKER = "docker"
KUBERNETES = "kubernetes"
"""Stand for a runner on the engine or the cluster that the session starts; ``runner`` makes one of it."""

every_sandbox = [
    *(pytest.param(r, id=name, marks=pytest.mark.sandbox) for name, r in SANDBOXES.items()),
    pytest.param(DOCKER, id=DOCKER, marks=pytest.mark.docker),
    pytest.param(KUBERNETES, id=KUBERNETES, marks=pytest.mark.kubernetes),
]
every_runner = [*every_sandbox, pytest.param(PLAIN, id="plain")]


@pytest.fixture
def runner(request: pytest.FixtureRequest) -> Runner:
    made: Runner = request.param
    if request.param == DOCKER:
        made = request.getfixturevalue("engine").runner()
    elif request.param == KUBERNETES:
        made = request.getfixturevalue("cluster").runner()
    return made


@pytest.fixture
def any_bench(runner: Runner, root: Path) -> Bench:
    return bench(runner, root)


@pytest.fixture
def sandbox(runner: Runner, root: Path) -> Bench:
    return bench(runner, root)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``any_bench`` and ``sandbox`` tell which runners a test is about."""
    for name, runners in {"any_bench": every_runner, "sandbox": every_sandbox}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize("runner", runners, indirect=True)


# --- Endings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3])
def test_exit_code_is_the_entrypoints(any_bench: Bench, code: int) -> None:
    """An entrypoint that ends by itself is reported with its code."""
    report = any_bench.sh(f"exit {code}")
    assert (Ending.EXITED, code) == (report.ending, report.code)
    assert (code == 0) == report.ok


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_signal_is_128_and_its_number(any_bench: Bench, number: signal.Signals) -> None:
    """An algorithm that a signal ended is told by 128 + n, and named for the consumer."""
    report = any_bench.python(f"import os; os.kill(os.getpid(), {int(number)})")
    assert (Ending.EXITED, 128 + number) == (report.ending, report.code)
    assert number.name in report.detail


def test_algorithm_finds_its_place(any_bench: Bench) -> None:
    """Variables name folders that are there, and $ALGO in the entrypoint is the algorithm."""
    (any_bench.folders.inputs / "numbers").write_text("1 2 3")
    script = """\
        import os, pathlib
        data = pathlib.Path(os.environ["INPUTS"], "numbers").read_text()
        pathlib.Path(os.environ["OUTPUTS"], "sum").write_text(str(sum(map(int, data.split()))))
        pathlib.Path(os.environ["LOGS"], "own.log").write_text(os.environ["GREETING"])
        assert pathlib.Path(os.environ["ALGO"]) == pathlib.Path(__file__)
        assert pathlib.Path(os.environ["VOLUME"]) == pathlib.Path.cwd()
    """
    variables = {"GREETING": "two\nlines and 'quotes' $HOME", "OUTPUTS": "/elsewhere"}
    report = any_bench.runner.run(any_bench.execution(script, variables=variables))
    assert report.ok, any_bench.log
    assert "6" == (any_bench.outputs / "sum").read_text()
    assert variables["GREETING"] == (any_bench.folders.logs / "own.log").read_text()
    assert ["own.log"] == [path.name for path in any_bench.folders.logs.iterdir()]


def test_deadline_asks_first_and_is_kept(any_bench: Bench) -> None:
    """At the deadline the algorithm may clean up; it ends within a second of it in any case."""
    script = """\
        trap 'echo cleaned > $OUTPUTS/last; exit 0' TERM
        while :; do sleep 0.1; done
    """
    report = any_bench.sh(script, seconds=0.7)
    assert (Ending.TIMED_OUT, None) == (report.ending, report.code)
    assert 0.7 <= report.seconds < 1.7 + any_bench.slack
    assert "cleaned\n" == (any_bench.outputs / "last").read_text()


def test_deadline_holds_against_one_that_ignores_it(any_bench: Bench) -> None:
    """Who ignores SIGTERM is killed with all its children, still within a second of the deadline."""
    seconds = a_long_time()
    script = f"trap '' TERM HUP INT; (setsid sleep {seconds} &); while :; do sleep 0.1; done"
    report = any_bench.sh(script, seconds=0.5)
    assert Ending.TIMED_OUT is report.ending
    assert report.seconds < 1.5 + any_bench.slack
    assert "0.5 s" in report.detail
    assert not sleepers(seconds)


def test_a_stop_ends_the_run(any_bench: Bench) -> None:
    """Set from another thread, it ends the algorithm within a second, whatever that ignores; the report says so."""
    stop = threading.Event()
    asked: list[float] = []

    def ask() -> None:
        eventually((any_bench.outputs / "begun").exists, 30)
        asked.append(time.monotonic())
        stop.set()

    thread = threading.Thread(target=ask)
    thread.start()
    script = "trap '' TERM; touch $OUTPUTS/begun; while :; do sleep 0.1; done"
    report = any_bench.sh(script, seconds=30, stop=stop)
    thread.join()
    assert (Ending.STOPPED, None) == (report.ending, report.code)
    assert time.monotonic() - asked[0] < 2 + any_bench.slack


ALLOCATE = """\
    import time
    held = []
    for _ in range(100):
        held.append(b"x" * (8 << 20))
        time.sleep(0.005)
    time.sleep(60)
"""


def test_memory_is_limited(any_bench: Bench) -> None:
    """An algorithm that takes more memory than it has ends at once, and the reason is told with the number."""
    report = any_bench.python(ALLOCATE, memory_bytes=96 * MIB)
    assert (Ending.OUT_OF_MEMORY, None) == (report.ending, report.code)
    assert "96 MiB" in report.detail


def test_memory_of_children_counts(any_bench: Bench) -> None:
    """A child over the limit ends the run, though its parent would have ended well."""
    any_bench.folders.inputs.joinpath("greedy.py").write_text(dedent(ALLOCATE))
    report = any_bench.sh("python3 $INPUTS/greedy.py & wait; exit 0", memory_bytes=96 * MIB)
    assert Ending.OUT_OF_MEMORY is report.ending


def test_memory_of_a_child_is_not_waited_for(any_bench: Bench) -> None:
    """Nor does a parent that does not notice it hold the run until its deadline."""
    any_bench.folders.inputs.joinpath("greedy.py").write_text(dedent(ALLOCATE))
    report = any_bench.sh("python3 $INPUTS/greedy.py; sleep 20", memory_bytes=96 * MIB)
    assert Ending.OUT_OF_MEMORY is report.ending
    assert report.seconds < 15


def test_memory_in_scratch_counts(sandbox: Bench) -> None:
    """Files in /dev/shm, /tmp and memfds are memory and are limited with it."""
    script = """\
        import os, time
        hidden = os.memfd_create("hidden")
        for _ in range(24):
            os.write(hidden, b"x" * (4 << 20))
            open("/dev/shm/seen", "ab").write(b"x" * (4 << 20))
        time.sleep(60)
    """
    assert Ending.OUT_OF_MEMORY is sandbox.python(script, memory_bytes=128 * MIB, disk_bytes=1024 * MIB).ending


@pytest.mark.parametrize(
    "script",
    [
        "import os\nopen(os.environ['OUTPUTS'] + '/one', 'wb').write(b'x' * (32 << 20))",
        """\
        import os, time
        for number in range(64):
            open(os.environ["OUTPUTS"] + f"/{number}", "wb").write(b"x" * (1 << 20))
        time.sleep(60)
        """,
        """\
        import time
        while True:
            print("x" * (1 << 16))
        """,
        """\
        import os, time
        folder = os.environ["LOGS"] + "/deep"
        os.mkdir(folder)
        held = []
        for _ in range(6):
            held.append(open(folder + "/gone", "wb", buffering=0))
            os.unlink(folder + "/gone")
            held[-1].write(b"x" * (4 << 20))
        os.chmod(folder, 0)
        time.sleep(60)
        """,
    ],
    ids=["one file", "many files", "the log", "files without a name"],
)
def test_disk_is_limited(any_bench: Bench, script: str) -> None:
    """Whatever way an algorithm writes more than it may, it ends as out of disk."""
    if any_bench.in_pod and "gone" in script:
        pytest.skip("what has no name on a claim is seen by its node alone")
    report = any_bench.python(script, disk_bytes=16 * MIB)
    assert (Ending.DISK_FULL, None) == (report.ending, report.code)
    assert "16 MiB" in report.detail
    written = sum(p.lstat().st_size for p in any_bench.root.rglob("*"))
    assert written < 96 * MIB


def test_fork_bomb_is_bounded(sandbox: Bench) -> None:
    """Processes end at their number, for the algorithm alone."""
    script = """\
        import os, time
        count = 1
        try:
            while os.fork():
                count += 1
            time.sleep(60)
        except BlockingIOError:
            print("bounded", count)
            time.sleep(0.3)
    """
    ends: list[ExitReport] = []
    thread = threading.Thread(target=lambda: ends.append(sandbox.python(script, processes=40)))
    thread.start()
    assert eventually(lambda: "bounded" in sandbox.log, 30)
    subprocess.run(["true"], check=True)
    thread.join()
    assert ends[0].ok, sandbox.log
    assert 30 < int(sandbox.log.split()[1]) <= 40


# --- Log and leftovers ----------------------------------------------------------------------------------------


def test_log_is_there_as_it_comes(any_bench: Bench) -> None:
    """What the algorithm printed can be read while it runs."""
    script = 'echo first; echo second >&2; until [ -e "$INPUTS/go" ]; do sleep 0.02; done; echo third'
    execution = any_bench.execution(script, entrypoint="sh $ALGO")
    ends: list[ExitReport] = []
    thread = threading.Thread(target=lambda: ends.append(any_bench.runner.run(execution)))
    thread.start()
    assert eventually(lambda: any_bench.log == "first\nsecond\n", 30)
    any_bench.folders.inputs.joinpath("go").touch()
    thread.join()
    assert ends[0].ok
    assert "first\nsecond\nthird\n" == any_bench.log


def test_log_keeps_every_byte(any_bench: Bench) -> None:
    """Bytes that are no text reach the log unchanged."""
    assert any_bench.python("import os; os.write(1, bytes(range(256)) * 300)").ok
    assert bytes(range(256)) * 300 == any_bench.folders.log.read_bytes()


def test_a_closed_stdout_is_no_end(any_bench: Bench) -> None:
    """An algorithm that closes its output and input runs on."""
    report = any_bench.python("""\
        import os, pathlib, time
        for descriptor in range(64):
            try:
                os.close(descriptor)
            except OSError:
                pass
        time.sleep(0.2)
        pathlib.Path(os.environ["OUTPUTS"], "done").touch()
        os._exit(4)
    """)
    assert 4 == report.code
    assert (any_bench.outputs / "done").exists()


def test_nothing_survives_the_run(any_bench: Bench) -> None:
    """Children left behind in sessions of their own are dead when run returns."""
    seconds = a_long_time()
    assert any_bench.sh(f"setsid sleep {seconds} & (setsid nohup sleep {seconds} &) ; sleep 0.2").ok
    assert not sleepers(seconds)


@pytest.mark.parametrize("runner", every_runner, indirect=True)
def test_killed_caller_takes_the_algorithm_along(runner: Runner, root: Path) -> None:
    """SIGKILL of the caller ends the algorithm, and the same run can be repeated after it."""
    here = bench(runner, root)
    seconds = a_long_time()
    children = "" if runner is PLAIN else f"sleep {seconds} & setsid sleep {seconds} &"
    execution = here.execution(f"{children} exec sleep {seconds}", entrypoint="exec sh $ALGO")
    command, environment = caller(runner)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd="/")
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(pickle.dumps((runner.runner if isinstance(runner, Dropped) else runner, execution)))
    assert eventually(lambda: len(sleepers(seconds)) == (1 if runner is PLAIN else 3), 60)
    process.kill()
    process.wait()
    assert eventually(lambda: not sleepers(seconds), 2 + here.slack)
    assert here.sh("echo again").ok
    assert not list(Path("/sys/fs/cgroup").rglob(f"*{here.name}"))


# --- Outputs --------------------------------------------------------------------------------------------------


def test_outputs_come_back_readable(any_bench: Bench) -> None:
    """Whatever modes the algorithm left, everything belongs to the caller and is open to it."""
    script = """\
        cd $OUTPUTS; mkdir -p a/b; echo one > a/b/f; echo two > tool; chmod 4755 tool
        chmod 0 a/b/f; chmod 0 a/b; chmod 0 a; chmod 0 $OUTPUTS $LOGS
    """
    assert any_bench.sh(script).ok, any_bench.log
    assert "one\n" == (any_bench.outputs / "a" / "b" / "f").read_text()
    for path in [any_bench.outputs, any_bench.folders.logs, *any_bench.outputs.rglob("*")]:
        found = path.lstat()
        needed = 0o700 if stat.S_ISDIR(found.st_mode) else 0o600
        assert (any_bench.caller_uid, needed) == (found.st_uid, found.st_mode & needed), path
        assert not found.st_mode & stat.S_ISUID


def test_links_in_outputs_stay_links(any_bench: Bench) -> None:
    """A link to a file of the machine comes back as a link; the file keeps owner and mode."""
    secret = any_bench.root / "secret"
    secret.write_text("mine")
    secret.chmod(0o400)
    folder = any_bench.root / "private"
    folder.mkdir(mode=0o500)
    script = f"cd $OUTPUTS; ln -s {secret} file; ln -s {folder} folder; ln -s / root; ln -s loop loop"
    assert any_bench.sh(script).ok
    assert 4 == sum(path.is_symlink() for path in any_bench.outputs.iterdir())
    for path, mode in ((secret, 0o400), (folder, 0o500)):
        assert (any_bench.caller_uid, mode) == (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode))


def test_an_output_replaced_by_a_link_to_a_secret(any_bench: Bench) -> None:
    """What was a file when it was written, and then a link to one of the service's, comes back as the link it is."""
    secret = any_bench.root / "secret"
    secret.write_text("mine")
    secret.chmod(0o600)
    script = f"""\
        import os
        os.chdir(os.environ["OUTPUTS"])
        for name in ("result", "folder/result"):
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            open(name, "w").write("x")
            os.symlink({str(secret)!r}, name + ".new")
            os.replace(name + ".new", name)
        os.rename("folder", "kept")
        os.symlink({str(secret.parent)!r}, "folder")
    """
    assert any_bench.python(script).ok, any_bench.log
    for name in ("result", "kept/result", "folder"):
        assert (any_bench.outputs / name).is_symlink()
    assert (any_bench.caller_uid, 0o600) == (secret.stat().st_uid, stat.S_IMODE(secret.stat().st_mode))
    assert "mine" == secret.read_text()


def test_outputs_that_are_no_files_do_not_hold_the_run(any_bench: Bench) -> None:
    """Pipes and sockets among the outputs neither block the run nor the return of its folders."""
    report = any_bench.python("""\
        import os, socket, time
        os.chdir(os.environ["OUTPUTS"])
        os.mkfifo("pipe")
        socket.socket(socket.AF_UNIX).bind("socket")
        time.sleep(0.3)
    """)
    assert report.ok, any_bench.log
    assert ["pipe", "socket"] == sorted(path.name for path in any_bench.outputs.iterdir())


def test_many_outputs(any_bench: Bench) -> None:
    """Thousands of files cost no limit."""
    script = """\
        import os
        for number in range(2000):
            with open(f"{os.environ['OUTPUTS']}/{number}", "w") as file:
                file.write(str(number))
    """
    assert any_bench.python(script).ok
    assert 2000 == sum(path.lstat().st_uid == any_bench.caller_uid for path in any_bench.outputs.iterdir())


def test_outputs_deeper_than_a_path(any_bench: Bench) -> None:
    """A tree no path can name is measured and given back like any other."""
    report = any_bench.python("""\
        import os, time
        os.chdir(os.environ["OUTPUTS"])
        for _ in range(250):
            os.mkdir("d" * 40)
            os.chdir("d" * 40)
        open("leaf", "w").close()
        os.chmod(".", 0)
        time.sleep(0.2)
    """)
    assert report.ok, any_bench.log
    descriptor = os.open(any_bench.outputs, os.O_RDONLY)
    for _ in range(250):
        below = os.open("d" * 40, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    found = os.fstat(descriptor)
    os.close(descriptor)
    assert (any_bench.caller_uid, 0o700) == (found.st_uid, stat.S_IMODE(found.st_mode))


# --- Shut in --------------------------------------------------------------------------------------------------


def test_no_privilege_is_left(sandbox: Bench) -> None:
    """The algorithm is nobody: no root, no capability, no way to one, and under a filter."""
    assert sandbox.sh("cat /proc/self/status; id -u; id -G").ok
    lines = sandbox.log.splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert {"0" * 16} == {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
    assert ("1", "2") == (status["NoNewPrivs"], status["Seccomp"])
    assert int(lines[-2]) >= 1000
    assert lines[-1] == lines[-2]


def test_kernel_doors_are_shut(sandbox: Bench) -> None:
    """Mounts, namespaces, tracing, rings and sockets past the network namespace are refused, not fatal."""
    script = """\
        import ctypes, errno, os, socket
        libc = ctypes.CDLL(None, use_errno=True)
        calls = {
            "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
            "unshare user": lambda: libc.unshare(0x10000000),
            "unshare mount": lambda: libc.unshare(0x20000),
            "ptrace": lambda: libc.ptrace(0, 0, None, None),
            "chroot": lambda: libc.chroot(b"/tmp"),
            "sethostname": lambda: libc.sethostname(b"x", 1),
            "io_uring": lambda: libc.syscall(425, 1, None),
            "bpf": lambda: libc.syscall(321, 0, None, 0),
            "keyctl": lambda: libc.syscall(250, 0, -3, 0),
            "vsock": lambda: libc.socket(40, socket.SOCK_STREAM, 0),
        }
        for name in os.environ.get("NOT_ASKED", "").split(","):
            calls.pop(name, None)
        for name, call in calls.items():
            ctypes.set_errno(0)
            if call() != -1 or ctypes.get_errno() != errno.EPERM:
                print("open:", name, os.strerror(ctypes.get_errno()))
        if libc.syscall(435, None, 0) != -1 or ctypes.get_errno() != errno.ENOSYS:
            print("open: clone3")
        import multiprocessing, subprocess, threading
        threading.Thread(target=print, args=("threads",)).start()
        subprocess.run(["echo", "programs"])
        multiprocessing.get_context("fork").Pool(2).map(abs, [1, -2])
    """
    # An engine's own filter allows the first since Linux 4.8; the others are denied by newer engines only.
    variables = {"NOT_ASKED": "ptrace,io_uring,vsock"} if sandbox.in_container else {}
    assert sandbox.runner.run(sandbox.execution(script, variables=variables)).ok, sandbox.log
    assert ["programs", "threads"] == sorted(sandbox.log.split())


def test_network_is_refused(sandbox: Bench) -> None:
    """Neither the machine's own services nor the world can be reached; loopback is the run's own."""
    script = """\
        import os, socket, sys
        port = int(open(os.environ["INPUTS"] + "/port").read())
        for address in (("127.0.0.1", port), ("192.0.2.1", 80)):
            try:
                socket.create_connection(address, timeout=2)
                sys.exit(f"reached {address}")
            except OSError as error:
                print(error.errno)
        others = {name for _, name in socket.if_nameindex()} - {"lo"}
        assert not others or "MAY_HAVE_OTHERS" in os.environ, others
    """
    # What pods have a cluster decides; see the tests of what is particular to it.
    variables = {"MAY_HAVE_OTHERS": "yes"} if sandbox.in_pod else {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        sandbox.folders.inputs.joinpath("port").write_text(str(server.getsockname()[1]))
        assert sandbox.runner.run(sandbox.execution(script, variables=variables)).ok, sandbox.log
        if sandbox.in_pod:
            return
        execution = sandbox.execution(script, network=True)
        assert not sandbox.runner.run(execution).ok
    assert "reached ('127.0.0.1'" in sandbox.log


def test_machine_cannot_be_read(sandbox: Bench) -> None:
    """Files of the machine, of other jobs and of the service are not there."""
    secret = sandbox.root / "secret"
    secret.write_text("c2d-secret")
    secret.chmod(0o644)
    more = "" if sandbox.in_container else "/sys /etc/hostname"  # of its own
    script = f"""\
        for path in {secret} /etc/shadow /root/.bashrc /home /var /boot {more}; do
            [ -e $path ] && echo "there: $path"
        done
        cat {secret} /etc/shadow 2>/dev/null
        cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep -E 'PYTEST|VIRTUAL_ENV'
        ls /proc | grep -c '^[0-9]' | grep -vE '^1?[0-9]$'
        grep -l c2d-secret -r /tmp /data/inputs /data/logs 2>/dev/null
        ls -d {sys.prefix} 2>/dev/null
        exit 0
    """
    assert "PYTEST_CURRENT_TEST" in os.environ
    assert sandbox.sh(script).ok
    assert "" == sandbox.log


def test_environment_is_the_runs_own(sandbox: Bench) -> None:
    """Nothing of the service's environment is passed on."""
    assert sandbox.python("import os; print(*sorted(os.environ))").ok
    given = {"PATH", "HOME", "LANG", "VOLUME", "INPUTS", "OUTPUTS", "LOGS", "ALGO"}
    assert given == set(sandbox.log.split()) - {"PWD"} - ({"HOSTNAME"} if sandbox.in_container else set())


def test_only_outputs_logs_and_scratch_are_writable(sandbox: Bench) -> None:
    """Inputs, descriptions, the algorithm, its log and the system cannot be changed; scratch is small."""
    sandbox.folders.inputs.joinpath("data").write_text("as it was")
    script = """\
        for path in $INPUTS/data $INPUTS/new $VOLUME/ddos/new $ALGO $LOGS/algorithm.log /usr/new /etc/new /new \\
                    /data/new /dev/new /run/new /proc/sys/kernel/hostname; do
            (echo bad >> $path) 2>/dev/null && echo "written: $path"
        done
        for path in $OUTPUTS/new $LOGS/new /tmp/new /dev/shm/new; do
            (echo good > $path) || echo "closed: $path"
        done
        rm -rf $INPUTS/data $LOGS/algorithm.log 2>/dev/null
        mv $LOGS/algorithm.log $LOGS/other 2>/dev/null
        df --output=size -B1 /tmp | tail -1
        grep -c closed: $LOGS/algorithm.log
        exit 0
    """
    assert sandbox.sh(script, disk_bytes=8 * MIB).ok
    assert [str(8 * MIB), "0"] == sandbox.log.split()
    assert "as it was" == sandbox.folders.inputs.joinpath("data").read_text()
    assert ["new"] == [path.name for path in sandbox.folders.logs.iterdir()]


@pytest.mark.sandbox
def test_operator_can_show_more_programs(root: Path) -> None:
    """What is named in system is there, read-only, and path is searched before the machine's own."""
    tools = root / "tools"
    tools.mkdir(mode=0o755)
    for name in ("greet", "ls"):
        (tools / name).write_text("#!/bin/sh\necho here\n")
        (tools / name).chmod(0o755)
    here = bench(ProcessRunner(system=(tools,), path=(tools,)), root)
    assert here.sh(f"greet; ls; touch {tools}/new 2>/dev/null && echo written; exit 0").ok
    assert ["here", "here"] == here.log.split()


# --- Without a sandbox ----------------------------------------------------------------------------------------


def test_no_sandbox_no_run(root: Path) -> None:
    """Where nothing can be shut in nothing is started, and the operator reads what to install."""
    here = bench(ProcessRunner(bwrap=NO_SANDBOX), root)
    report = here.sh("echo started > $OUTPUTS/trace; echo started")
    assert (Ending.REFUSED, None) == (report.ending, report.code)
    assert "apt-get install bubblewrap" in report.detail
    assert report.detail == here.runner.obstacle()
    assert "" == here.log
    assert not list(here.outputs.iterdir())


@pytest.mark.sandbox
def test_sandbox_stands_here() -> None:
    """A machine that runs these tests has no obstacle."""
    assert ProcessRunner().obstacle() is None
