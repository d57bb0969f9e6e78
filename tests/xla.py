"""How the tests compile: soon, since they spend their time in compiling, hardly any in running."""

from importlib import metadata

# Before jaxlib 0.11 the CPU backend could do without fusion emitters, for programs that compile
# sooner. Later versions have nothing else, and end a process that names the flag.
CHOICE = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11)
# Of programs that are to be those that users have, in tests/conftest.py's process.
AS_USERS_HAVE_IT = {"xla_cpu_use_fusion_emitters": True} if CHOICE else {}

# Code in one piece takes a fifth less processor time than in pieces for several threads.
_QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    *(("--xla_cpu_use_fusion_emitters=false",) if CHOICE else ()),
)


def flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process with so many fake devices."""
    return " ".join((f"--xla_force_host_platform_device_count={devices}", *_QUICK))
