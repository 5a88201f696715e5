"""What is particular to containers: images and where they come from, what an engine may add, what is left of a run."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from blocks.containers import DockerRunner
from blocks.limits import MIB
from blocks.runner import Ending, ExitReport, Image, ImageUnavailable
from tasks.execute import end_left_runs
from tasks.workspace import held
from tests.docker_engine import PASSWORD, USER, Engine, Registry, published
from tests.runner_bench import Bench, bench, eventually, sleepers
from tests.runner_support import Dropped, caller, reachable_python

pytestmark = pytest.mark.docker

ABSENT = "sha256:" + "ab" * 32


@pytest.fixture
def here(engine: Engine, root: Path) -> Bench:
    return bench(engine.runner(), root)


@pytest.fixture
def pulled(engine: Engine, registry: Registry) -> Iterator[Image]:
    """An image of the registry, by checksum, that the engine has never seen."""
    image = published(engine, registry)
    yield image
    engine.forget(image)


def with_password(engine: Engine, registry: Registry, **more: str) -> DockerRunner:
    return engine.runner(registries={registry.host: {"username": USER, "password": PASSWORD}}, **more)


# --- Images ---------------------------------------------------------------------------------------------------


def test_image_is_pulled_by_checksum(engine: Engine, registry: Registry, pulled: Image, root: Path) -> None:
    """With the credentials of its registry, told while it comes, and run; the tag beside a checksum means nothing."""
    runner = with_password(engine, registry)
    told: list[tuple[int, ...]] = []
    asked = Image(pulled.name, "no-such-tag", pulled.checksum)
    assert asked == runner.fetch_image(asked, on_progress=lambda *amounts: told.append(amounts))
    done_bytes, all_bytes, done, layers = told[-1]
    assert done_bytes == all_bytes > 1_000_000
    assert 1 == done == layers
    here = bench(runner, root)
    here.image = asked
    assert here.sh("echo here").ok
    assert "here\n" == here.log


def test_a_tag_is_what_was_fetched(engine: Engine, registry: Registry, pulled: Image, root: Path) -> None:
    """A run of what a tag meant when it was fetched, though the tag has been given to another image since."""
    runner = with_password(engine, registry, pull="always")
    fetched = runner.fetch_image(Image(pulled.name, pulled.tag))
    assert pulled == fetched
    newer = published(engine, registry, newer=b"")
    assert newer == runner.fetch_image(Image(pulled.name, pulled.tag))
    here = bench(runner, root)
    here.image = fetched
    assert here.sh("[ ! -e /newer ]").ok
    here.image = newer
    assert here.sh("[ -e /newer ]").ok


def test_run_fetches_what_is_gone(engine: Engine, registry: Registry, pulled: Image, root: Path) -> None:
    """Between the fetch and a run an engine may have been tidied up."""
    here = bench(with_password(engine, registry), root)
    here.image = pulled
    assert not engine.has(pulled)
    assert here.sh("true").ok
    assert engine.has(pulled)


def test_a_missing_image_is_told(engine: Engine, registry: Registry, pulled: Image, root: Path) -> None:
    """A checksum or tag that the registry does not have; and what is never pulled. No run then."""
    runner = with_password(engine, registry)
    for absent in (Image(pulled.name, "none"), Image(pulled.name, "1", ABSENT)):
        with pytest.raises(ImageUnavailable, match=f"{absent.reference} could not be pulled: .*not found"):
            runner.fetch_image(absent)
    with pytest.raises(ImageUnavailable, match="this environment pulls no image"):
        with_password(engine, registry, pull="never").fetch_image(pulled)
    here = bench(runner, root)
    here.image = Image(pulled.name, "none")
    report = here.sh("echo started")
    assert (Ending.IMAGE_UNAVAILABLE, None, "") == (report.ending, report.code, here.log)
    assert "could not be pulled" in report.detail


@pytest.mark.parametrize("password", ["", "wr0ng-and-s3cret"])
def test_credentials_are_not_told(engine: Engine, registry: Registry, pulled: Image, password: str) -> None:
    """A registry that refuses is told of, without the password; nor does a runner show it."""
    credentials = {registry.host: {"username": USER, "password": password}} if password else {}
    runner = engine.runner(registries=credentials)
    with pytest.raises(ImageUnavailable) as refusal:
        runner.fetch_image(pulled)
    assert "could not be pulled" in str(refusal.value)
    assert not password or password not in f"{refusal.value!r} {runner!r}"


def test_nobody_at_the_registry(engine: Engine) -> None:
    """A registry that is not there is the image's failure, not the machine's."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        host = f"127.0.0.1:{nobody.getsockname()[1]}"
    with pytest.raises(ImageUnavailable, match="connection refused"):
        engine.runner().fetch_image(Image(f"{host}/study"))


def test_silent_registry_holds_nothing(engine: Engine) -> None:
    """Neither a stop nor the deadline of a pull waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        image = Image(f"127.0.0.1:{silent.getsockname()[1]}/study")
        with pytest.raises(ImageUnavailable, match=r"within 0\.5 s"):
            engine.runner(pull_seconds=0.5).fetch_image(image)
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        began = time.monotonic()
        with pytest.raises(ImageUnavailable, match="stopped"):
            engine.runner().fetch_image(image, stop=stop)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["c2d-tests/python:3", "127.0.0.1:5/x:y", "UPPER", "a//b"])
def test_what_is_no_name_of_an_image(engine: Engine, name: str) -> None:
    """A tag in the name, or no name at all, is the consumer's to mend."""
    with pytest.raises(ImageUnavailable):
        engine.runner().fetch_image(Image(name))


# --- What an image may bring along ----------------------------------------------------------------------------


def test_an_image_does_not_decide_how_it_is_run(engine: Engine, here: Bench) -> None:
    """Its user, entrypoint, folder, health check and volumes; its variables belong to its programs."""
    here.image = Image("c2d-tests/hostile", "1")
    engine.build(
        here.image,
        changes=[
            *('ENTRYPOINT ["/bin/false"]', 'CMD ["nothing"]', "USER root", "WORKDIR /root"),
            *(
                "HEALTHCHECK --interval=1s CMD /bin/touch /data/outputs/unhealthy",
                "VOLUME /tmp/ /volume /data/outputs/",
            ),
            *("ENV OWN=1", "ENV LANG=de_DE.UTF-8", "ENV INPUTS=/elsewhere"),
        ],
    )
    script = """\
        id -u; pwd; echo $OWN $LANG $INPUTS $HOME
        echo x > /volume/x && df --output=size -B1 /volume | tail -1 | tr -d " "
        sleep 1.5
    """
    assert here.sh(script, disk_bytes=8 * MIB).ok, here.log
    uid, *rest = here.log.splitlines()
    assert int(uid) >= 1000
    assert ["/data", "1 de_DE.UTF-8 /data/inputs /tmp", str(8 * MIB)] == rest
    assert [] == [path.name for path in here.outputs.iterdir()]
    assert [] == engine.volumes()
    engine.forget(here.image)


def test_setuid_programs_are_no_way_up(engine: Engine, here: Bench) -> None:
    """A program of the image that is root's and says so runs as the algorithm's user."""
    script = "cp /bin/id /tmp/id; chmod 4755 /tmp/id; /tmp/id -u; id -u"
    assert here.sh(script).ok
    assert 1 == len(set(here.log.split()))


def test_image_without_a_shell(engine: Engine, here: Bench, root: Path) -> None:
    """Nothing can be started in it; the reason says so."""
    here.image = Image("c2d-tests/empty", "1")
    (root / "content").mkdir()
    subprocess.run(["tar", "-cf", root / "empty.tar", "-C", root / "content", "."], check=True)
    engine.import_archive(here.image, root / "empty.tar")
    report = here.sh("true")
    assert (Ending.REFUSED, "the image has no /bin/sh, by which the entrypoint is run") == (
        report.ending,
        report.detail,
    )
    assert [] == engine.containers()
    engine.forget(here.image)


# --- What is left of a run ------------------------------------------------------------------------------------


def test_containers_are_bounded(engine: Engine, here: Bench) -> None:
    """As the engine sees it: every limit is on."""
    ends: list[bool] = []
    script = 'until [ -e "$INPUTS/go" ]; do sleep 0.05; done'
    thread = threading.Thread(target=lambda: ends.append(here.sh(script, processes=20, cpus=0.5).ok))
    thread.start()
    assert eventually(lambda: engine.containers() == [f"c2d-{here.name}"])
    host = engine.client.api.inspect_container(f"c2d-{here.name}")["HostConfig"]
    here.folders.inputs.joinpath("go").touch()
    thread.join()
    assert [True] == ends
    assert (256 * MIB, 256 * MIB, 21, 500_000_000) == (
        host["Memory"],
        host["MemorySwap"],
        host["PidsLimit"],
        host["NanoCpus"],
    )
    assert (True, ["ALL"], "none", "private", False, []) == (
        host["ReadonlyRootfs"],
        host["CapDrop"],
        host["NetworkMode"],
        host["IpcMode"],
        host["Privileged"],
        host["CapAdd"] or [],
    )
    assert ["no-new-privileges:true"] == host["SecurityOpt"]
    assert "none" == host["LogConfig"]["Type"]
    assert [] == engine.containers()


def begun(here: Bench, seconds: str) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A caller in the middle of a run, and the program that watches over it."""
    execution = here.execution(f"exec sleep {seconds}", entrypoint="sh $ALGO", limits={"seconds": 60})
    command, environment = caller(here.runner)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd="/")
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(pickle.dumps((here.runner, execution)))
    assert eventually(lambda: bool(sleepers(seconds)), 15)
    (guard,) = psutil.Process(process.pid).children()
    return process, guard


def test_what_everybody_has_forgotten_is_found(engine: Engine, here: Bench) -> None:
    """A container whose caller and watcher were both killed is known by its job, and removed with it."""
    process, guard = begun(here, "98781")
    assert {f"job-{here.name}"} == here.runner.jobs_left()
    guard.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()
    time.sleep(0.5)
    assert sleepers("98781")
    elsewhere = engine.runner(service="another service of this engine")
    assert frozenset() == elsewhere.jobs_left()
    elsewhere.remove_job(f"job-{here.name}")
    assert {f"job-{here.name}"} == here.runner.jobs_left()
    here.runner.remove_job(f"job-{here.name}")
    assert (frozenset(), []) == (here.runner.jobs_left(), sleepers("98781"))
    here.runner.remove_job(f"job-{here.name}")


def test_jobs_that_nobody_works_on_are_ended(engine: Engine, here: Bench) -> None:
    """Whose folder no process holds; a job in progress is left alone, and so are all where there are no folders."""
    process, guard = begun(here, "98784")
    guard.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()
    job, jobs = f"job-{here.name}", here.root / "jobs"
    assert [] == end_left_runs(here.runner, jobs)
    assert sleepers("98784")
    with held(jobs, job, 60):
        assert [] == end_left_runs(here.runner, jobs)
        assert sleepers("98784")
    assert [job] == end_left_runs(here.runner, jobs)
    assert ([], []) == (sleepers("98784"), end_left_runs(here.runner, jobs))


def test_a_run_ends_what_an_earlier_one_left(engine: Engine, here: Bench) -> None:
    """Two never write into the same outputs: what has the name is gone before anything is started."""
    process, guard = begun(here, "98782")
    guard.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()
    assert sleepers("98782")
    assert here.sh("echo again").ok
    assert [] == sleepers("98782")
    assert [] == engine.containers()


def test_a_removed_container_ends_its_run(engine: Engine, here: Bench) -> None:
    """When somebody removes the job of a run in progress, the run is over, and says that it was killed."""
    ends: list[ExitReport] = []
    thread = threading.Thread(target=lambda: ends.append(here.sh("sleep 98783")))
    thread.start()
    assert eventually(lambda: bool(sleepers("98783")), 15)
    here.runner.remove_job(f"job-{here.name}")
    thread.join()
    assert (Ending.EXITED, 137, "was ended by SIGKILL") == (ends[0].ending, ends[0].code, ends[0].detail)
    assert [] == engine.containers()


# --- The engine -----------------------------------------------------------------------------------------------


def test_worker_that_is_not_root(engine: Engine, root: Path) -> None:
    """Who may speak to the engine needs no more: algorithms are the worker's user then, and their outputs its own."""
    if reachable_python(again=True) is None:
        pytest.skip("no Python that an unprivileged user can start from a program of its own")
    socket_file = engine.folder / "docker.sock"
    before = socket_file.stat().st_mode
    engine.folder.chmod(0o711)
    socket_file.chmod(0o666)
    try:
        here = bench(Dropped(engine.runner()), root)
        script = "id -u; id -G; mkdir -m 0 $OUTPUTS/closed; echo x > $LOGS/own; echo > $INPUTS/new || exit 3"
        assert 3 == here.sh(script).code
    finally:
        socket_file.chmod(before)
    assert [str(here.caller_uid)] * 2 == here.log.split()[:2]
    for path in (here.outputs / "closed", here.folders.logs / "own"):
        assert here.caller_uid == path.stat().st_uid
        assert path.stat().st_mode & 0o600


def test_no_engine_no_run(root: Path) -> None:
    """Where no engine answers nothing is run, and the operator reads which and what to do."""
    here = bench(DockerRunner(host=f"unix://{root}/nobody.sock"), root)
    report = here.sh("echo started")
    assert (Ending.REFUSED, "") == (report.ending, here.log)
    assert report.detail == here.runner.obstacle()
    assert "the Docker engine does not answer" in report.detail


def test_engine_stands_here(engine: Engine) -> None:
    """The engine of these tests has no obstacle; one without the runtime that was asked for has."""
    assert engine.runner().obstacle() is None
    assert "no runtime nosuch" in (engine.runner(runtime="nosuch").obstacle() or "")


def test_network_that_is_not_there(engine: Engine, root: Path) -> None:
    """An environment that promises a network its engine has not got refuses the run."""
    here = bench(engine.runner(network="nosuch"), root)
    report = here.runner.run(here.execution("true", entrypoint="sh $ALGO", network=True))
    assert Ending.REFUSED is report.ending
    assert "nosuch" in report.detail


@pytest.mark.skipif(
    "runsc" not in os.environ.get("PATH", "") and not Path("/usr/bin/runsc").exists(), reason="no gVisor"
)
def test_a_kernel_of_its_own(engine: Engine, root: Path) -> None:
    """With gVisor as the runtime an algorithm sees another kernel, and everything else as it is."""
    here = bench(engine.runner(runtime="runsc"), root)
    (here.folders.inputs / "numbers").write_text("1 2 3")
    report = here.python("""\
        import os, pathlib
        data = pathlib.Path(os.environ["INPUTS"], "numbers").read_text()
        pathlib.Path(os.environ["OUTPUTS"], "sum").write_text(str(sum(map(int, data.split()))))
        print(os.uname().release, os.getuid() >= 1000)
    """)
    assert report.ok, here.log
    assert "6" == (here.outputs / "sum").read_text()
    kernel, unprivileged = here.log.split()
    assert kernel != os.uname().release
    assert "True" == unprivileged
    assert 3 == here.sh("exit 3").code
    assert Ending.TIMED_OUT is here.sh("trap '' TERM; sleep 60", seconds=1).ending
    # Its kernel counts among the processes, so that a few must not keep it from starting.
    bomb = here.python("import os, time\nwhile True: os.fork()\n", processes=5)
    assert not bomb.ok
    assert [] == engine.containers()
