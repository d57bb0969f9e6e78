"""Which of two code generators XLA's CPU backend takes, where it has two."""

from importlib import metadata

# Before jaxlib 0.11 fusion emitters could be turned off, for programs that compile sooner. Later
# versions have nothing else, and end a process that names the flag.
CHOICE = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11)
# Of programs that are to be those that users have, in tests/conftest.py's process.
AS_USERS_HAVE_IT = {"xla_cpu_use_fusion_emitters": True} if CHOICE else {}
