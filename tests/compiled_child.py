"""The main command as a process of its own, which counts what is compiled and what is loaded.

python tests/compiled_child.py FILE [argument of the command ...]
"""

import json
import sys

import jax
from jax.experimental import serialize_executable

from l2s_jax import main

compiled: list[str] = []
loaded: list[int] = []
load = serialize_executable.deserialize_and_load


def listen(event, _, **about):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(about["fun_name"])


def counted(content, *trees):
    loaded.append(len(content))
    return load(content, *trees)


jax.monitoring.register_event_duration_secs_listener(listen)
serialize_executable.deserialize_and_load = counted

if __name__ == "__main__":
    _, path, *arguments = sys.argv
    sys.argv = ["l2s_jax.main", *arguments]
    status = main.main(sys.argv)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"compiled": compiled, "loaded": loaded}, file)
    sys.exit(status)
