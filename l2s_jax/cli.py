"""The console command: `l2s-jax NAME FLAG...` is `python -m MODULE FLAG...`, by the names below."""

from __future__ import annotations

import os
import runpy
import sys

# Name -> (module, what it does). Nothing is imported until a command is chosen.
COMMANDS = {
    "run": ("l2s_jax.main", "train, evaluate, generate with or plan an experiment"),
    "convert": ("l2s_jax.convert", "convert a checkpoint or a trained model"),
    "serve": ("l2s_jax.serve", "answer requests over HTTP"),
    "bench": ("l2s_jax.bench", "measure speed beside other libraries"),
}


def usage() -> str:
    """What `l2s-jax --help` prints."""
    lines = [f"  {name:8} {what} (python -m {module})" for name, (module, what) in COMMANDS.items()]
    return "\n".join(
        ["Usage: l2s-jax COMMAND FLAG...", "", *lines, "", "l2s-jax COMMAND --help has its flags."]
    )


def main() -> int:
    """Runs the command that sys.argv names, which ends the process; else gives the exit status."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        given = f"{name!r}: " if name else ""
        print(f"error: {given}expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # As of `python -m`: a config may import its neighbour.
    sys.path.insert(0, os.getcwd())
    # Not handed on as arguments: a config's flags are read from sys.argv itself.
    sys.argv[1:] = rest
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
