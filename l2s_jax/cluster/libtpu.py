"""What libtpu, the TPU's compiler and runtime, is told before it is loaded."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# libtpu 0.0.42.1 emits programs on threads whose stacks are too small for some products that it has
# fused, and the process ends: so for a training step of Flan-T5-XXL, with dropout, on v5e:8x8.
_STACK = "fibers_default_thread_stack_size"
_STACK_BYTES = 16 << 20
_IGNORED = "--undefok="  # flags that libtpu need not know; the last such list holds


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has libtpu compile with stacks of 16 MiB, unless the environment says another size.

    Before JAX is asked for any device. A libtpu that doesn't know the setting ignores it.
    """
    flags = environment.get("LIBTPU_INIT_ARGS", "").split()
    if any(_STACK in flag for flag in flags):
        return
    ignored = [flag.removeprefix(_IGNORED) for flag in flags if flag.startswith(_IGNORED)]
    others = [flag for flag in flags if not flag.startswith(_IGNORED)]
    ours = [f"--{_STACK}={_STACK_BYTES}", _IGNORED + ",".join([*ignored[-1:], _STACK])]
    environment["LIBTPU_INIT_ARGS"] = " ".join([*others, *ours])
