"""Where a run's numbers go: a progress bar, a JSONL file, TensorBoard, and trackers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from l2s_jax.data.text import whole
from l2s_jax.files import CannotWrite, is_bucket, json_object, naming, write_bytes
from l2s_jax.training.mirror import Mirror
from l2s_jax.training.trackers import Trackers

_FILE = "metrics.jsonl"
_SAMPLES = "samples.jsonl"
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_LINE_SECONDS = 30.0
_NOTE_SECONDS = 0.5
# More than one call adds: where nobody takes them, whoever adds to a full queue waits for ever.
_QUEUE = 10_000


T = TypeVar("T")


class MetricWriter:
    """Writes the metrics of one run to `directory`, and shows how far the run is on stderr.

    - `metrics.jsonl`, one object {"step": step, name: value, ...} per line, values that are not
      finite as null. A line is handed to the operating system whole as soon as it is written, so a
      killed run keeps every line but possibly the last, which is dropped when the file is opened
      again. So are the lines of `start_step` and later: a resumed run writes them anew.
    - `samples.jsonl`, one object {"step": step, name: text, ...} per sample, kept in the same way.
      It is there once there are samples.
    - TensorBoard event files, tags `name/metric`, finite values only, and `name/samples`, purged in
      the same way; unless the trackers are to do without them.
    - What the trackers have of the metrics.
    - In a bucket, where nothing can be appended to, the files are sent anew every half a minute and
      before a checkpoint counts, so that a killed run keeps every line up to its checkpoint.
    - A bar with the name, the step, the time left and, once written, `loss` and `tokens_per_s`, or
      in a validation the number of the batch. Where stderr is no terminal, a line every 30 seconds
      and one at the end.

    Values must already be on the host (or ready): reading them is what would stall the device.
    """

    def __init__(
        self,
        directory: str,
        *,
        total_steps: int,
        start_step: int = 0,
        owed: bool = False,
        name: str = "train",
        trackers: Trackers | None = None,
    ):
        """Opens the files; `start_step` is the first step that this run will write.

        With `owed`, of that step only the validation; what else there is of it stays.

        Raises:
          ValueError: steps out of order, or a line of an existing file other than a torn last one
            is not an object with an integer "step".
        """
        if not 0 <= start_step <= total_steps:
            raise ValueError(
                f"start_step {start_step}: expected 0 <= start_step <= total_steps ({total_steps})"
            )
        self._folder = None
        if is_bucket(directory):
            self._folder = Mirror(directory, (_FILE, _SAMPLES))
            directory = self._folder.local
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, _FILE)
        self._samples = os.path.join(directory, _SAMPLES)
        _keep_lines_before(path, start_step, owed=owed)
        _keep_lines_before(self._samples, start_step)
        self._jsonl = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._directory, self._path = directory, path
        self._trackers = trackers
        self._tensorboard: Any = None
        if trackers is None or trackers.tensorboard:
            # tensorboardX loads torch wherever that is installed; only runs that write pay for it.
            from tensorboardX import SummaryWriter

            first = start_step + owed
            self._tensorboard = SummaryWriter(directory, purge_step=first, max_queue=_QUEUE)
        self._name = name
        self._progress = _progress(name, start_step, total_steps)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records `metrics` (Python, NumPy or JAX scalars) as the values at `step`."""
        if "step" in metrics:
            raise ValueError("metric name 'step': expected any other, the JSONL file uses this one")
        values = {key: float(value) for key, value in metrics.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with naming(self._path):
            self._jsonl.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
        if self._tensorboard:
            self._check_tensorboard()
            for key, value in values.items():
                if math.isfinite(value):
                    self._tensorboard.add_scalar(f"{self._name}/{key}", value, int(step))
        if self._trackers:
            self._trackers.metrics(self._name, step, values)
        self._progress.describe(_postfix(values))

    def write_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Records texts by what they are, such as {"prompt": ..., "response": ...}."""
        if not samples:
            return
        samples = [{name: whole(text) for name, text in s.items()} for s in samples]
        with naming(self._samples), open(self._samples, "a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": int(step), **sample}, ensure_ascii=False) + "\n")
        if self._tensorboard:
            self._tensorboard.add_text(f"{self._name}/samples", _page(samples), int(step))

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._progress.advance(int(step))

    def telling(self, what: str, batches: Iterable[T]) -> Iterator[T]:
        """The batches, one by one; the bar says what is done with them, and with which."""
        for number, batch in enumerate(batches, start=1):
            self._progress.note(f"{what}, batch {number}")
            yield batch
        self._progress.note()

    def sync(self) -> None:
        """Sends what has been written so far to a bucket, where the directory is in one."""
        if self._folder:
            if self._tensorboard:
                self._tensorboard.flush()
            self._folder.send()

    def close(self) -> None:
        """Closes the files and leaves the bar as it stands."""
        self._progress.close()
        with naming(self._path):
            self._jsonl.close()
        if self._tensorboard:
            self._check_tensorboard()
            with naming(os.path.join(self._directory, "events.out.tfevents")):
                self._tensorboard.close()
        if self._folder:
            self._folder.close()

    def _check_tensorboard(self) -> None:
        """An error if the thread that writes its files has ended with one."""
        if not self._tensorboard.file_writer.event_writer._worker.is_alive():
            path = os.path.join(self._directory, "events.out.tfevents")
            raise CannotWrite(f"{path}...: TensorBoard's file cannot be written")

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: object, error: object, _: object) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # the error under way is the first one
            self.close()


class NoWriter:
    """In the place of a MetricWriter, where another process writes."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def write_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def telling(self, what: str, batches: Iterable[T]) -> Iterator[T]:
        """The batches."""
        return iter(batches)

    def sync(self) -> None:
        """Nothing."""

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class _Bar:
    """A tqdm bar on a terminal."""

    def __init__(self, name: str, start: int, total: int):
        self._postfix, self._noted = "", 0.0
        self._bar = tqdm(
            desc=name,
            initial=start,
            total=total,
            bar_format=_BAR,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def describe(self, postfix: str) -> None:
        self._postfix = postfix
        self._bar.set_postfix_str(postfix, refresh=False)

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def note(self, what: str = "") -> None:
        if not what or time.monotonic() - self._noted >= _NOTE_SECONDS:
            self._noted = time.monotonic()
            self._bar.set_postfix_str(what or self._postfix)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """The same facts for a log file: one line now and then."""

    def __init__(self, name: str, start: int, total: int):
        self._fixed: dict[str, Any] = {"prefix": name, "initial": start, "total": total}
        self._step, self._printed, self._postfix = start, None, ""
        self._begun = self._last = time.monotonic()

    def describe(self, postfix: str) -> None:
        self._postfix = postfix

    def advance(self, step: int) -> None:
        self._step = step
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._print(self._postfix)

    def note(self, what: str = "") -> None:
        if what and time.monotonic() - self._last >= _LINE_SECONDS:
            self._print(what)
            self._printed = None  # of the step

    def close(self) -> None:
        if self._step != self._printed:
            self._print(self._postfix)

    def _print(self, postfix: str) -> None:
        self._last, self._printed = time.monotonic(), self._step
        line = tqdm.format_meter(
            self._step,
            elapsed=self._last - self._begun,
            bar_format=_LINE,
            postfix=postfix,
            **self._fixed,
        )
        print(line, file=sys.stderr, flush=True)


def _page(samples: Sequence[Mapping[str, str]]) -> str:
    """Samples as TensorBoard shows them, in Markdown: texts as they are, line by line."""
    lines = []
    for sample in samples:
        for name, text in sample.items():
            lines += [f"**{name}**", "", *(f"    {line}" for line in text.splitlines()), ""]
        lines += ["---", ""]
    return "\n".join(lines)


def _progress(name: str, start: int, total: int) -> _Bar | _Lines:
    return (_Bar if sys.stderr.isatty() else _Lines)(name, start, total)


def _postfix(values: Mapping[str, float]) -> str:
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4g}")
    if "tokens_per_s" in values:
        parts.append(f"{_compact(values['tokens_per_s'])} tokens/s")
    return ", ".join(parts)


def _compact(value: float) -> str:
    return tqdm.format_sizeof(value) if math.isfinite(value) else str(value)


def _keep_lines_before(path: str, start_step: int, *, owed: bool = False) -> None:
    """Rewrites the JSONL file without a torn last line and without steps >= start_step.

    With `owed`, of `start_step` only the line of a validation goes.
    """
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    # A complete file ends with a newline, so what follows the last one is torn or empty.
    last = start_step if owed else start_step - 1
    kept = []
    for number, line in enumerate(lines[:-1], start=1):
        step = _step_of(line, f"{path}:{number}")
        if step <= last and not (owed and step == last and b'"val_loss"' in line):
            kept.append(line)
    write_bytes(path, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes, where: str) -> int:
    try:
        step = json_object(line, where).get("step")
    except ValueError:
        step = None
    if type(step) is not int:
        raise ValueError(
            f'{where}: expected a JSON object with an integer "step", got {line[:80]!r}'
        )
    return step
