"""Runs the parts of the GPU kit, one after another, each in a process with a time limit.

    benchmarks/gpu.sh [--rehearse] [--parts=facts,right] [--output=runs/gpu]

What a part has finished is on the disk at once: OUTPUT/PART.json is its own, OUTPUT/gpu.json and
OUTPUT/gpu.md hold all of them, OUTPUT/logs/PART.log is what it printed. A part that fails, or that
is stopped at its limit, is named, and the others go on. Parts of an earlier run in the same folder
on the same device stay, where this one does not run them.

Exit status: 0; 1 where a part failed; 2 for bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.part import GRACE_S, last_error, missing, read_json
from l2s_jax.arguments import Parser
from l2s_jax.files import finite, write_json

# Seconds that a part may take at most, in the order in which they run. The last has what is left.
LIMITS = {
    "facts": 40,
    "right": 90,
    "serve": 170,
    "exact": 75,
    "int8": 45,
    "train": 140,
    "profile": 50,
    "quality": math.inf,
}
NEEDED = ("jax", "flax", "optax", "orbax.checkpoint", "torch", "transformers", "ml_collections")
PATIENCE = 4  # times as long, in a rehearsal: a CPU may be slow and busy
# To end what it started, and to write the report.
RESERVE_S = 5.0


def _parts(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in LIMITS:
            raise argparse.ArgumentTypeError(f"no {name!r}, expected some of {', '.join(LIMITS)}")
    return [name for name in LIMITS if name in names]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds above 0")
    return value


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="benchmarks/gpu.sh",
        description="Measures everything on one GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on a CPU")
    parser.add_argument("--parts", type=_parts, default=",".join(LIMITS))
    parser.add_argument("--output", default="runs/gpu", help="a folder (default: %(default)s)")
    parser.add_argument("--limit_s", type=_seconds, default=530.0, help="of all parts together")
    options = parser.parse_args(argv)
    if packages := missing(NEEDED):
        found = ", ".join(packages)
        parser.error(f"missing packages: {found}; benchmarks/gpu/README.md says how to bring them")
    if problem := _no_device(options.rehearse) or _not_writable(options.output):
        parser.error(problem)
    return options


def _no_device(rehearse: bool) -> str:
    if rehearse:
        return ""
    program = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    backend = found.stdout.strip()
    if found.returncode:
        return f"JAX cannot start here: {last_error(found.stderr)}"
    if backend != "gpu":
        return f"JAX runs on {backend!r} here, expected a GPU; --rehearse runs on a CPU"
    return ""


def _not_writable(folder: str) -> str:
    try:
        os.makedirs(os.path.join(folder, "logs"), exist_ok=True)
        with open(os.path.join(folder, "logs", ".written"), "w", encoding="utf-8"):
            pass
        os.remove(os.path.join(folder, "logs", ".written"))
    except OSError as error:
        return f"--output={folder}: {error.strerror or error}"
    return ""


def _run(name: str, folder: str, rehearse: bool, limit_s: float) -> dict[str, Any]:
    """A part, to its end or to its limit: its status, its seconds and what it left."""
    output = os.path.abspath(os.path.join(folder, f"{name}.json"))
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", f"--output={output}"]
    command += [f"--limit_s={max(limit_s - GRACE_S, 1.0):.0f}"]
    command += ["--rehearse"] if rehearse else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(_rehearsed() if rehearse else {})}
    log = os.path.join(folder, "logs", f"{name}.log")
    began = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = _status(process.wait(limit_s), log)
        except subprocess.TimeoutExpired:
            status = f"stopped at its limit of {limit_s:.3g} s"
        finally:
            _end(process)
    entry: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if result := read_json(output):
        entry["result"] = result
    return entry


def _rehearsed() -> dict[str, str]:
    """The environment of a rehearsal: a CPU, and programs that take longer to compile than run."""
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
    major, minor, *_ = metadata.version("jaxlib").split(".")
    if (int(major), int(minor)) < (0, 11):  # later ones do not know it, and end
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "XLA_FLAGS": " ".join(flags).strip(),
    }


def _status(code: int, log: str) -> str:
    if code == 0:
        return "ok"
    with open(log, encoding="utf-8", errors="replace") as file:
        return f"failed ({code}): {last_error(file.read())}"


def _end(process: subprocess.Popen) -> None:
    """Ends a part and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGCONT)  # who is stopped hears nothing else
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        if process.poll() is not None and number == signal.SIGTERM:
            time.sleep(0.2)  # its own children end too


def _earlier(folder: str, rehearsal: bool) -> dict[str, Any]:
    """The parts of an earlier run in the folder, of the same kind."""
    found = read_json(os.path.join(folder, "gpu.json"))
    return found["parts"] if found and found["rehearsal"] == rehearsal else {}


def _same_device(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    def device(entry: Mapping[str, Any]) -> Any:
        return entry.get("result", {}).get("device")

    return device(old) == device(new)


def _write(parts: Mapping[str, Any], options: argparse.Namespace) -> None:
    content = {"rehearsal": options.rehearse, "parts": parts}
    write_json(os.path.join(options.output, "gpu.json"), finite(content))
    report.write(parts, options.rehearse, options.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments and runs the parts; the exit status."""
    began = time.monotonic()
    options = _options(argv)
    parts = _earlier(options.output, options.rehearse)
    for name in options.parts:
        left = options.limit_s - RESERVE_S - (time.monotonic() - began)
        if left < GRACE_S:
            parts.setdefault(name, {"status": "not run: no time was left", "seconds": 0.0})
        else:
            limit_s = min(LIMITS[name] * (PATIENCE if options.rehearse else 1), left)
            print(f"{name}: at most {limit_s:.3g} s", flush=True)
            entry = _run(name, options.output, options.rehearse, limit_s)
            if name == "facts" and "facts" in parts and not _same_device(parts["facts"], entry):
                parts = {}
            parts[name] = entry
        print(f"{name}: {parts[name]['status']}, {parts[name]['seconds']:.0f} s", flush=True)
        parts = {known: parts[known] for known in LIMITS if known in parts}
        _write(parts, options)
    failed = [name for name in options.parts if parts[name]["status"].startswith("failed")]
    print(f"{os.path.join(options.output, 'gpu.md')}: the tables", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
