import pytest
from pathlib import Path
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from blocks.environment import ComputeEnvironment
from blocks.limits import FetchLimits
from flows.build import run_plan
from flows.compute import _TASK_RUNNER
from tests.documents import *
from tests.file_server import FileServer
from prefect import get_client
from flows.states import steps_of, run_status, ended_state
import flows.compute, tempfile

def results(prefect_server, tmp_path, *stages, results_url=None):
    on = offer(fetch=FetchLimits(networks=("127.0.0.0/8",), attempts=1))
    env = ComputeEnvironment(offer=on, work_pool="x", allow_unsandboxed=True, workspace=str(tmp_path/"w"), results=results_url or (tmp_path/"r").as_uri())
    plan = planned(*stages, on=on)
    ids=[]
    @flow(task_runner=_TASK_RUNNER, name="probe")
    def go():
        from prefect.runtime import flow_run
        ids.append(flow_run.id)
        r = run_plan(plan, "0"*32, {"default": env})
        return ended_state(r.status, r.message)
    with temporary_settings({PREFECT_API_URL: prefect_server.api}):
        try:
            st = go(return_state=True)
        except BaseException as e:
            return repr(e)
        import time; time.sleep(4)
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
        from uuid import UUID
        with get_client(sync_client=True) as c:
            trs = c.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[UUID(str(ids[0]))])))
            print([(t.name, t.state.name, t.state.type.value) for t in trs])
            return st.name, st.message, run_status(st, steps_of(trs))

@pytest.mark.server
def test_probe(prefect_server, tmp_path, file_server):
    bad = file_server.add(b"", status=404)
    print("DATA", results(prefect_server, tmp_path, stage(input=[data("a", bad)]), stage(input=[outputs_of(0)])))
    print("ALGO", results(prefect_server, tmp_path, stage(url=bad), stage()))
    print("RUN", results(prefect_server, tmp_path, stage(rawcode="raise SystemExit(3)"), stage()))
    (tmp_path/"f").write_text("")
    print("UPLOAD", results(prefect_server, tmp_path, stage(rawcode="import os;open(os.environ['OUTPUTS']+'/x','w').write('x')"), stage(), results_url=(tmp_path/"f").as_uri()))
    print("OK", results(prefect_server, tmp_path, stage(rawcode="import os;open(os.environ['OUTPUTS']+'/x','w').write('x')"), stage()))
