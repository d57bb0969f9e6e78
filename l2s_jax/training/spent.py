"""On what the wall time of stages is spent: each second counts once, for one stage and one kind.

What JAX says of its compiling counts as that, whatever it was needed for. What a stage took is kept
in its folder, and a run that continues adds to it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from l2s_jax.files import is_file, read_json, write_json

FILE = "time.json"
# Compiling: JAX traces, lowers and compiles. Data: a training waits for a batch. Steps: of it.
# Saving: checkpoints. Evaluating: validations, or of the report's systems. Other: all else of a
# stage, such as reading and writing models.
KINDS = ("compiling", "data", "steps", "saving", "evaluating", "other")
_COMPILING = "/jax/core/compile/"


class _Stage:
    """Seconds of each kind, and the clock since they were last added to."""

    def __init__(self, path: str, seconds: dict[str, float]):
        self.path, self.seconds = path, dict.fromkeys(KINDS, 0.0) | seconds


_open: list[tuple[_Stage, str]] = []
_since = 0.0
_spans: list[tuple[float, float]] = []
_thread: int | None = None


def _settle() -> None:
    """Adds what has passed to what is under way."""
    global _since
    now = time.perf_counter()
    if _open:
        stage, kind = _open[-1]
        stage.seconds[kind] += now - _since
    _since = now


def _compiled(event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
    """JAX has done something of compiling, in seconds of the clock; one may hold others."""
    if not event.startswith(_COMPILING) or threading.get_ident() != _thread or not _open:
        return
    seconds = end_time - start_time
    while _spans and _spans[-1][0] >= start_time:
        inner = _spans.pop()
        seconds -= inner[1] - inner[0]
    _spans.append((start_time, end_time))
    _settle()
    stage, kind = _open[-1]
    moved = min(seconds, stage.seconds[kind])  # two clocks may differ a little
    stage.seconds[kind] -= moved
    stage.seconds["compiling"] += moved


@contextlib.contextmanager
def _within(stage: _Stage, kind: str) -> Iterator[None]:
    _settle()
    _open.append((stage, kind))
    try:
        yield
    finally:
        _settle()
        _open.pop()


@contextlib.contextmanager
def on(kind: str) -> Iterator[None]:
    """What is within counts as one of KINDS, for the stage that is under way, if any."""
    if not _open:
        yield
        return
    with _within(_open[-1][0], kind):
        yield


@contextlib.contextmanager
def on_stage(directory: str, kind: str = "other", *, anew: bool = False) -> Iterator[None]:
    """What is within counts for the stage in `directory`, and for none that it is needed by.

    `anew`: what it took before does not count.
    """
    global _thread
    import jax

    if _thread is None:
        jax.monitoring.register_event_time_span_listener(_compiled)
    _thread = threading.get_ident()
    found = {} if anew else seconds_of(directory)
    try:
        with _within(_Stage(os.path.join(directory, FILE), found), kind):
            yield
            keep()
    finally:
        if not _open:
            _spans.clear()


def is_on(directory: str) -> bool:
    """Whether the stage in `directory` is under way, and none that it needs."""
    return bool(_open) and _open[-1][0].path == os.path.join(directory, FILE)


def keep() -> None:
    """Has what the stage under way has taken so far outlive this process; process 0 alone does."""
    from l2s_jax.cluster import distributed

    if not _open or not distributed.is_primary():
        return
    _settle()
    stage, _ = _open[-1]
    write_json(stage.path, stage.seconds)


def taken() -> dict[str, float]:
    """Seconds of each kind that the stage under way has taken; {} outside of any."""
    _settle()
    return dict(_open[-1][0].seconds) if _open else {}


def seconds_of(directory: str) -> dict[str, float]:
    """What the stage in a folder has taken, by kind; {} where that is not known."""
    path = os.path.join(directory, FILE)
    if not is_file(path):
        return {}
    found = read_json(path)
    return {kind: float(found.get(kind, 0.0)) for kind in KINDS}


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each kind's share of the whole; they sum to 1."""
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()} if total > 0 else {}


def as_metrics(seconds: dict[str, float]) -> dict[str, float]:
    """`shares` by the names that metrics have."""
    return {f"time_{kind}": share for kind, share in shares(seconds).items()}


def line(seconds: dict[str, float]) -> str:
    """For people: seconds in all, and the shares in whole per cents that sum to 100."""
    parts = {kind: 100 * share for kind, share in shares(seconds).items()}
    whole = {kind: int(part) for kind, part in parts.items()}
    # The largest remainders get what is missing.
    missing = 100 - sum(whole.values())
    for kind in sorted(parts, key=lambda kind: whole[kind] - parts[kind])[:missing]:
        whole[kind] += 1
    words = ", ".join(f"{kind} {part} %" for kind, part in whole.items() if part)
    return f"{sum(seconds.values()):,.1f} s{words and f': {words}'}"
