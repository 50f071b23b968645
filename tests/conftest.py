"""Eight simulated devices and strict ranks for the whole suite, and real data."""

import gc
import os
import shutil
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

# The programs of the tests run for milliseconds and compile for seconds: without LLVM's
# optimizations the suite takes 40 % less time.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# One module for LLVM instead of 32 that threads compile: a quarter less, where there
# are as many workers as cores.
_QUICK += " --xla_cpu_parallel_codegen_split_count=1"
# Eight simulated devices on few cores may wait for each other longer than XLA allows,
# 40 seconds, after which it aborts the process.
_QUICK += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
# XLA:CPU's MLIR emitters of fusions take half of the time that is left; newer versions
# have no others.
if version("jaxlib").startswith("0.10."):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
# Many runs of the tests are alike: the workers of pytest-xdist, and the processes that
# tests start, inherit one folder of compiled programs, which goes with the session.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_own_cache = None
if _CACHE not in os.environ:
    _own_cache = os.environ[_CACHE] = tempfile.mkdtemp(prefix="sparse-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Runs of the tests leave nothing in the folder of the user.
os.environ["SPARSE_JAX_CACHE"] = "off"

import jax  # noqa: E402 - reads the flags
import pytest  # noqa: E402

from sparse_jax.training import figures  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The lines of Python of each operation, which no test reads, take a tenth of a run.
jax.config.update("jax_traceback_in_locations_limit", 1)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items):
    seen = Counter()
    for item in items:
        if (quick := item.get_closest_marker("quick")) is not None:
            seen[test := (item.path, item.originalname)] += 1
            if seen[test] > quick.args[0]:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    # What is imported and collected stays, and tracing makes many objects that die
    # young: looking through all of them again and again takes another tenth.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)


_save_figure = figures._save


@pytest.fixture(scope="session", autouse=True)
def blank_pictures():
    """Leaves the pictures of the runs blank: they take a fifth of a tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", lambda figure, path: path.write_bytes(b""))
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Has the pictures of the runs of a test rendered."""
    monkeypatch.setattr(figures, "_save", _save_figure)


def pytest_unconfigure():
    if _own_cache is not None:
        shutil.rmtree(_own_cache, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data():
    """Returns the folder of real data, which is not part of the project."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPARSE_JAX_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"needs real data: set SPARSE_JAX_DATA, there is no {folder}")
    return folder
