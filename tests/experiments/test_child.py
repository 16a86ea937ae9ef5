"""Child processes that answer: real ones, which die, hang and print."""

import os
import sys

import pytest

from experiments.common import child as child_lib
from experiments.common.child import Child, ChildError
from tests.helpers.paths import ROOT

WORKER = """
import os, sys, time
from experiments.common.child import serve

def add(a, b):
    print("a library says something")
    return {"sum": a + b, "pid": os.getpid()}

def die(code):
    os._exit(code)

def hang():
    time.sleep(60)

serve({"add": add, "die": die, "hang": hang})
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "a_test_worker.py").write_text(WORKER)
    made = []

    def start(**options):
        env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        made.append(Child("a_test_worker", env=env, **options))
        return made[-1]

    yield start
    for child in made:
        child.kill()


def test_answers_come_back_from_one_process_until_it_is_closed(worker):
    child = worker()
    first, second = child.ask("add", a=1, b=2), child.ask("add", a=[1], b=[2])
    assert (first["sum"], second["sum"]) == (3, [1, 2]) and first["pid"] == second["pid"] != os.getpid()
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first["pid"], 0)


def test_a_child_that_dies_is_an_error_once_and_the_next_request_starts_another(worker):
    child = worker()
    first = child.ask("add", a=1, b=2)["pid"]
    with pytest.raises(ChildError, match="a_test_worker ended with code 3 during die"):
        child.ask("die", code=3)
    assert child.ask("add", a=2, b=2)["sum"] == 4
    pid = child.ask("add", a=2, b=2)["pid"]
    os.kill(pid, 9)
    child._process.wait()  # dead before it is asked
    assert child.ask("add", a=0, b=0)["pid"] not in (pid, first)


def test_a_silent_child_is_stopped_and_replaced(worker):
    child = worker(timeout=30.0)
    child.ask("add", a=1, b=1)
    child._timeout = 0.3
    with pytest.raises(ChildError, match="a_test_worker did not answer within 0.3 s during hang"):
        child.ask("hang")
    child._timeout = 30.0
    assert child.ask("add", a=1, b=1)["sum"] == 2


def test_what_cannot_start_is_one_sentence():
    with pytest.raises(ChildError, match="x did not start: .*no/such/python"):
        Child("a.x", "no/such/python").ask("add")


def test_an_error_of_the_child_shows_and_quiet_drops_it(worker, capfd):
    for quiet, shown in ((False, True), (True, False)):
        with pytest.raises(ChildError, match="ended with code 1 during none"):
            worker(quiet=quiet).ask("none")
        assert ("KeyError" in capfd.readouterr().err) == shown


def test_the_module_is_for_any_interpreter():
    """It imports the standard library alone: a worker beside torch has nothing else."""
    code = (
        "import sys; from experiments.common import child, machine; print(*{'jax', 'numpy', 'kvattn'} & {*sys.modules})"
    )
    line = [sys.executable, "-c", code]
    done = child_lib.subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
