"""Session set-up: 8 fake CPU devices, strict dtypes and ranks, and the shared tiny models.

Everything before the first `import jax` matters: XLA reads its flags once.
"""

import os

# LLVM at level 0: tests compile hundreds of tiny programs once, and XLA's own passes (fusion, layout, copies,
# collectives), which the tests look at, are not affected.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " " + _flag).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["KVATTN_CHECK_SHAPES"] = "1"  # the letters in public signatures are bound at every call (kvattn/typed.py)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.helpers import tiny  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_sessionstart(session):
    """The fake devices are asserted, never skipped: a sharding test on one device proves nothing."""
    count = len(jax.devices("cpu"))
    if count != 8:
        pytest.exit(f"the test session needs 8 fake CPU devices and has {count}; check XLA_FLAGS", 3)


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_module():
    """Every compiled program holds memory maps, of which a process has 65,530: a worker that keeps the programs of the
    whole suite dies of a segmentation fault in the compiler."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def devices():
    """The 8 fake CPU devices."""
    return jax.devices("cpu")


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(20240607)


@pytest.fixture(params=sorted(tiny.CASES))
def tiny_case(request):
    """Every tiny model, one axis moved at a time and the combinations that interact: (name, ModelConfig)."""
    return request.param, tiny.CASES[request.param]
