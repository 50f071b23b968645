"""Eight simulated devices and strict ranks for the whole suite, and real data."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data():
    """Returns the folder of real data, which is not part of the project."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPARSE_JAX_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"needs real data: set SPARSE_JAX_DATA, there is no {folder}")
    return folder
