"""Eight fake CPU devices for every test, and checks of the shapes that signatures say."""

import os
import tempfile

import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests spend their time in compiling small programs, hardly any in running them.
for flag in (
    "xla_force_host_platform_device_count=8",
    "xla_backend_optimization_level=0",
    *(("xla_cpu_use_fusion_emitters=false",) if xla.CHOICE else ()),
):
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}".strip()

# Many tests compile the same programs; each is compiled once per test run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="l2s_jax_tests_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Nobody means a [D] to be added to a [B, D] by leaving out an axis.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

# JAX reads all that when it is imported.
import shapes  # noqa: E402

shapes.check(["l2s_jax.models", "l2s_jax.decoding", "l2s_jax.training"])
