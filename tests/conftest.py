"""Eight fake CPU devices for every test, and checks of the shapes that signatures say."""

import atexit
import collections
import gc
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator

import pytest
import xla

# A shell has what it runs in the background ignore Ctrl-C, and so do the processes that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A flag that is in the environment stays.
set_there = os.environ.get("XLA_FLAGS", "")
ours = [flag for flag in xla.flags(devices=8).split() if flag.split("=")[0] not in set_there]
os.environ["XLA_FLAGS"] = " ".join([*set_there.split(), *ours])

# Many tests compile the same programs; each is compiled once per test run. A folder that is named
# in the environment keeps them for the next runs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.mkdtemp(prefix="l2s_jax_tests_")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Nobody asks a program for the lines that it comes from: to keep them takes a tenth of compiling.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")

# Two processes of tests share two cores: PyTorch's threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Nobody means a [D] to be added to a [B, D] by leaving out an axis.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

# JAX reads all that when it is imported.
import emulator  # noqa: E402
import jax  # noqa: E402
import shapes  # noqa: E402

from l2s_jax.cluster import distributed, libtpu  # noqa: E402

# As all commands do: it is in the keys of the programs that are kept.
libtpu.prepare()
store = emulator.store
shapes.check(["l2s_jax.models", "l2s_jax.decoding", "l2s_jax.training"])


# In a job, what process 0 does for all must not ask the others for anything: they wait for it.
alone, acting = distributed.on_primary, threading.local()


def on_primary(action):
    if getattr(acting, "now", False):
        raise AssertionError("on_primary within on_primary: a job would wait for ever")

    def act():
        acting.now = True
        try:
            return action()
        finally:
            acting.now = False

    return alone(act)


distributed.on_primary = on_primary

# Tracing makes many objects and hardly any cycles: to look for those took a tenth of its time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


# Files that take long with few tests, since they start processes, train whole runs or read large
# models: they come first, so that neither process of the tests waits for the other at the end.
LONG = """
    distributed main kills gpu_kit stages hub compare buckets sequence stopping attention smollm2
    colabs cut benchmarks dial compiled tuning main_families exact_run bucket_jobs joining
    distillation_run serve on_policy_run serve_life judging old_files names ray_serve serve_page
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of LONG, then those with the most tests."""
    tests = collections.Counter(item.path for item in items)
    places = {f"test_{name}": place for place, name in enumerate(LONG.split())}
    items.sort(key=lambda item: (places.get(item.path.stem, len(places)), -tests[item.path]))


# Each program maps a few pieces of memory. Beyond the 65,530 that Linux allows, XLA crashes. A file
# alone may take 20,000, which are 2 GB.
MOST_MAPS = 10_000


def _maps() -> int:
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:  # not Linux, which has such a limit
        return 0


@pytest.fixture(scope="module", autouse=True)
def _programs_go_in_time() -> Iterator[None]:
    """Lets go of what files have compiled before it is too much; else the next ones use it too."""
    yield
    gc.collect()
    if _maps() > MOST_MAPS:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
    gc.freeze()  # what is left now stays for long, and need not be looked through again


@pytest.fixture(scope="module")
def programs_of_its_own() -> Iterator[None]:
    """For files that change what programs are made of: no other file is to have their programs."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def compilations() -> Iterator[list[float]]:
    """The seconds of each compilation by the backend, or of finding it in the cache on disk."""
    seconds = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)
