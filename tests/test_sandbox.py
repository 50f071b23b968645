"""Programs of a model are contained, whatever they try."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from experiments.sandbox import Limits, require_containment, run_contained
from sparse_jax.errors import InputError

QUICK = Limits(seconds=3)


@pytest.fixture(scope="module", autouse=True)
def contained():
    try:
        require_containment(Limits(seconds=60))
    except InputError as error:
        pytest.skip(str(error))


# What a program does, and what becomes of it. Those that must fail also fail if they
# are not contained, so the others state that they were.
PROGRAMS = {
    "one that ends": ("assert sorted([2, 1]) == [1, 2]", "passed"),
    "one that is wrong": ("assert 1 == 2", "failed"),
    "one that exits in front of the tests": ("import sys; sys.exit(0)", "failed"),
    "one that exits with the code of a refusal": ("import os; os._exit(97)", "failed"),
    "one that is no program": ("def f(:", "failed"),
    "an endless loop": ("while True: pass", "timed out"),
    "a huge allocation": ("x = bytearray(2**30)", "failed"),
    "reading standard input": ("input()", "failed"),
    "a network": (
        "import socket\ns = socket.socket()\ntry: s.connect(('127.0.0.1', PORT))\n"
        "except OSError: pass\nelse: raise SystemExit(1)",
        "passed",
    ),
    "a fork bomb": (
        "import os, time\nn = 0\ntry:\n"
        "  while True:\n"
        "    if os.fork() == 0: time.sleep(60)\n"
        "    n += 1\n"
        "except OSError: pass\nassert n < 4",
        "passed",
    ),
    "killing its parent": (
        "import os, signal\nfor pid in (os.getppid(), -1):\n"
        "  try: os.kill(pid, signal.SIGKILL)\n  except OSError: pass",
        "passed",
    ),
    "killing the one who asks": (
        "import os, signal\ntry: os.kill(TESTS, signal.SIGKILL)\nexcept OSError: pass",
        "passed",
    ),
    "writing outside its folder": (
        "for path in ('OUTSIDE', '/etc/x', '/dev/shm/x', '/tmp/x'):\n"
        "  try: open(path, 'w')\n  except OSError: pass\n"
        "  else: raise SystemExit(1)\nopen('x', 'w').write('inside')",
        "passed",
    ),
    "filling its folder": (
        "n = 0\ntry:\n  for n in range(99): open(f'{n}', 'wb').write(bytes(2**20))\n"
        "except OSError: pass\nassert 10 < n < 20",
        "passed",
    ),
    "one large file": ("open('x', 'wb').write(bytes(2**24))", "failed"),
    "printing much": ("for _ in range(9999): print('x' * 999)", "passed"),
    "writing into the result": ("import os\nos.write(3, b'x')", "failed"),
    # Nobody reads it, so that it fills no memory but the program's.
    "writing much into the result": (
        "import os; os.write(3, bytes(2**20))",
        "timed out",
    ),
    "looking at other processes": (
        "import os; assert not os.listdir('/proc')",
        "passed",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.quick(3)
def test_a_program_is_contained(name, tmp_path):
    program, outcome = PROGRAMS[name]
    tmp_path.chmod(0o777)
    with subprocess.Popen(["sleep", "60"]) as other:
        program = program.replace("TESTS", str(other.pid)).replace("PORT", "22")
        program = program.replace("OUTSIDE", str(tmp_path / "x"))
        limits = QUICK if outcome == "timed out" else replace(QUICK, seconds=60)
        assert run_contained(program, limits) == outcome
        assert other.poll() is None
        other.kill()
    assert not any(tmp_path.iterdir())


def test_what_a_program_leaves_behind_dies_with_it():
    mark = f"6{time.time_ns()}"
    program = (
        f"import os\nif not os.fork(): os.execv('/bin/sleep', ['sleep', '{mark}'])"
    )
    assert run_contained(program, replace(QUICK, seconds=60)) == "passed"
    lines = subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout
    assert mark not in lines


def test_nothing_runs_where_it_cannot_be_contained(monkeypatch):
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(InputError, match="`allow_code_execution` must be used where"):
        run_contained("pass")
