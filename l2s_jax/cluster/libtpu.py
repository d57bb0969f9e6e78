"""What libtpu, the TPU's compiler and runtime, is told before it is loaded."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_FLAGS = {
    # libtpu 0.0.42.1 emits programs on threads whose stacks are too small for some products that it
    # has fused, and the process ends: so for a step of Flan-T5-XXL, with dropout, on v5e:8x8.
    "--fibers_default_thread_stack_size": str(16 << 20),
    # JAX adds it on a TPU's host. What is compiled elsewhere is to be the same program.
    "--xla_tpu_use_enhanced_launch_barrier": "true",
}
_IGNORED = "--undefok"  # names flags that libtpu need not know; the last such list holds


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds _FLAGS to LIBTPU_INIT_ARGS, but for those that it has.

    Before JAX is asked for any device. A libtpu that doesn't know one of them ignores it.
    """
    flags = environment.get("LIBTPU_INIT_ARGS", "").split()
    given = {name: value for name, _, value in (flag.partition("=") for flag in flags)}
    ours = [f"{name}={value}" for name, value in _FLAGS.items() if name not in given]
    if not ours:
        return
    others = [flag for flag in flags if flag.partition("=")[0] != _IGNORED]
    names = [*filter(None, given.get(_IGNORED, "").split(",")), *(name[2:] for name in _FLAGS)]
    ignored = f"{_IGNORED}={','.join(dict.fromkeys(names))}"
    environment["LIBTPU_INIT_ARGS"] = " ".join([*others, *ours, ignored])
