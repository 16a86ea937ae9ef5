"""Session of the live comparisons: `make test-peers`, Python 3.11 with torch and transformers.

Everything here carries the `peers` mark, so the plain test session, which has neither package, leaves it out.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    for line in ("ignore::DeprecationWarning:torch", "ignore::FutureWarning:transformers"):
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests_peers" in item.path.parts:
            item.add_marker(pytest.mark.peers)
