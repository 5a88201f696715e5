"""
GPUs of a Docker engine: which a run gets, who waits, and what is said where there are none.

The engine is real and takes the requests for devices; the GPUs are not there. In place of NVIDIA's toolkit it finds a
program that does nothing. One test computes on a real GPU.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import docker
import httpx
import pytest
import yaml

from blocks.containers import DockerRunner
from blocks.gpus import GPUS
from blocks.limits import MIB, Limits
from blocks.runner import Ending, ExitReport, Image
from cli.service import Service
from tests.conftest import DEFINITIONS
from tests.docker_engine import IMAGE, Engine, docker_engine
from tests.documents import stage
from tests.runner_bench import Bench, bench, eventually
from tests.test_end_to_end import OPERATOR, Consumer, workflow

HOOK: Final = "nvidia-container-runtime-hook"
"""What an engine looks for on its PATH; there, it takes requests for GPUs and leaves the rest to this."""
SHOWN: Final = "NVIDIA_VISIBLE_DEVICES"


@pytest.fixture(scope="module")
def gpu_engine() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="c2d-gpu-") as folder, tempfile.TemporaryDirectory() as programs:
        hook = Path(programs, HOOK)
        hook.write_text("#!/bin/sh\nexit 0\n")
        hook.chmod(0o755)
        with docker_engine(Path(folder), programs=Path(programs)) as started:
            yield started


class Gpus:
    """Runs on one engine with four GPUs, side by side."""

    def __init__(self, engine: Engine, root: Path, pool: ThreadPoolExecutor, **more: Any) -> None:
        self.engine, self.root, self.pool = engine, root, pool
        root.chmod(0o700)
        self.runner = engine.runner(gpus=("0", "1", "2", "3"), gpu_turn=root / "gpus", **more)

    def start(self, gpus: int, name: str, script: str = "") -> Started:
        """An algorithm that tells its devices and then waits for a file ``end`` among its inputs, or does *script*."""
        here = bench(self.runner, self.root / name)
        waits = f"echo ${SHOWN}; while [ ! -e $INPUTS/end ]; do sleep 0.05; done"
        execution = here.execution(script or waits, entrypoint="sh $ALGO")
        limits = execution.limits.model_copy(update={"gpus": gpus})
        told: list[str] = []
        stop = threading.Event()
        run = self.pool.submit(self.runner.run, replace(execution, limits=limits), stop=stop, on_waiting=told.append)
        return Started(here, run, told, stop)

    def given(self) -> list[str]:
        found = self.engine.client.api.containers(filters={"label": [GPUS]})
        return sorted(container["Labels"][GPUS] for container in found)


class Started:
    def __init__(self, here: Bench, run: Future[ExitReport], told: list[str], stop: threading.Event) -> None:
        self.here, self.run, self.told, self.stop = here, run, told, stop

    def begun(self) -> bool:
        return self.here.log != ""

    def waits(self, why: str) -> bool:
        return bool(self.told) and self.told[-1] == why and not self.begun()

    def end(self) -> ExitReport:
        (self.here.folders.inputs / "end").touch()
        return self.run.result(30)


@pytest.fixture
def four(gpu_engine: Engine, root: Path) -> Iterator[Gpus]:
    with ThreadPoolExecutor() as pool:
        yield Gpus(gpu_engine, root, pool)


@pytest.mark.docker
def test_runs_have_devices_of_their_own(four: Gpus) -> None:
    """Side by side no two have the same; who finds too few waits and says so; and who comes later waits behind."""
    first = four.start(3, "first")
    assert eventually(first.begun, 20), first.run
    second = four.start(2, "second")
    assert eventually(lambda: second.waits("waiting for 2 GPUs: 3 of 4 are in use by other jobs"), 20), second.told
    third = four.start(1, "third")
    behind = "waiting for 1 GPU: another job waits for GPUs and comes first"
    assert eventually(lambda: third.waits(behind), 20), third.told
    assert ["0,1,2"] == four.given()
    assert first.end().ok
    assert eventually(lambda: second.begun() and third.begun(), 20)
    assert ("", "") == (second.told[-1], third.told[-1])
    shown = [set(run.here.log.strip().split(",")) for run in (second, third)]
    assert [2, 1] == [len(devices) for devices in shown]
    assert not shown[0] & shown[1]
    assert sorted(",".join(sorted(devices)) for devices in shown) == four.given()
    assert second.end().ok
    assert third.end().ok
    assert [] == four.given()


@pytest.mark.docker
def test_what_a_container_gets(four: Gpus) -> None:
    """The engine is asked for these devices, and for none where none were."""
    with_two, without = four.start(2, "two"), four.start(0, "none")
    assert eventually(lambda: with_two.begun() and without.begun(), 20)
    requests = {}
    for run in (with_two, without):
        found = four.engine.client.api.inspect_container(f"c2d-{run.here.name}")
        requests[run.here.name] = found["HostConfig"]["DeviceRequests"]
        assert not found["HostConfig"]["Privileged"]
    (asked,) = requests[with_two.here.name]
    assert (["0", "1"], [["gpu"]]) == (asked["DeviceIDs"], asked["Capabilities"])
    assert not requests[without.here.name]
    assert with_two.end().ok
    assert without.end().ok


@pytest.mark.docker
@pytest.mark.parametrize(("gpus", "shown"), [(0, ""), (1, "0")])
def test_devices_are_nobodys_to_choose(four: Gpus, gpus: int, shown: str) -> None:
    """Neither an image nor a consumer gets more by the variable that NVIDIA's runtime goes by."""
    greedy = Image("c2d-tests/greedy", "1")
    four.engine.build(greedy, [f"ENV {SHOWN}=all"])
    here = bench(four.runner, four.root / "greedy")
    here.image = greedy
    execution = here.execution(f"echo ${SHOWN}", entrypoint="sh $ALGO", variables={SHOWN: "all"})
    report = four.runner.run(replace(execution, limits=execution.limits.model_copy(update={"gpus": gpus})))
    assert report.ok, report
    assert f"{shown}\n" == here.log


@pytest.mark.docker
def test_a_wait_for_gpus_ends(gpu_engine: Engine, root: Path) -> None:
    """At a stop, and after the longest that a run may wait; nothing is started then."""
    with ThreadPoolExecutor() as pool:
        four = Gpus(gpu_engine, root, pool, gpu_seconds=1.0)
        first = four.start(4, "first")
        assert eventually(first.begun, 20), first.run
        too_long = four.start(1, "long")
        report = too_long.run.result(30)
        assert (Ending.REFUSED, "1 GPU did not become free within 1 s") == (report.ending, report.detail)
        four.runner = replace(four.runner, gpu_seconds=60.0)
        stopped = four.start(1, "stopped")
        assert eventually(lambda: bool(stopped.told), 20)
        stopped.stop.set()
        assert Ending.STOPPED is stopped.run.result(30).ending
        assert not too_long.begun() and not stopped.begun()
        assert first.end().ok


@pytest.mark.docker
def test_an_engine_without_a_driver_is_told_at_once(engine: Engine, root: Path) -> None:
    """Before anything is fetched or made, in words that say what to do; without GPUs the same engine is well."""
    runner = engine.runner(gpus=("0",), gpu_turn=root / "gpus")
    before = engine.containers()
    assert "install NVIDIA's driver and container toolkit" in (runner.obstacle() or "")
    here = bench(runner, root / "job")
    execution = here.execution("echo begun", entrypoint="sh $ALGO")
    report = runner.run(replace(execution, limits=execution.limits.model_copy(update={"gpus": 1})))
    assert (Ending.REFUSED, runner.obstacle(), "") == (report.ending, report.detail, here.log)
    assert before == engine.containers()
    assert engine.runner().obstacle() is None


# --- Over the whole service -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_service(tmp_path_factory: pytest.TempPathFactory, gpu_engine: Engine) -> Iterator[Service]:
    """A service whose only environment has four GPUs, of which a job may have three."""
    folder = tmp_path_factory.mktemp("gpu-service")
    tests = yaml.safe_load(DEFINITIONS.read_text())
    (default, *_) = tests["definitions"]["environments"]
    offer = {**default["offer"], "max_jobs": 4, "gpu_type": "none at all", "gpus": 4, "limits": {"gpus": 3}}
    tests["definitions"]["environments"] = [
        {**default, "offer": offer, "runner": "docker", "docker_host": gpu_engine.host}
    ]
    tests["deployments"] = [
        each for each in tests["deployments"] if each["name"] in ("register-environments", "default")
    ]
    definitions = folder / "prefect.yaml"
    definitions.write_text(yaml.safe_dump(tests))
    with Service(state=folder / "state", definitions=definitions, variables={"C2D_NETWORKS": "127.0.0.0/8"}) as started:
        yield started


def with_gpus(gpus: int, code: str) -> dict[str, Any]:
    container = {"image": IMAGE.name, "tag": IMAGE.tag, "entrypoint": "python3 $ALGO"}
    asked = {"rawcode": code, "container": container}
    return workflow(stages=[stage(algorithm=asked, compute={"resources": {"gpu": gpus}})])


@pytest.mark.docker
@pytest.mark.worker
@pytest.mark.slow
def test_jobs_share_the_gpus(gpu_service: Service, tmp_path: Path) -> None:
    """
    More than a job may have is refused with the number; what others have is waited for, and the status says so; the
    listing tells how many are free.
    """
    with httpx.Client(base_url=gpu_service.api_url, timeout=60.0) as http:
        consumer = Consumer(http)

        def listed() -> tuple[int, int, int]:
            (found,) = http.get(f"{OPERATOR}/environments").json()
            return found["gpuNumber"], found["totalGPU"], found["freeGPU"]

        assert (3, 4, 4) == listed()
        refused = http.post(f"{OPERATOR}/init", json={"workflow": with_gpus(5, "0")})
        assert 400 == refused.status_code
        assert "asks for 5 GPU(s); the environment has 3" in refused.text
        holding = consumer.submit(with_gpus(3, "import time\nprint('begun', flush=True)\ntime.sleep(60)\n"))
        assert eventually(lambda: (3, 4, 1) == listed(), 60), consumer.job(holding)
        waiting = consumer.submit(with_gpus(2, "import os\nprint(os.environ['NVIDIA_VISIBLE_DEVICES'])\n"))
        why = "waiting for 2 GPUs: 3 of 4 are in use by other jobs"
        assert eventually(lambda: why == consumer.job(waiting)["reason"], 60), consumer.job(waiting)
        assert (3, 4, 1) == listed()
        assert 200 == http.put(f"{OPERATOR}/compute", params={"jobId": holding}).status_code
        assert 70 == consumer.wait(waiting)["status"]
        assert eventually(lambda: (3, 4, 4) == listed(), 30)


# --- On a real one --------------------------------------------------------------------------------------------

ADDS: Final = '''\
import ctypes, os

PTX = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry add(.param .u64 a, .param .u64 b, .param .u32 n) {
    .reg .pred %p; .reg .b32 %r<5>; .reg .f32 %f<3>; .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x;
    mad.lo.s32 %r2, %r2, %r3, %r4;
    setp.ge.u32 %p, %r2, %r1;
    @%p bra done;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f1, [%rd4]; ld.global.f32 %f2, [%rd5];
    add.f32 %f1, %f1, %f2;
    st.global.f32 [%rd4], %f1;
done:
    ret;
}
"""
cuda = ctypes.CDLL("libcuda.so.1")

def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    assert code == 0, (name, code)

n = 1_000_000
count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
module, function = ctypes.c_void_p(), ctypes.c_void_p()
call("cuInit", 0)
call("cuDeviceGetCount", ctypes.byref(count))
call("cuDeviceGet", ctypes.byref(device), 0)
call("cuCtxCreate_v2", ctypes.byref(context), 0, device)
call("cuModuleLoadData", ctypes.byref(module), PTX)
call("cuModuleGetFunction", ctypes.byref(function), module, b"add")
values = [(ctypes.c_float * n)(*range(n)), (ctypes.c_float * n)(*([0.5] * n))]
there = [ctypes.c_uint64(), ctypes.c_uint64()]
for memory, value in zip(there, values):
    call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.sizeof(value))
    call("cuMemcpyHtoD_v2", memory, value, ctypes.sizeof(value))
size = ctypes.c_uint32(n)
pointers = (ctypes.c_void_p * 3)(*(ctypes.cast(ctypes.pointer(a), ctypes.c_void_p) for a in (*there, size)))
call("cuLaunchKernel", function, (n + 255) // 256, 1, 1, 256, 1, 1, 0, None, pointers, None)
call("cuCtxSynchronize")
call("cuMemcpyDtoH_v2", values[0], there[0], ctypes.sizeof(values[0]))
assert all(values[0][i] == i + 0.5 for i in range(n))
print("GPUs:", count.value, "sum:", sum(values[0]))
'''


@pytest.fixture
def real_engine() -> DockerRunner:
    """The machine's own engine; the test is left out where there is no GPU."""
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("no NVIDIA GPU here")
    return DockerRunner(gpus=("0",), network="none")


@pytest.mark.gpu
def test_a_real_computation(real_engine: DockerRunner, root: Path) -> None:
    """A million additions on one GPU, of which the algorithm sees no second, come out right."""
    assert real_engine.obstacle() is None
    image = Image("c2d-tests/cuda", "1")
    with docker.from_env() as client:
        Engine(root, client, None).build(image, python=True)
        try:
            here = bench(replace(real_engine, gpu_turn=root / "gpus"), root / "job")
            here.image = image
            execution = here.execution(ADDS)
            report = here.runner.run(
                replace(execution, limits=Limits(seconds=120, memory_bytes=4096 * MIB, cpus=2, gpus=1))
            )
            assert report.ok, (report, here.log)
            assert "GPUs: 1 " in here.log
        finally:
            with suppress(docker.errors.DockerException):
                client.images.remove(image.reference)
