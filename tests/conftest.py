"""Settings of every test: 8 simulated CPU devices, compilation cache, strict promotion, checked array shapes.

In the process of the test, implicit dtype and rank promotion raise (optax itself excepted,
see jaxft.optim.update.standard_promotion), and the arrays of every function of jaxft are checked against its
jaxtyping annotations.
"""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxft" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import array_checks  # noqa: E402
import pytest  # noqa: E402
import quick_cases  # noqa: E402

array_checks.install("jaxft")

import simulated_devices  # noqa: E402

os.environ.update(simulated_devices.environment(8, os.environ.get("XLA_FLAGS", "")))

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Traces and compiled programs are millions of objects that stay. Python's collector would scan them again and
# again, which takes an eighth of the time of the tests; so it runs rarely, and not on what a module leaves.
gc.set_threshold(100_000, 20, 20)
# Each compiled program takes some of the 65,530 memory mappings that Linux allows a process; without one, XLA
# ends the process. Past this number, programs of earlier modules are dropped.
MANY_MAPPINGS = 40_000


@pytest.fixture(scope="module", autouse=True)
def collect_garbage():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPPINGS:
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector):
    found = yield
    if isinstance(found, list):
        quick_cases.mark_others_slow(found, collector.CollectError)
    return found


@pytest.fixture
def x64():
    """64-bit numbers, for laws that hold to 1e-10."""
    with jax.enable_x64(True):
        yield
