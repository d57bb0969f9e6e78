"""Eight fake CPU devices for every test, so that meshes can be tested on any machine."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests spend their time in compiling small programs, hardly any in running them.
for flag in ("xla_force_host_platform_device_count=8", "xla_backend_optimization_level=0"):
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}".strip()
