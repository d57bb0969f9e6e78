"""All contestants on one case after another, in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from l2s_jax.bench.contestants import (
    CONTESTANTS,
    ELSEWHERE,
    OURS,
    Case,
    Setup,
    Variant,
    unfit,
    variants,
)
from l2s_jax.bench.remote import BANDWIDTH, Remote

log = logging.getLogger("l2s_jax")

# Runs of each variant, of which the fastest counts: what disturbs a run makes it slower.
TRIALS = 2

Samples = list[dict[str, float]]


class Contest:
    """The processes of all contestants, and why some are not measured."""

    def __init__(
        self,
        setup: Setup,
        repeats: int,
        stack: contextlib.ExitStack,
        *,
        tune: bool = True,
        peer_python: str | None = None,
    ):
        """Starts nobody yet but the process that measures the bandwidth.

        Args:
          setup: what all contestants share; whether there is an accelerator is found out.
          repeats: measurements of each case.
          stack: ends the processes.
          tune: whether the settings of other libraries are varied, and the best kept.
          peer_python: the Python of those in `ELSEWHERE`.

        Raises:
          ValueError: the bandwidth cannot be measured.
        """
        self.failures: dict[str, str] = {}  # of the whole, or of the first case that does not fit
        self._out: set[str] = set()
        self._repeats, self._stack = repeats, stack
        self._tune, self._peer_python = tune, peer_python
        self._remotes: dict[str, Remote] = {}
        self._variants: dict[str, Variant] = {}
        self._chosen_at: dict[str, int] = {}  # the batch size for which
        self._versions: dict[str, str] = {}
        self._order = random.Random(0)
        self.setup = setup
        try:
            self.device = self._open(BANDWIDTH, Variant(""))
        except RuntimeError as error:
            raise ValueError(f"{BANDWIDTH}: {error}") from error
        if self.device["platform"] != "cpu":
            self.setup = dataclasses.replace(setup, accelerator=True, fast_bfloat16=True)

    def _open(self, name: str, variant: Variant) -> dict[str, Any]:
        """Makes a contestant in a process of its own; what it says of itself."""
        python = (self._peer_python if name in ELSEWHERE else None) or sys.executable
        remote = self._remotes[name] = Remote(variant.environment, python)
        self._stack.callback(remote.close)
        setup = dataclasses.replace(
            self.setup, threads=min(variant.threads or self.setup.threads, self.setup.threads)
        )
        return remote.ask("start", name, dataclasses.asdict(setup), dict(variant.arguments))

    def _close(self, name: str) -> None:
        if remote := self._remotes.pop(name, None):
            remote.close()

    def _fail(self, name: str, error: Exception) -> None:
        """Who failed takes no further part.

        Raises:
          ValueError: it is one of ours. Another library that cannot do it is a result.
        """
        if name in (*OURS, BANDWIDTH):
            raise ValueError(f"{name}: {error}") from error
        log.warning("%s: not measured: %s", name, error)
        self.failures[name] = str(error)
        self._out.add(name)
        # What it holds is not to disturb the others.
        self._close(name)

    def ask(self, name: str, *request: Any) -> Any:
        """A contestant's answer, None if it failed: then it takes no further part."""
        try:
            return self._remotes[name].ask(*request)
        except RuntimeError as error:
            self._fail(name, error)
            return None

    def _ready(self, name: str, case: Case) -> dict[str, Any] | None:
        """A contestant prepared for a case with its best settings; its facts, None if it failed."""
        try:
            if name in ELSEWHERE and not self._peer_python:
                raise RuntimeError("its library has an environment of its own: --peer_python")
            # The best settings may be others for a batch than for one row.
            if self._chosen_at.get(name) != case.batch_size:
                self._choose(name, case)
            if name not in self._remotes:
                self._versions[name] = self._open(name, self._variants[name])["version"]
            return self._remotes[name].ask("prepare", *case)
        except (RuntimeError, OSError) as error:
            self._fail(name, error)
            return None

    def _choose(self, name: str, case: Case) -> None:
        """Finds the settings with which a contestant is fastest, alone on this machine."""
        choices = variants(name, self.setup)
        self._chosen_at[name] = case.batch_size
        if len(choices) == 1 or not self._tune:
            self._variants[name] = choices[0]
            return
        self._close(name)
        times: dict[int, float] = {}
        failure: Exception | None = None
        for number, variant in enumerate(choices):
            try:
                self._open(name, variant)
                self._remotes[name].ask("prepare", *case)
                runs = [self._remotes[name].ask("measure") for _ in range(TRIALS)]
                times[number] = min(run["total_ms"] for run in runs)
                log.info("%s: %s: %.4g ms", name, variant.label, times[number])
            except RuntimeError as error:
                log.info("%s: %s: %s", name, variant.label, error)
                failure = failure or error
            finally:
                self._close(name)
        if failure and not times:
            raise failure
        self._variants[name] = choices[min(times, key=times.__getitem__)]

    def measure(self, names: Sequence[str], case: Case) -> list[dict[str, Any]]:
        """A record per contestant: the case, its facts, and medians of its measurements."""
        facts: dict[str, dict[str, Any]] = {}
        for name in names:
            if name in self._out:
                continue
            if reason := unfit(name, self.setup, case):
                shape = "batch {}, {} prompt tokens, {} new tokens".format(*case)
                self.failures.setdefault(name, f"{shape}: {reason}")
            elif (found := self._ready(name, case)) is not None:
                facts[name] = found
        samples, rates = self._take_turns(facts)
        rows = []
        for name, runs in samples.items():
            if (peak := self.ask(name, "memory")) is None:
                continue
            times = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows.append(
                {
                    **self._described(name, case),
                    **facts[name],
                    **times,
                    "quartiles": {key: quartiles([run[key] for run in runs]) for key in runs[0]},
                    "peak_memory_mb": peak["peak_bytes"] / 1e6,
                    **_derived(case, facts[name], times, rates),
                }
            )
        return rows

    def _take_turns(
        self, facts: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Samples], dict[int, float]]:
        """(measurements of each contestant, bandwidth in GB/s for each number of bytes read)."""
        read = {f["bytes_read_per_token"] for f in facts.values() if "bytes_read_per_token" in f}
        sizes = sorted(read)
        samples: dict[str, Samples] = {name: [] for name in facts}
        rates: list[list[float]] = []
        if sizes:
            self.ask(BANDWIDTH, "measure", sizes)  # compiles
        for _ in range(self._repeats):
            turns = [*samples, *([BANDWIDTH] if sizes else [])]
            # Not in one order: nobody always runs after the same one, in whose wake the caches are.
            for name in self._order.sample(turns, len(turns)):
                if name == BANDWIDTH:
                    rates.append(self.ask(name, "measure", sizes))
                elif (found := self.ask(name, "measure")) is None:
                    del samples[name]
                else:
                    samples[name].append(found)
        return samples, dict(
            zip(sizes, map(statistics.median, zip(*rates, strict=True)), strict=True)
        )

    def _described(self, name: str, case: Case) -> dict[str, Any]:
        arguments = {**CONTESTANTS[name].arguments, **self._variants[name].arguments}
        dtype = arguments.get("dtype", self.setup.dtype)
        if arguments.get("weights") == "int8" or "compute_type" in arguments:
            dtype = "int8"
        return {
            "system": name,
            "dtype": dtype,
            "encoder_dtype": arguments.get("encoder_dtype", dtype),
            **case._asdict(),
            "settings": self._variants[name].label,
            "version": self._versions[name],
        }


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third; of one value, that value twice."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def _derived(
    case: Case, facts: Mapping[str, Any], times: Mapping[str, float], rates: Mapping[int, float]
) -> dict[str, float]:
    derived = {"tokens_per_s": case.batch_size * case.new_tokens / times["total_ms"] * 1e3}
    if "bytes_read_per_token" in facts:
        rate = rates[facts["bytes_read_per_token"]]
        floor = facts["bytes_read_per_token"] / rate / 1e6
        derived |= {"gb_per_s": rate, "floor_ms_per_token": floor}
    return derived
